"""Dimensions as products and sums of atoms, and their unification."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from isofold.compiler.spaces.analysis import blocks_of_dims
from isofold.compiler.spaces.atoms import (
    Group,
    Reason,
    cut_out,
    direct_sum,
    find,
    flatten,
    flipped,
    leaves,
    meet,
    new,
    restrict,
    segments,
    size_of,
    unify,
)

WHY = Reason(Group.NONE, "sizes do not fit")
sizes = st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=4)


def product(factors: list[int]) -> tuple:
    return tuple(ref for size in factors for ref in new(size))


@given(sizes)
def test_a_view_splits_an_atom_into_its_factors(factors: list[int]) -> None:
    total = size_of(product(factors))
    whole, parts = new(total), product(factors)
    unify(whole, parts, WHY)
    assert [a.size for a, _ in flatten(whole)] == factors
    assert flatten(whole) == flatten(parts)
    assert all(a.group == Group.GENERAL for a, _ in leaves(whole))


@given(sizes, st.data())
def test_unifying_is_symmetric_and_keeps_sizes(factors: list[int], data: st.DataObject) -> None:
    other = data.draw(st.permutations(factors))
    left, right = product(factors), product(list(other))
    unify(left, right, WHY)
    assert size_of(flatten(left)) == size_of(flatten(right))
    free = [a for a, _ in leaves(left) if a.group != Group.NONE]
    assert free == [a for a, _ in leaves(right) if a.group != Group.NONE]


def test_sizes_that_do_not_divide_are_pinned_on_both_sides() -> None:
    left, right = product([2, 3]), product([3, 2])
    unify(left, right, WHY)
    assert {a.group for a, _ in (*leaves(left), *leaves(right))} == {Group.NONE}


@given(st.integers(1, 11), st.integers(1, 11))
def test_slices_cut_and_meet_again(a: int, b: int) -> None:
    start, end = sorted((a, b))
    whole = new(12)
    if start == end:
        return
    part = cut_out(whole, start, end)
    assert part is not None
    assert size_of(part) == end - start
    assert sum(size_of(s) for s in segments(whole)) == 12
    assert cut_out(whole, start, end) == part


def test_a_concatenation_of_slices_is_the_whole_again() -> None:
    whole, again = new(12), None
    parts = [cut_out(whole, i, i + 4) or () for i in (0, 4, 8)]
    again = direct_sum(parts)
    unify(whole, again, WHY)
    assert all(atom.group == Group.GENERAL for atom, _ in leaves(whole))
    assert [a for a, _ in leaves(whole) if a.size > 1] == [a for a, _ in leaves(again) if a.size > 1]


def test_parts_of_a_sum_are_told_apart_when_their_channels_are_tied() -> None:
    whole = new(12)
    first, second = cut_out(whole, 0, 6), cut_out(whole, 6, 12)
    unify(first, second, WHY)
    blocks = blocks_of_dims([whole])
    assert len(blocks) == 2
    assert [b for b in blocks if {a for a, _ in flatten(second or ())} == b] == blocks[1:]
    assert len({a for block in blocks for a in block if a.size > 1}) == 1


def test_a_cut_inside_a_product_is_refused() -> None:
    whole = new(12)
    unify(whole, product([3, 4]), WHY)
    assert cut_out(whole, 0, 6) is None
    assert cut_out(whole, 0, 8) is not None


def test_pieces_keep_the_restriction_but_pairs_do_not_survive_a_cut() -> None:
    for group, left in ((Group.ORTHOGONAL, Group.ORTHOGONAL), (Group.PAIR, Group.NONE)):
        whole = new(12)
        restrict(whole, Reason(group, "why"))
        part = cut_out(whole, 0, 6)
        assert part is not None
        assert part[0][0].group == left


def test_signs_follow_the_path_and_an_atom_against_itself_is_orthogonal() -> None:
    a, b, c = new(4), new(4), new(4)
    unify(a, flipped(b), WHY)
    unify(b, flipped(c), WHY)
    assert find(a[0]) == find(c[0])
    assert find(a[0])[1] == -find(b[0])[1]
    assert find(a[0])[0].group == Group.GENERAL
    unify(a, b, WHY)
    assert find(a[0])[0].group == Group.ORTHOGONAL


def test_a_symbolic_dimension_pins_what_it_meets() -> None:
    a = new(4)
    unify(a, None, WHY)
    assert find(a[0])[0].group == Group.NONE


@given(st.sampled_from(list(Group)), st.sampled_from(list(Group)), st.sampled_from(list(Group)))
def test_meet_is_the_intersection_of_groups(a: Group, b: Group, c: Group) -> None:
    assert meet(a, b) == meet(b, a)
    assert meet(a, a) == a
    assert meet(meet(a, b), c) == meet(a, meet(b, c))
    assert meet(a, Group.GENERAL) == a
    assert meet(a, Group.NONE) == Group.NONE
