"""OutlierLinear and OutlierLinearFloat: threads, instruction sets, several sessions, many rows, errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from isofold.compiler.dialect import OPERATORS
from isofold.compiler.dialect.packing import ceil_to

from ..operator_cases import linear, with_outliers

Check = Callable[..., None]
Run = Callable[..., list[Tensor]]
WEIGHTS = ("weight", "scale", "zero", "wsum", "bias", "places", "values", "offsets")
FORMATS = [(8, 0, True), (4, 0, False), (4, 32, False), (3, 32, True), (2, 128, True)]


def arguments_of(
    bits: int, group: int, zero: bool, floating: bool, rows: int, n: int, k: int
) -> tuple[str, list[Any]]:
    """The operator and its arguments, with bias, residual and an activation."""
    g = torch.Generator().manual_seed(rows)
    dense = linear(n, n, k, bits, group, zero, True, True, "gelu", False, False)
    _, _, given = with_outliers(dense, max(k // 60, 1))
    kp = ceil_to(k, max(32, group))
    params = torch.rand(rows, 2, generator=g) * 0.1
    params[:, 1] = torch.randint(0, 256, (rows,), generator=g)
    u = torch.randint(0, 256, (rows, kp), generator=g).to(torch.uint8)
    u[:, k:] = 0
    given |= {"residual": torch.randn(rows, n, generator=g), "x": torch.randn(rows, k, generator=g), "u": u}
    given |= {"params": params}
    name = "linear_outliers_float" if floating else "linear_outliers"
    return name, [given[a.name] for a in OPERATORS[name].overload._schema.arguments]


@pytest.mark.parametrize(("bits", "group", "zero"), FORMATS)
@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("rows", [1, 3, 20, 200])
def test_threads(
    check: Check, bits: int, group: int, zero: bool, floating: bool, threads: int, rows: int
) -> None:
    operator, arguments = arguments_of(bits, group, zero, floating, rows, 300, 1100)
    check(operator, arguments, constants=WEIGHTS, threads=threads)


@pytest.mark.parametrize("floating", [False, True])
def test_no_rows_and_weights_that_are_not_constant(run_operator: Run, check: Check, floating: bool) -> None:
    operator, arguments = arguments_of(4, 32, False, floating, 0, 48, 64)
    assert run_operator(operator, arguments, constants=WEIGHTS)[0].shape == (0, 48)
    operator, arguments = arguments_of(4, 32, True, floating, 4, 33, 45)
    check(operator, arguments)


def test_several_sessions_at_once(check: Check) -> None:
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            operator, arguments = arguments_of(4, 32, False, seed % 2 == 0, 1 + 7 * seed, 200, 520)
            for _ in range(5):
                check(operator, arguments, constants=WEIGHTS, threads=2)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def _places(change: Callable[[Tensor], None]) -> Callable[[Tensor], Tensor]:
    def changed(places: Tensor) -> Tensor:
        moved = places.int()
        change(moved)
        return moved.to(torch.uint16)

    return changed


WRONG: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    (
        "places",
        _places(lambda p: p[1].fill_(256)),
        r"\(places\): expected ascending places below 256 along each row, got 256",
    ),
    (
        "places",
        _places(lambda p: p[0].fill_(255)),
        r"\(places\): expected ascending places below 256 along each row",
    ),
    ("places", lambda p: p[:, :8], r"\(places\): expected uint16 \[\d+, 16\]"),
    ("values", lambda v: v[:1], r"\(values\): expected float16 \[\d+, 16\], got float16 \[1, 16\]"),
    ("offsets", lambda o: o[:-1], r"\(offsets\): expected int32 \[4\], got int32 \[3\]"),
    ("offsets", lambda o: o + 1, r"\(offsets\): expected offsets from 0 to"),
    ("offsets", lambda o: o[[0, 2, 1, 3]], r"\(offsets\): expected ascending offsets"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG)
@pytest.mark.parametrize("floating", [False, True])
def test_wrong_inputs_are_named(
    run_operator: Run, floating: bool, name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    operator, arguments = arguments_of(4, 32, False, floating, 2, 40, 256)
    index = [a.name for a in OPERATORS[operator].overload._schema.arguments].index(name)
    arguments[index] = change(arguments[index])
    with pytest.raises(Exception, match=message):
        run_operator(operator, arguments, constants=WEIGHTS)
