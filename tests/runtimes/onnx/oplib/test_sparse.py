"""SparseLinear and SparseLinearFloat: threads, instruction sets, several sessions, errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from isofold.compiler.dialect import OPERATORS
from isofold.compiler.dialect.packing import pack_linear, storable_scale
from isofold.compiler.dialect.sparse_packing import pack_sparse

Check = Callable[..., None]
WEIGHTS = ("places", "values", "offsets", "scale", "wsum", "bias")
FORMS = (
    ("bitmask", "float32"), ("bitmask", "bfloat16"), ("16x1", "float32"), ("bitmask", "int8"), ("bitmask", "int4"),
    ("panels", "int4"), ("windows", "int8"), ("2:4", "int8"), ("1x4", "int8"), ("16x4", "int8"),
)  # fmt: skip
"""Layouts and values; every kernel family once."""

forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))


def sparse_arguments(rows: int, n: int, k: int, density: float, form: tuple[str, str]) -> list[Any]:
    layout, value = form
    generator = torch.Generator().manual_seed(rows)
    there = torch.rand(n, k, generator=generator) < density
    if layout == "2:4":
        there[:, 2::4] = there[:, 3::4] = False
    x = torch.randn(rows, k, generator=generator)
    bias, residual = torch.randn(n, generator=generator), torch.randn(rows, n, generator=generator)
    if not value.startswith("int"):
        matrix = (torch.randn(n, k, generator=generator) * there).to(getattr(torch, value))
        p = pack_sparse(matrix, layout)
        return [x, p.places, p.values, p.offsets, bias, residual, n, k, layout, "gelu", False]
    bits, group = int(value[3:]), 32 if value == "int4" else 0
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    codes = torch.randint(low, high, (n, k), generator=generator, dtype=torch.int8) * there
    scale, _ = storable_scale(
        torch.rand(n, -(-k // group) if group else 1, generator=generator) * 0.02, group
    )
    dense = pack_linear(codes, scale, None, bits, group)
    p = pack_sparse(codes, layout, bits)
    u, params = OPERATORS["quantize_activation"].reference(x, None, 32)
    weights = [p.places, p.values, p.offsets, dense.scale, dense.wsum, bias, residual]
    return [u, params, *weights, n, k, layout, bits, group, dense.scale_multiplier, "gelu", False]


def name_of(form: tuple[str, str]) -> str:
    return "linear_sparse" if form[1].startswith("int") else "linear_sparse_float"


@forms
@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_threads(check: Check, form: tuple[str, str], threads: int, rows: int) -> None:
    arguments = sparse_arguments(rows, 300, 1100, 0.2, form)
    check(name_of(form), arguments, constants=WEIGHTS, threads=threads)


@forms
def test_no_rows_and_a_wider_input(
    run_operator: Callable[..., list[Tensor]], check: Check, form: tuple[str, str]
) -> None:
    none = sparse_arguments(0, 48, 64, 0.5, form)
    assert run_operator(name_of(form), none, constants=WEIGHTS)[0].shape == (0, 48)
    if form[1].startswith("int"):
        arguments = sparse_arguments(3, 40, 100, 0.3, form)
        arguments[0] = torch.nn.functional.pad(arguments[0], (0, 64))
        check("linear_sparse", arguments, constants=WEIGHTS)


def test_several_sessions_at_once(check: Check) -> None:
    failures: list[BaseException] = []

    def work(form: tuple[str, str]) -> None:
        try:
            arguments = sparse_arguments(20, 100, 300, 0.2, form)
            for _ in range(3):
                check(name_of(form), arguments, constants=WEIGHTS, threads=2)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(form,)) for form in FORMS]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


BITMASK, BLOCKS, WINDOWS = ("bitmask", "float32"), ("16x1", "float32"), ("windows", "int8")


@pytest.mark.parametrize(
    ("form", "changed", "message"),
    [
        (BITMASK, {1: lambda t: t[:, :8]}, r"places.*expected uint8 \[48, 16\], got uint8 \[48, 8\]"),
        (BITMASK, {2: lambda t: t[:64]}, r"values.*64 more than the last offset"),
        (BITMASK, {3: lambda t: t[:-1]}, r"offsets.*expected int32 \[49\], got int32 \[48\]"),
        (BITMASK, {3: lambda t: t.flip(0)}, r"offsets.*begin with 0 and do not fall"),
        (BITMASK, {0: lambda t: t[:, :100]}, r"x.*100"),
        (BITMASK, {8: lambda _: "2:4"}, "expected bitmask or 16x1"),
        (BLOCKS, {1: lambda t: (t.to(torch.int32) + 128).to(torch.uint16)}, r"places.*columns below 128"),
        (BLOCKS, {2: lambda t: t[:-9]}, r"values.*expected float32"),
        (WINDOWS, {2: lambda t: t[:48]}, r"places.*expected uint8 \[at least"),
        (WINDOWS, {12: lambda _: 4}, "expected 8 bits"),
        (WINDOWS, {11: lambda _: "3:4"}, "layout"),
    ],
)
def test_wrong_inputs_are_named(
    run_operator: Callable[..., list[Tensor]],
    form: tuple[str, str],
    changed: dict[int, Callable[[Any], Any]],
    message: str,
) -> None:
    arguments = sparse_arguments(2, 40, 128, 0.5, form)
    for position, change in changed.items():
        made = change(arguments[position])
        arguments[position] = made.contiguous() if isinstance(made, Tensor) else made
    with pytest.raises(Exception, match=message):
        run_operator(name_of(form), arguments)
