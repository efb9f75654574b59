"""Linear equations between vectors: exact, and none is lost."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from isofold.compiler.spaces.atoms import Atom, Group, Reason
from isofold.compiler.spaces.potentials import Block, Key, Potentials, Solution

GRAPH = fx.Graph()
KEYS = [Key(GRAPH.placeholder(f"x{i}")) for i in range(6)]
C = Atom(4)
WHY = Reason(Group.NONE, "pinned")


def solved(potentials: Potentials, blocks: dict[Key, Sequence[Block]] | None = None) -> Solution:
    return potentials.close(lambda key: (blocks or {}).get(key, [frozenset([C])]))


def value(solution: Solution, key: Key, chosen: dict, block: Block = frozenset([C])) -> Fraction:
    """The vector of a key (one number) where independent roots have the given values."""
    _, expressed = solution.parametrize(list(chosen))
    root, sign = solution.find((key, block))
    return sign * sum((c * chosen[r] for r, c in expressed.get(root, {}).items()), Fraction(0))


equations = st.lists(
    st.lists(
        st.tuples(st.sampled_from([1, -1]), st.sampled_from(KEYS)),
        min_size=2,
        max_size=3,
        unique_by=lambda t: t[1],
    ),
    max_size=6,
)


@given(equations, st.sets(st.sampled_from(KEYS), max_size=2))
def test_every_solution_meets_every_equation_and_every_pin(given_equations: list, pins: set) -> None:
    potentials = Potentials("scale")
    for terms in given_equations:
        potentials.tie(*terms)
    for key in sorted(pins, key=str):
        potentials.pin(key, WHY)
    solution = solved(potentials)
    chosen = {root: Fraction(i + 2, 3) for i, root in enumerate(solution.free_roots())}
    for terms in given_equations:
        assert sum(c * value(solution, key, chosen) for c, key in terms) == 0
    for key in pins:
        assert value(solution, key, chosen) == 0
        assert solution.pin_of(key) is not None
    # As many free as a matrix of the equations leaves.
    known = solution.ordered_keys()
    rows = [[sum(c for c, k in terms if k == key) for key in known] for terms in given_equations]
    rows += [[int(k == key) for k in known] for key in pins]
    assert len(chosen) == len(known) - rank(rows)


def rank(rows: list[list[int]]) -> int:
    matrix = [[Fraction(v) for v in row] for row in rows]
    found = 0
    for column in range(len(matrix[0]) if matrix else 0):
        pivot = next((i for i in range(found, len(matrix)) if matrix[i][column]), None)
        if pivot is None:
            continue
        matrix[found], matrix[pivot] = matrix[pivot], matrix[found]
        for i in range(len(matrix)):
            if i != found and matrix[i][column]:
                factor = matrix[i][column] / matrix[found][column]
                matrix[i] = [a - factor * b for a, b in zip(matrix[i], matrix[found], strict=True)]
        found += 1
    return found


def test_what_is_tied_to_its_own_opposite_is_zero() -> None:
    potentials = Potentials("scale")
    potentials.tie((1, KEYS[0]), (1, KEYS[1]))
    potentials.equal(KEYS[0], KEYS[1])
    solution = solved(potentials)
    reason = solution.pin_of(KEYS[0])
    assert reason is not None
    assert "its own opposite" in reason.why


def test_parts_of_a_concatenation_stay_apart() -> None:
    a, b = Atom(2), Atom(3)
    potentials = Potentials("shift")
    whole, left, right = KEYS[:3]
    potentials.equal(whole, left)
    potentials.equal(whole, right)
    potentials.pin(right, WHY)
    blocks = {whole: [frozenset([a]), frozenset([b])], left: [frozenset([a])], right: [frozenset([b])]}
    solution = solved(potentials, blocks)
    assert solution.pin_of(left) is None
    assert solution.is_free(solution.find((whole, frozenset([a])))[0])
    assert not solution.is_free(solution.find((whole, frozenset([b])))[0])


def test_values_with_other_positions_stay_tied() -> None:
    """A pooled image has the channels of the image and other positions; its scale is still that of the image."""
    before, after = Atom(9), Atom(7)
    potentials = Potentials("scale")
    potentials.equal(KEYS[0], KEYS[1])
    potentials.pin(KEYS[1], WHY)
    solution = solved(potentials, {KEYS[0]: [frozenset([C, before])], KEYS[1]: [frozenset([C, after])]})
    assert solution.pin_of(KEYS[0]) is WHY


def test_vectors_depend_on_what_both_sides_have() -> None:
    heads = Atom(2)
    potentials = Potentials("scale")
    potentials.equal(KEYS[0], KEYS[1])
    solution = solved(potentials, {KEYS[0]: [frozenset([C, heads])]})
    root, _ = solution.find((KEYS[0], frozenset([C, heads])))
    assert solution.ordered_support(root) == [C]


def test_a_pin_of_a_part_leaves_the_rest_free() -> None:
    a, b = Atom(2), Atom(3)
    potentials = Potentials("shift")
    potentials.pin(KEYS[0], WHY, ((a, 1),))
    solution = solved(potentials, {KEYS[0]: [frozenset([a]), frozenset([b])]})
    assert not solution.is_free((KEYS[0], frozenset([a])))
    assert solution.is_free((KEYS[0], frozenset([b])))
