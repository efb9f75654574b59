"""Potentials: one vector for each value and parameter, tied by linear equations, solved exactly.

Scales and shifts both work this way. A value x may become ``x * exp(p)`` (scales) or ``x + p`` (shifts); every operator
gives equations between the vectors of what it reads and writes: a sum of activations makes the scales of its three
sides equal and adds their shifts, a product adds log-scales, a linear leaves both of its sides free because its weight
and bias absorb them. The equations have small integer coefficients, so elimination over the rationals is exact, and
its solutions are all choices that change nothing in what the program computes.

A vector is a function of the indices of some atoms, its *support*. A value of several blocks (a concatenation) has one
vector for each. Blocks of two values correspond unless they are different parts of one concatenation; tied vectors
depend only on the atoms that both have (keys that are copied for a group of queries have one scale for the group).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from torch import fx

from ..graph import place_of
from .atoms import Atom, Dim, Group, Reason, leaves


class Key(NamedTuple):
    """What has a vector: a node (dim None), or one dimension of a weight matrix (for one use of it, if given)."""

    node: fx.Node
    dim: int | None = None
    use: fx.Node | None = None


Block = frozenset[Atom]
Term = tuple[int, Key]


@dataclass
class Variable:
    """A root of the union-find: one free vector."""

    support: Block
    pin: Reason | None = None


@dataclass
class Potentials:
    """Equations as rules give them, and after `close` what is free."""

    what: str
    equations: list[tuple[Term, ...]] = field(default_factory=list)
    pins: list[tuple[Key, Reason, Dim]] = field(default_factory=list)

    def tie(self, *terms: Term) -> None:
        """sum of coefficient * vector = 0; coefficients are +1 and -1."""
        self.equations.append(terms)

    def equal(self, a: Key, b: Key) -> None:
        """Both vectors are one."""
        self.tie((1, a), (-1, b))

    def pin(self, key: Key, reason: Reason, only: Dim = None) -> None:
        """The vector is zero, in all blocks or in those with the indices of `only`."""
        self.pins.append((key, reason, only))

    def close(self, blocks_of: Callable[[Key], Sequence[Block]]) -> Solution:
        """Instantiate everything, when all structure is known."""
        return Solution(self, blocks_of)


class Solution:
    """The solved equations of one kind of potential."""

    def __init__(self, given: Potentials, blocks_of: Callable[[Key], Sequence[Block]]) -> None:
        self.what = given.what
        self._blocks_of = blocks_of
        self._parent: dict[tuple[Key, Block], tuple[tuple[Key, Block], int]] = {}
        self._variables: dict[tuple[Key, Block], Variable] = {}
        self._blocks: dict[Key, Sequence[Block]] = {}
        longer: list[list[tuple[int, tuple[Key, Block]]]] = []
        for terms in given.equations:
            for row in self._instances(terms):
                if len(row) == 2 and row[0][0] * row[1][0] in (1, -1):
                    self._union(row[0][1], row[1][1], -row[0][0] * row[1][0])
                else:
                    longer.append(row)
        for key, reason, only in given.pins:
            part = None if only is None else {atom for atom, _ in leaves(only)}
            for block in self.blocks(key):
                if part is not None and not part & block:
                    continue
                root, _ = self.find((key, block))
                if self._variables[root].pin is None:
                    self._variables[root].pin = reason
        self._rows = self._reduce(longer)

    def blocks(self, key: Key) -> Sequence[Block]:
        """The blocks of a value's vector."""
        if key not in self._blocks:
            self._blocks[key] = self._blocks_of(key)
            for block in self._blocks[key]:
                self._parent[key, block] = ((key, block), 1)
                self._variables[key, block] = Variable(block)
        return self._blocks[key]

    def ordered_keys(self) -> list[Key]:
        """Everything that occurs in an equation or a pin."""
        return list(self._blocks)

    def find(self, at: tuple[Key, Block]) -> tuple[tuple[Key, Block], int]:
        """The root of a block's vector, and the sign relative to it."""
        self.blocks(at[0])
        sign, path = 1, []
        while self._parent[at][0] != at:
            path.append(at)
            above, s = self._parent[at]
            sign *= s
            at = above
        total = 1
        for node in reversed(path):
            total *= self._parent[node][1]
            self._parent[node] = (at, total)
        return at, sign

    def knows(self, key: Key) -> bool:
        """Whether something occurs in an equation or a pin."""
        return key in self._blocks

    def ordered_support(self, root: tuple[Key, Block]) -> list[Atom]:
        """The atoms that a root's vector depends on, in one fixed order."""
        return sorted(self._variables[root].support, key=lambda atom: atom.serial)

    def variable(self, root: tuple[Key, Block]) -> Variable:
        """The variable at a root."""
        return self._variables[root]

    def _instances(
        self, terms: Sequence[Term], chosen: Sequence[tuple[int, tuple[Key, Block]]] = ()
    ) -> Iterable[list[tuple[int, tuple[Key, Block]]]]:
        # A method, as a nested function that calls itself would keep the program alive until the next collection.
        if not terms:
            yield list(chosen)
            return
        coefficient, key = terms[0]
        found = [self._counterparts(key, *other) for _, other in chosen]
        for block in [b for b in self.blocks(key) if all(b in some for some in found)]:
            yield from self._instances(terms[1:], [*chosen, (coefficient, (key, block))])

    def _counterparts(self, key: Key, other: Key, block: Block) -> Sequence[Block]:
        """The blocks of a key that correspond to a block of another: all but those of other parts of a concatenation.

        Whatever is no other part is tied (a pooled image has other positions, but the same channels): an equation
        that found no blocks would be lost, and with it a pin.
        """
        ours = self.blocks(key)
        if len(ours) == len(self.blocks(other)) == 1:
            return ours
        return [b for b in ours if not any(_apart(b, block, self.blocks(k)) for k in (key, other))]

    def _union(self, a: tuple[Key, Block], b: tuple[Key, Block], sign: int) -> None:
        (ra, sa), (rb, sb) = self.find(a), self.find(b)
        sign *= sa * sb
        if ra == rb:
            if sign < 0 and self._variables[ra].pin is None:
                self._variables[ra].pin = _opposite(ra)
            return
        va, vb = self._variables.pop(ra), self._variables[rb]
        vb.support &= va.support
        vb.pin = vb.pin or va.pin
        self._parent[ra] = (rb, sign)

    def _reduce(
        self, longer: list[list[tuple[int, tuple[Key, Block]]]]
    ) -> list[dict[tuple[Key, Block], Fraction]]:
        """Rows over unpinned roots; supports of what a row ties become one."""
        rows = []
        changed = True
        for equation in longer:
            row: dict[tuple[Key, Block], Fraction] = {}
            for coefficient, at in equation:
                root, sign = self.find(at)
                if self._variables[root].pin is None:
                    row[root] = row.get(root, Fraction(0)) + coefficient * sign
            row = {root: c for root, c in row.items() if c}
            if row:
                rows.append(row)
        while changed:
            changed = False
            for row in rows:
                common = frozenset.intersection(*(self._variables[root].support for root in row))
                for root in row:
                    if self._variables[root].support != common:
                        self._variables[root].support, changed = common, True
        return _echelon(rows, [])

    def roots(self) -> list[tuple[Key, Block]]:
        """All unpinned roots."""
        return [root for root, variable in self._variables.items() if variable.pin is None]

    def is_free(self, root: tuple[Key, Block]) -> bool:
        """Whether the vector can be anything but zero."""
        if self._variables[root].pin is not None:
            return False
        return not any(set(row) == {root} for row in self._rows)

    def pin_of(self, key: Key) -> Reason | None:
        """Why a value's vector is zero, or None where some block of it is free."""
        found: Reason | None = None
        for block in self.blocks(key):
            root, _ = self.find((key, block))
            if self.is_free(root):
                return None
            found = found or self._variables[root].pin or _tied(root)
        return found

    def parametrize(
        self, wanted: Sequence[tuple[Key, Block]]
    ) -> tuple[list[tuple[Key, Block]], dict[tuple[Key, Block], dict[tuple[Key, Block], Fraction]]]:
        """Which of the wanted roots can be chosen independently, and every root as a combination of those.

        Earlier ones win. All that stays free besides is set to zero. Roots that do not move are left out.
        """
        order = [root for root in self.roots() if root not in wanted]
        rows = _echelon(self._rows, [*order, *reversed(wanted)])
        dependent = {next(iter(row)) for row in rows}
        free = [root for root in wanted if root not in dependent and self.is_free(root)]
        expressed = {root: {root: Fraction(1)} for root in free}
        for row in rows:
            pivot = next(iter(row))
            terms = {root: -c for root, c in row.items() if root != pivot and root in expressed}
            if terms:
                expressed[pivot] = terms
        return free, expressed

    def free_roots(self) -> list[tuple[Key, Block]]:
        """A set of roots that parametrizes all solutions."""
        dependent = {next(iter(row)) for row in self._rows}
        return [root for root in self.roots() if root not in dependent]


