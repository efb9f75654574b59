"""Atoms: the index structure of dimensions, and which dimensions must change basis together.

A dimension is an ordered product of atoms, most significant first: a view of 768 as 12 x 64 *splits* the atom of 768. A
concatenation is a direct *sum* of what it joins, and a slice cuts an atom into a sum. Unification ties the atoms of
two dimensions one by one, splitting and cutting where it must; where sizes do not fit each other, both are pinned.

Every tie has a sign: +1 where both sides take the same matrix T, -1 where one takes T^-t (the two sides of a
contraction). An atom that is tied to itself with both signs can only take T = T^-t: orthogonal ones.

A dimension (`Dim`) is a tuple of (atom, sign). A dimension of size 1 is the empty tuple; a symbolic one is None, and
whatever is tied to it is pinned.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Optional

from ..graph import Place


class Group(enum.IntEnum):
    """Linear maps that an atom may take, from none to all; `PAIR` is beside the order (see `meet`)."""

    NONE = 0
    PERMUTATION = 1
    FIX_ONES = 2
    """Orthogonal, and the vector of ones is kept."""
    ORTHOGONAL = 3
    GENERAL = 4
    PAIR_ORTHOGONAL = 5
    """A rotation of each rotary pair."""
    PAIR = 6
    """A rotation and a scale of each rotary pair (a complex number)."""


_PAIRS = (Group.PAIR, Group.PAIR_ORTHOGONAL)


def meet(a: Group, b: Group) -> Group:
    """The maps that are in both groups."""
    if a in _PAIRS or b in _PAIRS:
        pair, other = (a, b) if a in _PAIRS else (b, a)
        if other in _PAIRS:
            return min(a, b)
        if other == Group.GENERAL:
            return pair
        # Rotations that keep the ones, and permutations of two inside a pair, are the identity.
        return Group.PAIR_ORTHOGONAL if other == Group.ORTHOGONAL else Group.NONE
    return min(a, b)


@dataclass(frozen=True)
class Reason:
    """Why an atom cannot take more than a group: the operator that says so, where, and in words."""

    group: Group
    why: str
    place: Place | None = None


Ref = tuple["Atom", int]
Dim = Optional[tuple[Ref, ...]]  # noqa: UP045 - a string inside `X | None` is not evaluated at run time


class Atom:
    """A node of the union-find; only roots have a structure and reasons."""

    _made = itertools.count()

    def __init__(self, size: int) -> None:
        self.size = size
        self.serial = next(Atom._made)
        """Order of making, so that results do not depend on addresses."""
        self.parent: Atom | None = None
        self.sign = 1
        self.product: tuple[Ref, ...] | None = None
        self.sum: list[tuple[Ref, ...]] | None = None
        self.reasons: list[Reason] = []
        self.interleaved: bool | None = None
        """Layout of rotary pairs: (2i, 2i + 1), or (i, i + n / 2); None where there are none."""

    @property
    def group(self) -> Group:
        """What all reasons leave."""
        found = Group.GENERAL
        for reason in self.reasons:
            found = meet(found, reason.group)
        return found

    def restrict(self, reason: Reason) -> None:
        """Add a reason, unless one of the same place already says as much."""
        if not any(r.group == reason.group and r.place == reason.place for r in self.reasons):
            self.reasons.append(reason)


def find(ref: Ref) -> Ref:
    """The root and the sign relative to it."""
    atom, sign = ref
    path = []
    while atom.parent is not None:
        path.append(atom)
        sign *= atom.sign
        atom = atom.parent
    total = 1
    for node in reversed(path):
        total *= node.sign
        node.parent, node.sign = atom, total
    return atom, sign


def flatten(dim: Iterable[Ref]) -> list[Ref]:
    """Roots in order, products taken apart; what is left is plain or a sum."""
    result: list[Ref] = []
    for ref in dim:
        atom, sign = find(ref)
        if atom.product is None:
            result.append((atom, sign))
        else:
            result.extend(flatten((a, s * sign) for a, s in atom.product))
    return result


def leaves(dim: Dim) -> Iterator[Ref]:
    """Every plain root in a dimension, inside sums too (each once)."""
    seen: set[Atom] = set()
    for atom, sign in flatten(dim or ()):
        inner: Iterable[Ref] = [(atom, sign)]
        if atom.sum is not None:
            inner = [(a, s * sign) for part in atom.sum for a, s in leaves(part)]
        for a, s in inner:
            if a not in seen:
                seen.add(a)
                yield a, s


def size_of(dim: Iterable[Ref]) -> int:
    """Number of indices."""
    return math.prod(atom.size for atom, _ in dim)


def new(size: int) -> tuple[Ref, ...]:
    """A fresh dimension."""
    return () if size == 1 else ((Atom(size), 1),)


def flipped(dim: Dim) -> Dim:
    """The same dimension on the other side of a contraction."""
    return None if dim is None else tuple((a, -s) for a, s in dim)


def restrict(dim: Dim, reason: Reason) -> None:
    """Leave every atom of a dimension no more than the reason's group."""
    for atom, _ in leaves(dim):
        atom.restrict(reason)


def _inherited(reason: Reason) -> Reason:
    """What a reason says about the pieces of the atom it was given for."""
    if reason.group in _PAIRS:
        return Reason(Group.NONE, f"{reason.why}, and the pairs are cut", reason.place)
    return reason


