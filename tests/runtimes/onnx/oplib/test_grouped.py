"""Grouped linears: every way in which rows can lie to their experts, few and many rows, packed formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ..operator_cases import grouped

ORDERS: dict[str, Callable[[torch.Generator, int], torch.Tensor]] = {
    "sorted": lambda g, m: torch.randint(0, 4, (m,), generator=g).sort().values,
    "mixed": lambda g, m: torch.randint(-1, 5, (m,), generator=g),
    "one": lambda g, m: torch.full((m,), 2),
    "none": lambda g, m: torch.full((m,), 4),
    "huge": lambda g, m: torch.full((m,), -(2**62)),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [1, 9, 300])
@pytest.mark.parametrize(
    ("bits", "group", "zero"), [(4, 32, True), (4, 64, False), (8, 0, True), (2, 32, True)]
)
def test_orders_of_rows(
    order: str, rows: int, bits: int, group: int, zero: bool, check: Callable[..., None]
) -> None:
    _, _, arguments = grouped(3, 40, 70, bits, group, zero, rows % 2 == 1, rows=rows)
    expert = ORDERS[order](torch.Generator().manual_seed(1), rows)
    given: list[Any] = list({**arguments, "expert": expert}.values())
    check("linear_grouped_packed", given, tolerance=2e-5, threads=2)


def test_rows_do_not_depend_on_the_rows_beside_them(run_operator: Callable[..., list[torch.Tensor]]) -> None:
    """In int8 sums are exact: the same bits alone and among others, on one thread and on two."""
    _, _, arguments = grouped(5, 48, 96, 8, 0, False, True, rows=40)
    (together,) = run_operator("linear_grouped_packed", list(arguments.values()), threads=2)
    for row in (0, 7, 39):
        own = {n: arguments[n][row : row + 1] for n in ("u", "params", "expert")}
        (alone,) = run_operator("linear_grouped_packed", list({**arguments, **own}.values()))
        assert torch.equal(alone[0], together[row])