def _apart(a: Block, b: Block, blocks: Sequence[Block]) -> bool:
    """Whether two blocks have atoms that occur among these blocks, but in no block together."""
    known = frozenset().union(*blocks)
    return any(
        not any(x in block and y in block for block in blocks)
        for x in a & known
        for y in b & known
        if x is not y
    )


def _opposite(root: tuple[Key, Block]) -> Reason:
    return Reason(Group.NONE, "it is tied to its own opposite", place_of(root[0].node))


def _tied(root: tuple[Key, Block]) -> Reason:
    return Reason(Group.NONE, "equations with pinned values leave only zero", place_of(root[0].node))


def _echelon(
    rows: list[dict[tuple[Key, Block], Fraction]], order: list[tuple[Key, Block]]
) -> list[dict[tuple[Key, Block], Fraction]]:
    """Reduced row echelon form; pivots are taken early in `order`. The pivot is a row's first key."""
    rank = {root: i for i, root in enumerate(order)}
    done: list[dict[tuple[Key, Block], Fraction]] = []
    by_pivot: dict[tuple[Key, Block], dict[tuple[Key, Block], Fraction]] = {}
    for given in rows:
        row = dict(given)
        for root in list(row):
            if root in by_pivot and root in row:
                _subtract(row, by_pivot[root], row[root])
        if not row:
            continue
        pivot = min(row, key=lambda root: rank.get(root, len(rank))) if rank else next(iter(row))
        lead = row[pivot]
        row = {pivot: Fraction(1), **{root: c / lead for root, c in row.items() if root != pivot}}
        for other in done:
            if pivot in other:
                _subtract(other, row, other[pivot])
        done.append(row)
        by_pivot[pivot] = row
    return done


def _subtract(
    row: dict[tuple[Key, Block], Fraction], other: dict[tuple[Key, Block], Fraction], factor: Fraction
) -> None:
    for root, c in other.items():
        left = row.get(root, Fraction(0)) - factor * c
        if left:
            row[root] = left
        else:
            row.pop(root, None)
