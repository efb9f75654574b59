"""An einsum is a linear, a product of matrices or a permutation, or it is refused with what stands in the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

LINEARS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "heads out": ("bsk,hdk->bhsd", (2, 3, 8), (4, 2, 8)),
    "heads in": ("bshd,hdn->bsn", (2, 3, 4, 2), (4, 2, 6)),
    "heads on both sides, dots": ("...gc,hdgc->...hd", (2, 3, 4, 2), (3, 5, 4, 2)),
    "no arrow": ("bsk,kn", (2, 3, 8), (8, 6)),
    "rows between": ("bkt,nk->bnt", (2, 8, 3), (6, 8)),
    "to one number": ("bsk,k->bs", (2, 3, 8), (8,)),
}


@pytest.mark.parametrize("case", LINEARS)
@pytest.mark.parametrize("constant_first", [False, True])
def test_with_a_constant(case: str, constant_first: bool, canonical: Any, of: Any) -> None:
    equation, x, w = LINEARS[case]
    if constant_first and "->" in equation:
        left, right = equation.split("->")
        equation = ",".join(reversed(left.split(","))) + "->" + right
        found = canonical(of(lambda x, w: torch.einsum(equation, w, x), w=torch.randn(w)), torch.randn(x))
    else:
        found = canonical(of(lambda x, w: torch.einsum(equation, x, w), w=torch.randn(w)), torch.randn(x))
    assert found.text.count("linear(") == 1
    assert "einsum" not in found.text
    assert "matmul" not in found.text


PRODUCTS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "scores": ("bqhd,bkhd->bhqk", (2, 3, 4, 5), (2, 6, 4, 5)),
    "values": ("bhqk,bkhd->bqhd", (2, 4, 3, 6), (2, 6, 4, 5)),
    "grouped": ("bsgrd,btgd->bgrst", (2, 3, 2, 4, 5), (2, 6, 2, 5)),
    "two contracted": ("abcd,aecd->be", (2, 3, 4, 5), (2, 6, 4, 5)),
    "dots": ("...ij,...kj->...ki", (2, 3, 4), (2, 5, 4)),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_of_two_activations(case: str, canonical: Any, of: Any) -> None:
    equation, x, y = PRODUCTS[case]
    free = ({0: Dim("batch", max=64)}, {0: Dim("batch", max=64)})
    shapes = None if case == "two contracted" else (free,)
    found = canonical(
        of(lambda x, y: torch.einsum(equation, x, y)), torch.randn(x), torch.randn(y), dynamic_shapes=shapes
    )
    assert found.text.count("matmul(") == 1
    assert "einsum" not in found.text


def test_a_view_of_a_stored_matrix_is_that_matrix(canonical: Any, of: Any) -> None:
    def tied(x: Tensor, w: Tensor) -> Tensor:
        heads = torch.einsum("bsk,hdk->bshd", x, w.view(4, 2, 6)).flatten(-2)
        return torch.einsum("bsn,nk->bsk", heads, w)

    found = canonical(of(tied, w=torch.randn(8, 6)), torch.randn(2, 3, 6))
    assert found.text.count("linear(") == 2
    assert "linear(inputs_0, c[8,6])" in found.text
    assert "c[6,8]" in found.text


def test_of_one_factor(canonical: Any, of: Any) -> None:
    found = canonical(of(lambda x: torch.einsum("bij->jbi", x)), torch.randn(2, 3, 4))
    assert found.text == "%0 = permute(inputs_0, [2, 0, 1])\nreturn [%0]"


REFUSED: dict[str, tuple[str, tuple[tuple[int, ...], ...], str]] = {
    "diagonal": ("bii,ij->bj", ((2, 3, 3), (3, 4)), "a letter occurs twice in one factor: a diagonal"),
    "summed": ("bij,jk->bk", ((2, 3, 4), (4, 5)), "i is summed in one factor"),
    "trace": ("bi->b", ((2, 3),), "i is summed in one factor"),
    "outer": ("bi,bi->bi", ((2, 3), (2, 3)), "nothing is contracted"),
    "three": ("bi,ij,jk->bk", ((2, 3), (3, 4), (4, 5)), "it has more than two factors"),
    "broadcast": ("bi,bij->bj", ((1, 3), (2, 3, 4)), "the sizes of b differ: a broadcast"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_product(case: str, canonical: Any, of: Any) -> None:
    equation, shapes, reason = REFUSED[case]
    found = canonical(of(lambda *xs: torch.einsum(equation, *xs)), *(torch.randn(s) for s in shapes))
    assert found.refused == [f"einsum {equation}: {reason}"]
    assert "einsum" in found.text
