"""Bodies in standard ONNX operators, and the op library's kernels, against the PyTorch references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isofold.compiler.dialect import OPERATORS
from isofold.runtimes.onnx.functions import BODIES

from .operator_cases import cases
from .single import model_of, run

CASES = list(cases())
IDS = [f"{name}-{what}" for name, what, _ in CASES]
CONSTANT = ("weight", "scale", "zero", "wsum", "bias", "codes", "table", "multiplier", "codebooks")
SPARSE = ("places", "values", "offsets")
NOT_IN_LIBRARY = (
    "quantize_dequantize",
    "quantize_dequantize_fp8",
    "dequantize_weight",
    "dequantize_coded",
    "dequantize_codebook",
    "dequantize_outliers",
    "dequantize_cache",
    "linear_grouped",
)


def assert_close(name: str, arguments: dict[str, Any], got: list[np.ndarray]) -> None:
    expected = OPERATORS[name].reference(**arguments)
    wanted = [t.numpy() for t in (expected if isinstance(expected, tuple) else (expected,))]
    assert len(wanted) == len(got)
    for want, have in zip(wanted, got, strict=True):
        assert want.dtype == have.dtype
        assert want.shape == have.shape
        if want.dtype == np.uint8:  # a last bit in x may move one code by one
            difference = np.abs(want.astype(int) - have.astype(int))
            assert difference.max(initial=0) <= 1
            assert (difference > 0).mean() <= 0.01
        else:
            scale = max(np.abs(want).max(initial=0), 1e-3)
            # Codes inside the operator may round the other way for single elements; a linear's own codes are exact
            # unless a transform has summed in another order.
            inside = name == "conv_packed" or (name == "quantize_linear_packed" and arguments["hadamard"])
            bound = 2e-2 if inside else 2e-5
            assert np.abs(want - have).max(initial=0) <= bound * scale


def test_every_operator_has_a_body() -> None:
    assert set(BODIES) == set(OPERATORS)


def test_every_operator_is_covered_here() -> None:
    assert {name for name, _, _ in CASES} == set(OPERATORS)


@pytest.mark.parametrize(("name", "what", "arguments"), CASES, ids=IDS)
def test_stock_runtime_computes_the_reference(name: str, what: str, arguments: dict[str, Any]) -> None:
    model = model_of(name, arguments, (*CONSTANT, *SPARSE))
    assert_close(name, arguments, run(model, arguments))


@pytest.mark.parametrize(("name", "what", "arguments"), CASES, ids=IDS)
def test_library_computes_the_reference(
    name: str, what: str, arguments: dict[str, Any], library: str
) -> None:
    if name in NOT_IN_LIBRARY:
        pytest.skip("runs through its body with the library too")
    model = model_of(name, arguments, (*CONSTANT, *SPARSE))
    model.functions.clear()  # so that only the kernel can run
    assert_close(name, arguments, run(model, arguments, library))
