"""Rotary embedding: half-split, interleaved, partial; the halves must be proved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

SHAPE = (2, 3, 5, 8)
TABLE = (1, 1, 5, 8)


def halves_by_slices(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def halves_by_chunk(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], -1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def pairs_reshaped(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).reshape(x.shape)


def embed(turn: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, cos, sin: x * cos + turn(x) * sin


@pytest.mark.parametrize(
    ("turn", "interleaved"),
    [(halves_by_slices, False), (halves_by_chunk, False), (pairs, True), (pairs_reshaped, True)],
)
def test_one_spelling(turn: Callable[[Tensor], Tensor], interleaved: bool, canonical: Any, of: Any) -> None:
    found = canonical(of(embed(turn)), torch.randn(SHAPE), torch.randn(TABLE), torch.randn(TABLE))
    assert (
        found.text == f"%0 = isofold.rotary(inputs_0, inputs_1, inputs_2, 1, -1, {interleaved})\nreturn [%0]"
    )


def test_sum_and_products_commute(canonical: Any, of: Any) -> None:
    def swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return sin * halves_by_slices(x) + cos * x

    found = canonical(of(swapped), torch.randn(SHAPE), torch.randn(TABLE), torch.randn(TABLE))
    assert found.text.startswith("%0 = isofold.rotary(inputs_0, inputs_1, inputs_2, 1, -1, False)")


def test_heads_behind_the_sequence(canonical: Any, of: Any) -> None:
    tables = torch.randn(2, 1, 5, 1, 8)
    found = canonical(of(embed(halves_by_slices)), torch.randn(2, 5, 3, 8), *tables)
    assert found.text.startswith("%0 = isofold.rotary(inputs_0, inputs_1, inputs_2, 2, -1, False)")


def test_tables_of_two_dimensions_are_unsqueezed(canonical: Any, of: Any) -> None:
    found = canonical(of(embed(halves_by_slices)), torch.randn(SHAPE), torch.randn(5, 8), torch.randn(5, 8))
    assert found.text.count("unsqueeze") == 4
    assert "isofold.rotary(inputs_0, %2, %3, 1, -1, False)" in found.text


def test_a_part_of_each_head(canonical: Any, of: Any) -> None:
    def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, passed = x[..., :4], x[..., 4:]
        return torch.cat((turned * cos + halves_by_slices(turned) * sin, passed), dim=-1)

    found = canonical(of(partial), torch.randn(SHAPE), *torch.randn(2, 1, 1, 5, 4))
    assert found.text == "%0 = isofold.rotary(inputs_0, inputs_1, inputs_2, 1, -1, False)\nreturn [%0]"


def _uneven(x: Tensor) -> Tensor:
    return torch.cat((-x[..., 3:], x[..., :3]), dim=-1)


def _not_negated(x: Tensor) -> Tensor:
    return torch.cat((x[..., 4:], x[..., :4]), dim=-1)


def _wrong_half_negated(x: Tensor) -> Tensor:
    return torch.cat((x[..., 4:], -x[..., :4]), dim=-1)


def _other_dimension(x: Tensor) -> Tensor:
    return torch.cat((-x[:, :, 3:], x[:, :, :3]), dim=2)


@pytest.mark.parametrize("turn", [_uneven, _not_negated, _wrong_half_negated])
def test_other_turns_are_no_rotary(turn: Callable[[Tensor], Tensor], canonical: Any, of: Any) -> None:
    found = canonical(of(embed(turn)), torch.randn(SHAPE), torch.randn(TABLE), torch.randn(TABLE))
    assert "rotary" not in found.text


def test_halves_of_another_dimension_are_no_rotary(canonical: Any, of: Any) -> None:
    found = canonical(of(embed(_other_dimension)), torch.randn(2, 3, 6, 8), *torch.randn(2, 1, 1, 6, 8))
    assert "rotary" not in found.text


def test_refusals(canonical: Any, of: Any) -> None:
    flat = canonical(of(embed(halves_by_slices)), torch.randn(6, 5, 8), *torch.randn(2, 1, 5, 8))
    assert flat.refused == ["the value has 3 dimensions, rotary embedding takes four"]
    per_head = canonical(of(embed(halves_by_slices)), torch.randn(SHAPE), *torch.randn(2, 1, 3, 5, 8))
    assert per_head.refused == [
        "the tables [(1, 3, 5, 8), (1, 3, 5, 8)] do not broadcast over heads at the width 8"
    ]
    other = canonical(
        of(lambda x, y, cos, sin: y * cos + halves_by_slices(x) * sin),
        torch.randn(SHAPE),
        torch.randn(SHAPE),
        *torch.randn(2, *TABLE),
    )
    assert other.refused == ["a half-turned value is added to something else than the value times a table"]
    assert "rotary" not in flat.text + per_head.text + other.text


def _parts(interleaved: bool, x: Tensor) -> tuple[Tensor, ...]:
    if not interleaved:
        return x.chunk(2, dim=-1)
    return x.reshape(*x.shape[:-1], -1, 2).unbind(-1)


def _join(interleaved: bool, a: Tensor, b: Tensor) -> Tensor:
    return torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_part_by_part_with_tables_of_half_the_width(interleaved: bool, canonical: Any, of: Any) -> None:
    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = _parts(interleaved, x)
        return _join(interleaved, a * cos - b * sin, sin * a + b * cos)

    found = canonical(of(turned), torch.randn(SHAPE), *torch.randn(2, 1, 1, 5, 4))
    last = found.text.splitlines()[-2]
    assert "isofold.rotary(inputs_0, " in last
    assert last.endswith(f", 1, -1, {interleaved})")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("wrong", ["sign", "tables", "sources"])
def test_other_sums_of_parts_are_no_rotary(interleaved: bool, wrong: str, canonical: Any, of: Any) -> None:
    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = _parts(interleaved, x)
        if wrong == "sign":
            return _join(interleaved, a * cos + b * sin, a * sin + b * cos)
        if wrong == "tables":
            return _join(interleaved, a * cos - b * sin, a * cos + b * sin)
        return _join(interleaved, a * cos - a * sin, a * sin + b * cos)

    found = canonical(of(turned), torch.randn(SHAPE), *torch.randn(2, 1, 1, 5, 4))
    assert "rotary" not in found.text
