"""Every dialect operator: registered soundly, differentiable, and equal to the arithmetic that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from isofold.compiler.dialect import OPERATORS, operator_of, outlier_packing, packing
from isofold.compiler.dialect.dense_packing import pack_dense
from isofold.compiler.dialect.element_formats import FORMATS
from isofold.compiler.dialect.packing_codebook import CodebookMatrix, pack_codebook
from isofold.compiler.dialect.packing_coded import CodedMatrix, pack_coded
from isofold.compiler.dialect.quantization import levels
from isofold.compiler.dialect.sparse_packing import pack_sparse
from isofold.compiler.errors import InputError

OPS: Any = torch.ops.isofold


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator())


def packed(n: int, k: int, bits: int, group_size: int, zeros: bool = False) -> packing.PackedLinear:
    g = generator()
    groups = -(-k // group_size) if group_size else 1
    low, high = packing.code_range(bits, symmetric=False)
    scale, _ = packing.storable_scale(0.01 + torch.rand(n, groups, generator=g) / 10, group_size)
    zero = torch.randint(low // 2, high // 2, (n, groups), generator=g, dtype=torch.int8) if zeros else None
    codes = torch.randint(low, high + 1, (n, k), generator=g, dtype=torch.int8)
    return packing.pack_linear(codes, scale, zero, bits, group_size)


def linear_arguments(
    bits: int = 8, group_size: int = 0, zeros: bool = False, residual: bool = True
) -> tuple[Any, ...]:
    p = packed(5, 40, bits, group_size, zeros)
    u, params = OPS.quantize_activation(randn(2, 3, 40), None, packing.alignment(group_size))
    return (
        u, params, p.weight, p.scale, p.zero, p.wsum, randn(5), randn(2, 3, 5) if residual else None,
        5, 40, bits, group_size, p.scale_multiplier, "gelu", False,
    )  # fmt: skip


def quantizing_arguments(*quantizer: Any, bits: int = 4, group_size: int = 32) -> tuple[Any, ...]:
    """quantizer: params, pre_shift, pre_scale, input_bits, hadamard."""
    x = randn(2, 3, 40)
    _, _, *linear = linear_arguments(bits, group_size, group_size > 0)
    return (x, *quantizer[:3], *linear, *quantizer[3:])


def float_arguments() -> tuple[Any, ...]:
    p = packed(5, 40, 4, 32, True)
    tensors = (p.weight, p.scale, p.zero, randn(5), None)
    return (randn(2, 3, 40), *tensors, 5, 40, 4, 32, p.scale_multiplier, "silu", False)


EXPERT = torch.tensor([2, 0, -1, 2, 3, 0, 2])
"""Seven rows of three experts: one that no row chose, and two rows of none."""


def grouped_arguments(quantized: bool, bits: int = 4, group_size: int = 32) -> tuple[Any, ...]:
    p = packed(3 * 16, 40, bits, group_size, zeros=True)
    assert p.zero is not None
    tensors = [t.unflatten(0, (3, -1)) for t in (p.weight, p.scale, p.zero, p.wsum)]
    tail = (randn(3, 5), 5, 40, bits, group_size, p.scale_multiplier)
    if not quantized:
        return (randn(7, 40), EXPERT, *tensors[:3], *tail)
    u, params = OPS.quantize_activation(randn(7, 40), None, packing.alignment(group_size))
    return (u, params, EXPERT, *tensors, *tail)


def grouped_dense_arguments() -> tuple[Any, ...]:
    panels = torch.stack([pack_dense(w) for w in randn(3, 5, 40)])
    return (randn(7, 40), EXPERT, panels, randn(3, 5), 5, 40)


def outlier_arguments(quantized: bool, gated: bool = False) -> tuple[Any, ...]:
    rows, n = (32, 10) if gated else (5, 5)
    p = packed(rows, 40, 4, 32, True)
    places = torch.stack([torch.randperm(40, generator=generator())[:3] for _ in range(rows)])
    held = outlier_packing.pack_outliers(places, randn(rows, 3).half(), 40, 0.5)
    tail = (randn(rows if gated else n), None, held.places, held.values, held.offsets)
    attributes = (n, 40, 4, 32, p.scale_multiplier, "silu", gated, held.multiplier)
    if not quantized:
        return (randn(2, 3, 40), p.weight, p.scale, p.zero, *tail, *attributes)
    u, params = OPS.quantize_activation(randn(2, 3, 40), None, 32)
    return (u, params, p.weight, p.scale, p.zero, p.wsum, *tail, *attributes)


def dequantize_experts_arguments() -> tuple[Any, ...]:
    g = generator()
    codes = torch.randint(-8, 8, (3, 5, 40), generator=g, dtype=torch.int8)
    return (
        codes,
        torch.rand(3, 5, 2, generator=g),
        torch.randint(-3, 4, (3, 5, 2), generator=g).to(torch.int8),
        32,
    )


def dequantize_outliers_arguments() -> tuple[Any, ...]:
    codes, scale, zero, group_size = dequantize_arguments()
    places = torch.randint(0, 40, (5, 3), generator=generator(), dtype=torch.int32)
    return codes, scale, zero, places, randn(5, 3).half(), 0.5, group_size


def grouped_cache_arguments(bits: int) -> tuple[Any, ...]:
    k, v = (OPS.quantize_cache(randn(2, 2, 6, depth), None, bits, [], 32) for depth in (64, 96))
    return (randn(2, 3, 5, 64), *k, *v, None, 4, 2, 64, 96, bits, 1, 0.3, False, 0.0, 32)


def cached_arguments(bits: int) -> tuple[Any, ...]:
    k, v = (OPS.quantize_cache(randn(2, 2, 6, depth), None, bits) for depth in (8, 40))
    mask = randn(2, 1, 3, 6)
    return (randn(2, 3, 5, 8), *k, *v, mask, 4, 2, 8, 40, bits, 1, 0.3, False, 20.0)


def coded_matrix(name: str, n: int, k: int, group_size: int) -> CodedMatrix:
    form = FORMATS[name]
    codes = torch.randint(0, 2 ** (form.bits - 2), (n, k), generator=generator()).to(torch.uint8)
    groups = -(-k // group_size) if group_size else 1
    scale = torch.full((n, groups), 0.25)
    scale = scale if form.scale == "float" else torch.full((n, groups), 120, dtype=torch.uint8)
    return CodedMatrix(codes, scale, 1.0, randn(16) if name == "table4" else None, name, group_size)


def coded_arguments(name: str, group_size: int, gated: bool = False) -> tuple[Any, ...]:
    p = pack_coded(coded_matrix(name, 32 if gated else 5, 40, group_size))
    tail = (5, 40, name, group_size, p.scale_multiplier, "silu", gated)
    return (randn(2, 3, 40), p.weight, p.scale, p.table, None, randn(2, 3, 5), *tail)


def fp8_arguments(name: str, group_size: int, static: bool, gated: bool = False) -> tuple[Any, ...]:
    _, weight, scale, _, *rest = coded_arguments(name, group_size, gated)
    params = torch.tensor([0.01]) if static else None
    u, s = torch.ops.isofold.quantize_activation_fp8(randn(2, 3, 40), params, packing.alignment(group_size))
    return (u, s, weight, scale, *rest)


def codebook_matrix(n: int, k: int, count: int, bits: int) -> CodebookMatrix:
    codes = torch.randint(0, 2**bits, (n, -(-k // 8), count), generator=generator(), dtype=torch.int32)
    books = randn(count, 2**bits, 8).half().float()
    return CodebookMatrix(codes.to(torch.uint8 if bits == 8 else torch.uint16), books, randn(n).abs(), k)


def codebook_arguments(count: int, bits: int, gated: bool = False) -> tuple[Any, ...]:
    p = pack_codebook(codebook_matrix(32 if gated else 5, 43, count, bits))
    tail = (5, 43, p.layout, "silu", gated)
    return (randn(2, 3, 43), p.weight, p.codebooks, p.scale, None, randn(2, 3, 5), *tail)


def dequantize_codebook_arguments(count: int, bits: int) -> tuple[Any, ...]:
    m = codebook_matrix(5, 43, count, bits)
    return (m.codes, m.codebooks, m.scale, 43)


def dequantize_coded_arguments(name: str, group_size: int) -> tuple[Any, ...]:
    m = coded_matrix(name, 5, 40, group_size)
    return (m.codes, m.scale, torch.tensor(0.5), m.table, name, group_size)


def sparse_arguments(quantized: bool) -> tuple[Any, ...]:
    weight = randn(5, 40) * (randn(5, 40) > 0.7)
    tail = (randn(5), randn(2, 3, 5), 5, 40, "bitmask")
    if not quantized:
        p = pack_sparse(weight)
        return (randn(2, 3, 40), p.places, p.values, p.offsets, *tail, "gelu", False)
    p = pack_sparse((weight * 30).to(torch.int8))
    u, params = OPS.quantize_activation(randn(2, 3, 40), None, 32)
    scales = (torch.rand(1, 1, 16), torch.rand(16))
    return (u, params, p.places, p.values, p.offsets, *scales, *tail, 8, 0, 1.0, "gelu", False)


def dense_arguments(gated: bool) -> tuple[Any, ...]:
    rows = 32 if gated else 37
    n = 5 if gated else 37
    return (randn(2, 3, 40), pack_dense(randn(rows, 40)), randn(rows), randn(2, 3, n), n, 40, "gelu", gated)


def conv_arguments() -> tuple[Any, ...]:
    p = packed(4, 3 * 3 * 2, 8, 0)
    return (
        randn(2, 3, 7, 6),
        None,
        p.weight,
        p.scale,
        p.wsum,
        randn(4),
        [3, 2],
        [2, 1],
        [1, 0],
        [1, 1],
        4,
        "relu",
    )


def dequantize_arguments() -> tuple[Any, ...]:
    codes = torch.randint(-8, 8, (5, 40), generator=generator(), dtype=torch.int8)
    return (
        codes,
        torch.rand(5, 2, generator=generator()),
        torch.randint(-8, 8, (5, 2), generator=generator(), dtype=torch.int8),
        32,
    )


def embedding_arguments() -> tuple[Any, ...]:
    codes = torch.randint(-8, 8, (9, 33), generator=generator(), dtype=torch.int8)
    return (
        torch.tensor([[0, 8, -1]]),
        packing.pack_embedding_codes(codes, 4),
        torch.rand(9, 2),
        None,
        33,
        4,
        32,
    )


SAMPLES: dict[str, list[Callable[[], tuple[Any, ...]]]] = {
    "attention": [
        lambda: (
            randn(2, 5, 8, 4),
            randn(2, 6, 4, 4),
            randn(2, 6, 4, 3),
            None,
            4,
            2,
            1,
            2,
            0,
            0.5,
            True,
            0.0,
        ),
        lambda: (
            randn(2, 5, 4, 4),
            randn(2, 6, 2, 4),
            randn(2, 6, 2, 4),
            torch.rand(2, 1, 5, 6, generator=generator()) > 0.5,
            4,
            2,
            0,
            0,
            0,
            0.5,
            False,
            20.0,
        ),
    ],
    "attention_cached": [
        lambda: cached_arguments(8),
        lambda: cached_arguments(4),
        lambda: grouped_cache_arguments(8),
        lambda: grouped_cache_arguments(4),
    ],
    "conv_packed": [conv_arguments],
    "dequantize_cache": [
        lambda: (*OPS.quantize_cache(randn(2, 3, 40), None, 4), 40, 4),
        lambda: (*OPS.quantize_cache(randn(2, 3, 128), None, 4, [], 64), 128, 4, 64),
    ],
    "dequantize_codebook": [
        lambda: dequantize_codebook_arguments(2, 8),
        lambda: dequantize_codebook_arguments(1, 16),
    ],
    "dequantize_coded": [
        lambda: dequantize_coded_arguments("table4", 32),
        lambda: dequantize_coded_arguments("e4m3", 0),
        lambda: dequantize_coded_arguments("nvfp4", 16),
    ],
    "dequantize_outliers": [dequantize_outliers_arguments],
    "dequantize_weight": [dequantize_arguments, dequantize_experts_arguments],
    "embedding_packed": [embedding_arguments],
    "gated": [lambda: (randn(2, 6), randn(2, 6), "silu")],
    "hadamard": [
        lambda: (randn(2, 3, 48), [12, 4], False),
        lambda: (randn(3, 40), [8], True),
        lambda: (randn(2, 5), [], False),
    ],
    "linear_codebook": [
        lambda: codebook_arguments(2, 8),
        lambda: codebook_arguments(3, 8, gated=True),
        lambda: codebook_arguments(1, 16),
    ],
    "linear_fp8": [
        lambda: fp8_arguments("e4m3", 0, static=False),
        lambda: fp8_arguments("e5m2", 64, static=True, gated=True),
        lambda: fp8_arguments("mxfp8_e4m3", 32, static=False),
    ],
    "quantize_activation_fp8": [
        lambda: (randn(2, 3, 40), None, 32),
        lambda: (randn(2, 3, 40), torch.tensor([0.01]), 64, randn(40), randn(40), [8]),
    ],
    "quantize_dequantize_fp8": [
        lambda: (randn(2, 3, 40), None),
        lambda: (randn(2, 3, 40), torch.tensor([0.004])),
    ],
    "linear_coded": [
        lambda: coded_arguments("nf4", 64),
        lambda: coded_arguments("table4", 32, gated=True),
        lambda: coded_arguments("mxfp6_e3m2", 32),
    ],
    "linear_dense": [lambda: dense_arguments(False), lambda: dense_arguments(True)],
    "linear_grouped": [
        lambda: (randn(7, 40), EXPERT, randn(3, 5, 40), randn(3, 5)),
        lambda: (randn(7, 40), EXPERT, randn(3, 5, 40)),
    ],
    "linear_grouped_dense": [grouped_dense_arguments],
    "linear_grouped_packed": [lambda: grouped_arguments(True), lambda: grouped_arguments(True, 8, 0)],
    "linear_grouped_packed_float": [lambda: grouped_arguments(False)],
    "linear_outliers": [lambda: outlier_arguments(True), lambda: outlier_arguments(True, gated=True)],
    "linear_outliers_float": [lambda: outlier_arguments(False)],
    "linear_packed": [
        linear_arguments,
        lambda: linear_arguments(4, 32, True),
        lambda: linear_arguments(8, 64, False, False),
    ],
    "linear_packed_float": [float_arguments],
    "linear_sparse": [lambda: sparse_arguments(True)],
    "linear_sparse_float": [lambda: sparse_arguments(False)],
    "norm": [
        lambda: (randn(2, 3, 8), randn(2, 3, 8), randn(8), randn(8), 1e-5, "layer"),
        lambda: (randn(3, 8), None, None, None, 1e-5, "rms"),
    ],
    "norm_quantize": [
        lambda: (randn(2, 3, 40), randn(2, 3, 40), randn(40), randn(40), None, 1e-5, "layer", 64),
        lambda: (randn(3, 8), None, randn(8), None, torch.tensor([0.02, 100.0]), 1e-5, "rms", 32),
        lambda: (randn(3, 8), None, randn(8), None, None, 1e-5, "rms", 32, randn(8), randn(8), 4),
    ],
    "quantize_activation": [
        lambda: (randn(2, 3, 40), None, 32),
        lambda: (randn(2, 3, 40), torch.tensor([0.02, 128.0]), 64),
        lambda: (randn(2, 3, 40), None, 32, randn(40), randn(40).flip(0), 4),
    ],
    "quantize_cache": [
        lambda: (randn(2, 3, 40), None, 8),
        lambda: (randn(2, 3, 40), randn(40), 4, [8]),
        lambda: (randn(2, 3, 128), None, 4, [], 32),
        lambda: (randn(2, 3, 128), None, 8, [], 64),
    ],
    "quantize_dequantize": [
        lambda: (randn(2, 3, 40), None, "token"),
        lambda: (randn(2, 3, 4), None, "sample"),
        lambda: (randn(2, 3, 4), torch.tensor([0.02, 128.0]), "token"),
        lambda: (randn(2, 3, 40), None, "token", 4),
    ],
    "quantize_linear_packed": [
        lambda: quantizing_arguments(None, None, None),
        lambda: quantizing_arguments(None, randn(40), randn(40).flip(0), 4, [20, 2]),
        lambda: quantizing_arguments(torch.tensor([0.02, 128.0]), None, randn(40), bits=8, group_size=0),
    ],
    "rotary": [
        lambda: (randn(2, 3, 4, 8), randn(1, 3, 1, 6), randn(1, 3, 1, 6), 2, 3, False),
        lambda: (randn(2, 4, 3, 8), randn(1, 1, 3, 8), randn(1, 1, 3, 8), 1, -1, True),
    ],
}


def test_every_operator_has_samples() -> None:
    assert SAMPLES.keys() == OPERATORS.keys()


CASES = [
    pytest.param(name, make, id=f"{name}-{i}")
    for name, makes in SAMPLES.items()
    for i, make in enumerate(makes)
]


@pytest.mark.parametrize(("name", "make"), CASES)
def test_registration_shape_function_and_autograd(name: str, make: Callable[[], tuple[Any, ...]]) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPERATORS[name].overload, make(), test_utils=tests)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_cost_counts_at_least_what_must_be_read(name: str, make: Callable[[], tuple[Any, ...]]) -> None:
    record, given = OPERATORS[name], make()
    cost = record.cost(*given)
    names = [a.name for a in record.overload._schema.arguments]
    if record.packed_argument:
        weight = given[names.index(record.packed_argument)]
        assert cost.weight_bytes >= weight.numel() * weight.element_size()
    assert cost.activation_bytes > 0
    assert cost.operations > 0
    assert operator_of(record.overload) is record


def floats_of(given: tuple[Any, ...]) -> list[int]:
    return [i for i, v in enumerate(given) if isinstance(v, Tensor) and v.dtype == torch.float32]


@pytest.mark.parametrize(
    "name",
    [
        "attention",
        "attention_cached",
        "dequantize_cache",
        "dequantize_codebook",
        "dequantize_coded",
        "dequantize_outliers",
        "dequantize_weight",
        "gated",
        "hadamard",
        "linear_codebook",
        "linear_coded",
        "linear_dense",
        "linear_grouped",
        "linear_grouped_dense",
        "linear_grouped_packed_float",
        "linear_outliers_float",
        "linear_packed_float",
        "linear_sparse_float",
        "norm",
        "rotary",
    ],
)
def test_gradients_are_those_of_the_reference(name: str) -> None:
    record = OPERATORS[name]
    for make in SAMPLES[name]:
        results = []
        for call in (record.overload, record.reference):
            given = list(make())
            at = floats_of(tuple(given))
            for i in at:
                given[i] = given[i].double().requires_grad_()
            out = call(*given)
            out = out if isinstance(out, tuple) else (out,)
            loss = sum(
                (o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).reshape(o.shape)).sum() for o in out
            )
            results.append(torch.autograd.grad(loss, [given[i] for i in at], allow_unused=True))
        for got, expected in zip(*results, strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
        assert any(g is not None and g.abs().sum() > 0 for g in results[0])


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_dequantize_has_a_straight_through_gradient_that_stops_at_the_range(bits: int) -> None:
    x = torch.tensor([[-3.0, -0.4, 0.1, 0.9, 5.0]], requires_grad=True)
    params = torch.tensor([2.55 / levels(bits), 100 // (255 / levels(bits))])  # about [-1, 1.55]
    OPS.quantize_dequantize(x, params, "token", bits).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("bits", [8, 4])
def test_dynamic_quantize_dequantize_passes_the_gradient_of_all_but_what_half_a_step_cuts_off(
    bits: int,
) -> None:
    x = randn(20, 64).requires_grad_()
    weight = randn(20, 64).flip(0)
    y = OPS.quantize_dequantize(x, None, "token", bits)
    (y * weight).sum().backward()
    inside = x.grad == weight
    # The zero point is a whole number, so that one end of a row's range may lie inside by half a step.
    assert torch.equal(x.grad[~inside], torch.zeros_like(x.grad[~inside]))
    assert (inside.sum(1) >= 62).all()
    assert not torch.equal(x, y)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_dynamic_quantization_is_within_half_a_step_and_keeps_zero(granularity: str, bits: int) -> None:
    x = randn(4, 6, 50) * torch.logspace(-3, 3, 4)[:, None, None]
    x[..., 7] = 0
    y = OPS.quantize_dequantize(x, None, granularity, bits)
    dims = (-1,) if granularity == "token" else (1, 2)
    step = (x.amax(dims, keepdim=True) - x.amin(dims, keepdim=True)) / levels(bits)
    # Both ends may move by half a step more, as the zero point is a whole number.
    assert ((y - x).abs() <= step * 1.001).all()
    assert ((y - x).abs().mean() <= 0.3 * step.mean()).all()
    assert not y[..., 7].any()


def test_constant_and_zero_rows_survive() -> None:
    x = torch.stack([torch.zeros(8), torch.full((8,), 3.0), torch.full((8,), -2.5)])
    y = OPS.quantize_dequantize(x, None, "token")
    assert torch.allclose(y, x, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("shift", [None, randn(45).abs()])
@pytest.mark.parametrize("scale", [None, randn(45).flip(0)])
def test_codes_of_quantize_activation_are_those_of_quantize_dequantize_of_the_transformed_input(
    bits: int, static: bool, shift: Tensor | None, scale: Tensor | None
) -> None:
    x = randn(3, 4, 45)
    params = torch.tensor([3.3 / levels(bits), levels(bits) // 2]) if static else None
    u, pair = OPS.quantize_activation(x, params, 32, shift, scale, bits)
    assert list(u.shape) == [3, 4, 64]
    assert not u[..., 45:].any()
    assert int(u.max()) == levels(bits)
    again = pair[..., :1] * (u[..., :45].float() - pair[..., 1:])
    moved = x if shift is None else x - shift
    moved = moved if scale is None else moved * scale
    assert torch.equal(again, OPS.quantize_dequantize(moved, params, "token", bits))
    weight, bias = randn(45), randn(45).flip(0)
    y = OPS.norm(x, None, weight, bias, 1e-5, "layer")[1]
    fused = OPS.norm_quantize(x, None, weight, bias, params, 1e-5, "layer", 32, shift, scale, bits)
    expected = (y, *OPS.quantize_activation(y, params, 32, shift, scale, bits))
    assert all(torch.equal(a, b) for a, b in zip(fused[1:], expected, strict=True))


@pytest.mark.parametrize("make", SAMPLES["quantize_linear_packed"])
def test_quantize_linear_packed_is_the_composition(make: Callable[[], tuple[Any, ...]]) -> None:
    """Bit for bit, and with the gradients of the two operators."""
    given = make()
    x, params, shift, scale, *linear = given
    linear, rest = linear[:13], linear[13:]
    group_size = linear[9]
    results = []
    for fused in (True, False):
        source = x.clone().requires_grad_()
        if fused:
            y = OPS.quantize_linear_packed(source, *given[1:])
        else:
            align = packing.alignment(group_size)
            u, pair = OPS.quantize_activation(source, params, align, shift, scale, *rest)
            y = OPS.linear_packed(u, pair, *linear)
        (gradient,) = torch.autograd.grad(y.square().sum(), [source], allow_unused=True)
        results.append((y, gradient))
    assert torch.equal(results[0][0], results[1][0])
    first, second = results[0][1], results[1][1]
    assert (first is None) == (second is None)
    if first is not None:
        assert torch.allclose(first, second)


def test_other_widths_are_refused() -> None:
    for call in (
        lambda: OPS.quantize_dequantize(randn(2, 3), None, "token", 3),
        lambda: OPS.quantize_activation(randn(2, 3), None, 32, None, None, 16),
    ):
        with pytest.raises(InputError, match=r"4 \| 8"):
            call()


@pytest.mark.parametrize(
    ("bits", "group_size", "zeros"), [(8, 0, False), (4, 32, False), (4, 32, True), (8, 64, True)]
)
def test_linear_packed_is_the_integer_formula_of_the_documentation(
    bits: int, group_size: int, zeros: bool
) -> None:
    n, k = 5, 100
    p = packed(n, k, bits, group_size, zeros)
    u, params = OPS.quantize_activation(randn(3, k), None, packing.alignment(group_size))
    bias, residual = randn(n), randn(3, n)
    got = OPERATORS["linear_packed"].reference(
        u, params.double(), p.weight, p.scale.double(), p.zero, p.wsum.double(), bias.double(), residual.double(),
        n, k, bits, group_size, p.scale_multiplier, "none", False,
    )  # fmt: skip
    w = packing.unpack_codes(p.weight, n, k, bits).long()
    groups = -(-k // group_size) if group_size else 1
    scale = packing.unpack_groups(p.scale, n, k, group_size).double() * p.scale_multiplier
    zero = torch.zeros(n, groups, dtype=torch.long)
    if p.zero is not None:
        zero = packing.unpack_groups(p.zero, n, k, group_size).long()
    size = group_size or k
    expected = torch.empty(3, n, dtype=torch.float64)
    for m in range(3):
        s, z = params[m].double()
        for row in range(n):
            total = torch.tensor(0.0, dtype=torch.float64)
            for g in range(groups):
                part = slice(g * size, min((g + 1) * size, k))
                codes = u[m, part].long()
                total += scale[row, g] * float((codes * w[row, part]).sum() - zero[row, g] * codes.sum())
            expected[m, row] = s * (total - z * p.wsum[row].double()) + bias[row] + residual[m, row]
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_grouped_linears_are_the_linears_of_each_expert() -> None:
    """Row by row the operator for one matrix, 0 where there is no expert, packed or not."""
    for name, given, single in (
        ("linear_grouped_packed", grouped_arguments(True), "linear_packed"),
        ("linear_grouped_packed_float", grouped_arguments(False), "linear_packed_float"),
        ("linear_grouped_dense", grouped_dense_arguments(), "linear_dense"),
    ):
        names = [a.name for a in OPERATORS[name].overload._schema.arguments]
        a = dict(zip(names, given, strict=True))
        got = OPERATORS[name].overload(*given)
        for row, e in enumerate(EXPERT.tolist()):
            if not 0 <= e < 3:
                assert not got[row].any()
                continue
            own = {n: v[e] for n, v in a.items() if n in ("weight", "scale", "zero", "wsum", "bias")}
            rows = {n: a[n][row : row + 1] for n in ("x", "u", "params") if n in a}
            rest = {"residual": None, "activation": "none", "gated": False}
            every = {**a, **own, **rows, **rest}
            wanted = [every[d.name] for d in OPERATORS[single].overload._schema.arguments]
            torch.testing.assert_close(got[row : row + 1], OPERATORS[single].overload(*wanted))
    x, expert, weight, bias = SAMPLES["linear_grouped"][0]()
    found = OPS.linear_grouped(x, expert, weight, bias)
    torch.testing.assert_close(found[0], weight[2] @ x[0] + bias[2])
    assert not found[EXPERT.lt(0) | EXPERT.gt(2)].any()


def test_gated_linear_is_activation_of_gate_times_up() -> None:
    n, k = 21, 40
    gate, up, bias = randn(n, k), randn(n, k).flip(0), randn(2 * n)
    codes = [torch.round(half * 20).clamp(-127, 127).to(torch.int8) for half in (gate, up)]
    scale = torch.full((n, 1), 0.05)
    rows = packing.interleave_gated(*codes)
    scales = packing.interleave_gated(scale, scale)
    p = packing.pack_linear(rows, scales, None, 8, 0)
    biases = packing.interleave_gated(bias[:n], bias[n:])
    x = randn(3, k)
    y = OPS.linear_packed_float(x, p.weight, p.scale, None, biases, None, n, k, 8, 0, 1.0, "silu", True)
    expected = F.silu(F.linear(x, codes[0] * scale, bias[:n])) * F.linear(x, codes[1] * scale, bias[n:])
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_conv_packed_is_the_convolution_of_the_rounded_input() -> None:
    given = conv_arguments()
    x, _, weight, scale, _, bias, kernel, stride, padding, dilation, n, _ = given
    matrix = packing.unpack_weight(weight, scale, None, n, 18, 8, 0, 1.0, torch.float32).reshape(
        n, 3, *kernel
    )
    rounded = OPS.quantize_dequantize(x, None, "sample")
    expected = F.relu(F.conv2d(rounded, matrix, bias, stride, padding, dilation))
    assert torch.allclose(OPS.conv_packed(*given), expected, atol=1e-5)


def test_attention_is_scaled_dot_product_attention() -> None:
    q, k, v = randn(2, 5, 4, 8), randn(2, 7, 2, 8), randn(2, 7, 2, 8)
    mask = torch.rand(2, 1, 5, 7, generator=generator()) > 0.4
    mask[1, 0, 2] = False
    for causal, seen in ((False, mask), (True, None), (False, torch.where(mask, 0.0, -1e4))):
        got = OPS.attention(q, k, v, seen, 4, 2, 0, 0, 0, 0.3, causal, 0.0)
        expected = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            seen,
            is_causal=causal,
            scale=0.3,
            enable_gqa=True,
        ).transpose(1, 2)
        if seen is mask:
            expected = expected.nan_to_num()
        assert torch.allclose(got, expected, atol=1e-5)
    assert not OPS.attention(q, k, v, mask, 4, 2, 0, 0, 0, 0.3, False, 0.0)[1, 2].any()


def test_norms_are_those_of_torch() -> None:
    x, r, w, b = randn(2, 3, 16), randn(2, 3, 16).flip(-1), randn(16), randn(16).flip(0)
    total, y = OPS.norm(x, r, w, b, 1e-5, "layer")
    assert torch.allclose(y, F.layer_norm(x + r, (16,), w, b, 1e-5), atol=1e-5)
    assert torch.equal(total, x + r)
    assert torch.allclose(
        OPS.norm(x, None, w, None, 1e-6, "rms")[1], F.rms_norm(x, (16,), w, 1e-6), atol=1e-5
    )


def test_embedding_packed_refuses_ids_outside_the_table() -> None:
    given = list(embedding_arguments())
    table = packing.dequantize(packing.unpack_embedding_codes(given[1], 33, 4), given[2], None, 32)
    assert torch.equal(OPS.embedding_packed(*given), table[[0, 8, 8]][None])
    for bad in (9, -10):
        given[0] = torch.tensor([bad])
        with pytest.raises((IndexError, RuntimeError)):
            OPS.embedding_packed(*given)