def _give_structure(atom: Atom, pieces: Iterable[Ref]) -> None:
    for piece, _ in pieces:
        for reason in atom.reasons:
            piece.restrict(_inherited(reason))


def _split(atom: Atom, first: int) -> tuple[Ref, Ref]:
    """Make a plain root the product of `first` and the rest."""
    pieces: tuple[Ref, Ref] = ((Atom(first), 1), (Atom(atom.size // first), 1))
    _give_structure(atom, pieces)
    atom.product = pieces
    return pieces


def segments(dim: Iterable[Ref]) -> list[tuple[Ref, ...]]:
    """The dimension as a direct sum along its most significant atom; one entry where that is no sum."""
    flat = flatten(dim)
    if not flat or flat[0][0].sum is None:
        return [tuple(flat)]
    (atom, sign), rest = flat[0], tuple(flat[1:])
    assert atom.sum is not None
    found: list[tuple[Ref, ...]] = []
    for part in atom.sum:
        found.extend(segments((*((a, s * sign) for a, s in part), *rest)))
    return found


def cut(dim: Iterable[Ref], at: int) -> bool:
    """Make `at` an edge of the direct sum; False where an atom would have to be cut inside a product."""
    offset = 0
    for segment in segments(dim):
        size = size_of(segment)
        if offset < at < offset + size:
            return _cut_segment(segment, at - offset)
        offset += size
    return True


def _cut_segment(segment: tuple[Ref, ...], at: int) -> bool:
    atom, _ = segment[0]
    below = size_of(segment[1:])
    if at % below or atom.sum is not None:
        return False
    pieces: list[Ref] = [(Atom(at // below), 1), (Atom(atom.size - at // below), 1)]
    _give_structure(atom, pieces)
    atom.sum = [_marked((piece,)) for piece in pieces]
    return True


def _marked(part: tuple[Ref, ...]) -> tuple[Ref, ...]:
    """A part of a direct sum with an atom that tells it from the others; one of a single index has its own."""
    return part if part and size_of(part) == 1 else (*part, (Atom(1), 1))


def cut_out(dim: tuple[Ref, ...], start: int, end: int) -> Dim:
    """The indices start..end - 1 of a dimension, as a dimension; None where it cannot be cut there."""
    if not (cut(dim, start) and cut(dim, end)):
        return None
    offset, inside = 0, []
    for segment in segments(dim):
        if start <= offset and offset + size_of(segment) <= end:
            inside.append(segment)
        offset += size_of(segment)
    return direct_sum(inside)


def direct_sum(parts: list[tuple[Ref, ...]]) -> tuple[Ref, ...]:
    """The concatenation of dimensions."""
    if len(parts) == 1:
        return parts[0]
    atom = Atom(sum(size_of(part) for part in parts))
    atom.sum = [_marked(part) for part in parts]
    return ((atom, 1),)


def unify(a: Dim, b: Dim, reason: Reason, sign: int = 1) -> None:
    """Tie two dimensions of equal size. `reason` is given where they do not fit each other (group NONE)."""
    if a is None or b is None:
        restrict(a, reason)
        restrict(b, reason)
        return
    left, right = flatten(a), flatten(b)
    if left and right and size_of(left) == size_of(right) == 1:
        # Parts of one index in a direct sum: their vectors are one too.
        _merge(left[0][0], right[0][0], left[0][1] * right[0][1] * sign, reason)
        return
    left, right = ([r for r in side if r[0].size > 1] for side in (left, right))
    while left and right:
        (x, sx), (y, sy) = left[0], right[0]
        if x.sum is not None or y.sum is not None:
            _unify_sums(left, right, reason, sign)
            return
        if x.size == y.size:
            _merge(x, y, sx * sy * sign, reason)
            left, right = left[1:], right[1:]
        elif x.size < y.size and y.size % x.size == 0:
            right = [(p, s * sy) for p, s in _split(y, x.size)] + right[1:]
        elif x.size > y.size and x.size % y.size == 0:
            left = [(p, s * sx) for p, s in _split(x, y.size)] + left[1:]
        else:
            break
        # Splitting one may have given the other its structure too.
        left, right = flatten(left), flatten(right)
    for rest in (left, right):
        restrict(tuple(rest), reason)


def _unify_sums(left: list[Ref], right: list[Ref], reason: Reason, sign: int) -> None:
    for one, other in ((left, right), (right, left)):
        offset = 0
        for segment in segments(one)[:-1]:
            offset += size_of(segment)
            if not cut(other, offset):
                restrict(tuple(left), reason)
                restrict(tuple(right), reason)
                return
    for x, y in zip(segments(left), segments(right), strict=True):
        unify(x, y, reason, sign)


def _merge(x: Atom, y: Atom, sign: int, reason: Reason) -> None:
    if x is y:
        if sign < 0:
            x.restrict(Reason(Group.ORTHOGONAL, "it meets itself on both sides of a product", reason.place))
        return
    if x.interleaved is not None and y.interleaved is not None and x.interleaved != y.interleaved:
        y.restrict(Reason(Group.NONE, "rotary pairs of two layouts meet", reason.place))
    if y.interleaved is None:
        y.interleaved = x.interleaved
    x.parent, x.sign = y, sign
    for given in x.reasons:
        y.restrict(given)
