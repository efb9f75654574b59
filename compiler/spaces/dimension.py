"""How many continuous symmetries a program has, counted from its channel spaces.

Every fold is a member of a group that acts on the parameters and leaves the outputs as they are. The directions in
which its members near the identity move the parameters (the *generators*) therefore lie in the null space of
d(outputs) / d(parameters), and at a random point that null space has no larger dimension unless a symmetry was missed.
`symmetry_dimension` counts independent generators; tests compare it with the nullity of the Jacobian, which proves that
the analysis finds every fold of a model, and that each one it finds is legal.

Generators are: matrices of each space's Lie algebra for every copy, log-scales and shifts that solve the equations, and
what LayerNorm adds because it does not see the mean: writers may add multiples of the ones, and readers of its output
`N(x) * g + c` may add multiples of 1 / g, whose product with the output is the constant 1 . c / g. A shift that would
need a bias where there is none counts only in combinations in which that bias stays zero.

For small programs: generators are dense vectors over all parameters. Give programs in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product

import torch
from torch import Tensor, fx

from ..dialect import linear_grouped
from ..dialect.rotary import rotary
from ..editor import Editor
from ..graph import argument
from ..program import Program
from .analysis import Space, Spaces, analyse
from .atoms import Atom, Group, flatten
from .change import Assignment, Axis, along_parameter, apply_shifts, by_blocks, pairs_tied

aten = torch.ops.aten

_TOLERANCE = 1e-9
_MASKED = -1e30
"""Below this a constant is a mask, also of scores that no attention operator computes."""

_VIEWS = frozenset(
    {
        aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default, aten.expand.default,
        aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default,
        aten._to_copy.default, aten.dropout.default, aten.index.Tensor,
    }
)  # fmt: skip
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.cat.default})
_CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
_LAYERS = frozenset({aten.linear.default, *_CONVOLUTIONS})
_ABSORBERS = (*_LAYERS, linear_grouped.overload, aten.layer_norm.default)


@dataclass(frozen=True)
class Generator:
    """One direction: by how much each parameter moves, and what a bias that is not there would have to take."""

    kind: str
    where: str
    change: Mapping[str, Tensor]
    missing: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Dimension:
    """The number of independent generators, in total and by kind (each kind counts what those before it do not have).

    program: the point at which it was counted (gains that fold are one there). basis: float64 `[total, parameters]`,
    over the tensors that `learned` names, flattened and in that order.
    """

    total: int
    by_kind: dict[str, int]
    program: Program
    basis: Tensor


def symmetry_dimension(program: Program, live: Tensor | None = None) -> Dimension:
    """Count the independent generators of a canonical program.

    live: bool `[parameters]` (as `Dimension.basis`), entries of the parameters that the outputs depend on at all
    (rows of a table that no input looks up do not count); all of them if not given.
    """
    spaces = analyse(program)
    point = _unit_gains(program, spaces)
    spaces = analyse(point)
    names = learned(point)
    found = list(generators(spaces))
    rows = torch.stack([_flat(point, names, g.change) for g in found])
    if live is not None:
        rows = rows * live
    absent: dict[str, int] = {}
    for g in found:
        for name, held in g.missing.items():
            absent[name] = held.numel()
    missing = torch.stack([_join(absent, g.missing) for g in found])
    kinds = list(dict.fromkeys(g.kind for g in found))
    by_kind: dict[str, int] = {}
    total, basis = 0, rows[:0]
    for count in range(1, len(kinds) + 1):
        chosen = torch.tensor([kinds.index(g.kind) < count for g in found])
        basis = _span(_without(rows[chosen], missing[chosen]))
        by_kind[kinds[count - 1]] = len(basis) - total
        total = len(basis)
    return Dimension(total, by_kind, point, basis)


def learned(program: Program) -> list[str]:
    """Names of the floating-point tensors, without what is part of the architecture: angles, masks and numbers."""
    fixed: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.target is rotary.overload:
            _with_inputs((argument(node, "cos"), argument(node, "sin")), fixed)
        elif node.target is aten.scaled_dot_product_attention.default:
            _with_inputs((argument(node, "attn_mask"),), fixed)
    tables = {str(node.target) for node in fixed if node.op == "get_attr"}
    return [name for name, held in program.parameters.items() if name not in tables and _is_learned(held)]


def _is_learned(held: Tensor) -> bool:
    return held.is_floating_point() and held.numel() > 1 and float(held.detach().min()) > _MASKED


def _with_inputs(nodes: Iterable[fx.Node | None], found: set[fx.Node]) -> None:
    for node in nodes:
        if node is not None and node not in found:
            found.add(node)
            _with_inputs(node.all_input_nodes, found)


def _unit_gains(program: Program, spaces: Spaces) -> Program:
    """The program with gains of one where they fold: on the orbit of every point with the same other parameters."""
    tensors = {n: held.detach() if isinstance(held, Tensor) else held for n, held in program.tensors.items()}
    for gain in spaces.foldable:
        name = str(gain.parameter.target)
        tensors[name] = torch.ones_like(tensors[name])
    return Program(
        program.graph,
        tensors,
        program.example_args,
        program.example_kwargs,
        program.dynamic_shapes,
        program.records,
        program.caches,
    )


def _join(sizes: Mapping[str, int], given: Mapping[str, Tensor]) -> Tensor:
    parts = [
        given[n].flatten() if n in given else torch.zeros(s, dtype=torch.float64) for n, s in sizes.items()
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _flat(program: Program, names: Sequence[str], change: Mapping[str, Tensor]) -> Tensor:
    return _join({name: program.tensors[name].numel() for name in names}, change)


def _without(rows: Tensor, missing: Tensor) -> Tensor:
    """The combinations of rows for which the combination of `missing` is zero."""
    if missing.shape[1] == 0:
        return rows
    u, s, _ = torch.linalg.svd(missing, full_matrices=True)
    rank = int((s > _TOLERANCE * max(1.0, float(s[0]))).sum())
    return u[:, rank:].mT @ rows


def _span(rows: Tensor) -> Tensor:
    """An orthonormal basis of the rows."""
    if rows.numel() == 0:
        return rows[:0]
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = torch.where(length > _TOLERANCE, rows / length.clamp(min=_TOLERANCE), torch.zeros_like(rows))
    _, s, v = torch.linalg.svd(rows, full_matrices=False)
    return v[: int((s > _TOLERANCE * max(1.0, float(s[0]))).sum())]


def generators(spaces: Spaces) -> Iterator[Generator]:
    """All directions that the analysis allows, at a point where the gains that fold are one."""
    for space in spaces.spaces:
        yield from _of_space(spaces, space)
    yield from _of_scales(spaces)
    yield from _of_shifts(spaces)
    yield from _of_layer_norms(spaces)


# ---- matrices


def _of_space(spaces: Spaces, space: Space) -> Iterator[Generator]:
    folded = {gain.parameter for gain in spaces.foldable}
    nodes = {member.node: None for member in space.parameters if member.node not in folded}
    sizes = [atom.size for atom in space.varies]
    for direction in _lie_algebra(space):
        for copy in product(*(range(size) for size in sizes)):
            matrix = torch.zeros(*sizes, space.size, space.size, dtype=torch.float64)
            matrix[copy] = direction
            change = {
                str(node.target): _turned(
                    spaces.program.tensors[str(node.target)], spaces, node, space, matrix
                )
                for node in nodes
            }
            yield Generator(space.group.name.lower(), space.name, change)


def _lie_algebra(space: Space) -> Iterator[Tensor]:
    """A basis of the matrices A with exp(t A) in the space's group, float64 `[n, n]`."""
    n = space.size

    def unit(i: int, j: int) -> Tensor:
        matrix = torch.zeros(n, n, dtype=torch.float64)
        matrix[i, j] = 1
        return matrix

    if space.group == Group.GENERAL:
        yield from (unit(i, j) for i in range(n) for j in range(n))
    elif space.group == Group.ORTHOGONAL:
        yield from (unit(i, j) - unit(j, i) for i, j in combinations(range(n), 2))
    elif space.group == Group.FIX_ONES:
        ones = torch.ones(n, 1, dtype=torch.float64)
        basis = torch.linalg.qr(torch.cat([ones, torch.eye(n, dtype=torch.float64)[:, 1:]], 1))[0][:, 1:]
        for i, j in combinations(range(n - 1), 2):
            yield torch.outer(basis[:, i], basis[:, j]) - torch.outer(basis[:, j], basis[:, i])
    elif space.group in (Group.PAIR, Group.PAIR_ORTHOGONAL):
        half = n // 2
        for k in range(half):
            a, b = (2 * k, 2 * k + 1) if space.atom.interleaved else (k, k + half)
            yield unit(b, a) - unit(a, b)
            if space.group == Group.PAIR:
                yield unit(a, a) + unit(b, b)


def _turned(held: Tensor, spaces: Spaces, node: fx.Node, space: Space, matrix: Tensor) -> Tensor:
    """The derivative of `rotated` at the identity."""

    def change(view: Tensor, axes: list[Axis]) -> Tensor:
        total = torch.zeros_like(view)
        for at, (atom, sign, _) in enumerate(axes):
            if atom is not space.atom:
                continue
            given = matrix if sign > 0 else -matrix.mT
            moved = view.movedim(at, -1)[..., None]
            rest = [a for i, (a, _, _) in enumerate(axes) if i != at]
            kept = [a for a in rest if a in space.varies]
            spread = given.permute([*(space.varies.index(a) for a in kept), -2, -1])
            shape = [a.size if a in space.varies else 1 for a in rest]
            total += (spread.reshape(*shape, space.size, space.size) @ moved)[..., 0].movedim(-1, at)
        return total

    return by_blocks(held.double(), spaces.dims_of[node], change)


# ---- scales and shifts


def _units(spaces_support: Sequence[Atom]) -> Iterator[Tensor]:
    sizes = [atom.size for atom in spaces_support]
    for at in product(*(range(size) for size in sizes)):
        unit = torch.zeros(sizes, dtype=torch.float64)
        unit[at] = 1
        for axis, atom in enumerate(spaces_support):
            unit = pairs_tied(unit, axis, atom)
        yield unit


def _of_scales(spaces: Spaces) -> Iterator[Generator]:
    solution = spaces.scales
    roots = solution.free_roots()
    zero = {r: torch.zeros([a.size for a in solution.ordered_support(r)], dtype=torch.float64) for r in roots}
    values = dict(zero)
    # Logarithms add.
    assignment = Assignment(solution, values, multiply=False)
    for root in roots:
        for unit in _units(solution.ordered_support(root)):
            assignment.values = {**values, root: unit}
            change: dict[str, Tensor] = {}
            for key in solution.ordered_keys():
                if key.node.op != "get_attr" or key.use is not None:
                    continue
                log = along_parameter(assignment, spaces, key)
                if log is None:
                    continue
                name = str(key.node.target)
                held = spaces.program.tensors[name].double()
                change[name] = change.get(name, torch.zeros_like(held)) + held * log
            if change:
                yield Generator("scale", str(root[0].node), change)


def _of_shifts(spaces: Spaces) -> Iterator[Generator]:
    solution = spaces.shifts
    roots = solution.free_roots()
    zero = {r: torch.zeros([a.size for a in solution.ordered_support(r)], dtype=torch.float64) for r in roots}
    for root in roots:
        for unit in _units(solution.ordered_support(root)):
            editor = Editor(spaces.program)
            apply_shifts(editor, spaces, {**zero, root: unit})
            yield _difference(spaces.program, editor, str(root[0].node))


def _difference(program: Program, editor: Editor, where: str) -> Generator:
    """What a shift moved (it acts linearly on biases and tables, so a difference is the derivative)."""
    change: dict[str, Tensor] = {}
    missing: dict[str, Tensor] = {}

    def moved(name: str, by: Tensor) -> None:
        change[name] = change[name] + by if name in change else by

    for name, held in program.parameters.items():
        if editor.tensors[name] is not held:
            moved(name, editor.tensors[name].double() - held.double())
    new = {node.name: node for node in editor.graph.nodes}
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in _ABSORBERS:
            continue
        before, after = argument(node, "bias"), argument(new[node.name], "bias")
        if after is None or (before is not None and before.target == after.target):
            continue
        held = editor.tensors[str(after.target)].double()
        if before is None:
            missing[node.name] = held
        else:
            moved(str(before.target), held - program.tensors[str(before.target)].double())
    return Generator("shift", where, change, missing)


# ---- LayerNorm


def _of_layer_norms(spaces: Spaces) -> Iterator[Generator]:
    for norm in spaces.centred:
        flat = flatten(spaces.dims_of[norm][-1] or ())
        if len(flat) == 1 and flat[0][0].sum is None:
            yield from _readers(spaces, norm)
            yield from _bias_between(spaces, norm, flat[0][0])
    atoms = {
        flatten(spaces.dims_of[norm][-1] or ())[0][0]: None
        for norm in spaces.centred
        if spaces.dims_of[norm][-1]
    }
    for atom in atoms:
        yield from _writers(spaces, atom)


def _mean_unseen(spaces: Spaces, node: fx.Node, atom: Atom) -> bool:
    """Whether a multiple of the ones, added along the atom to a value, changes nothing: only LayerNorms read it."""
    if not node.users:
        return False

    def passes(user: fx.Node) -> bool:
        if user.op != "call_function":
            return False
        if user.target is aten.layer_norm.default:
            reads = argument(user, "input") is node
            last = flatten(spaces.dims_of[user][-1] or ())
            return reads and [a for a, _ in last] == [atom]
        return user.target in (_VIEWS | _SUMS) and _mean_unseen(spaces, user, atom)

    return all(passes(user) for user in node.users)


def _writers(spaces: Spaces, atom: Atom) -> Iterator[Generator]:
    """Parameters that write along the atom add a multiple of the ones for each of their other indices."""
    for node, dims in spaces.dims_of.items():
        if node.op != "get_attr":
            continue
        for dim, index in enumerate(dims):
            if [a for a, _ in flatten(index or ())] != [atom]:
                continue
            if _mean_unseen(spaces, node, atom) or all(
                _writes(spaces, node, dim, user, atom) for user in node.users
            ):
                yield from _ones_along(spaces, node, dim)


def _writes(spaces: Spaces, node: fx.Node, dim: int, user: fx.Node, atom: Atom) -> bool:
    roles: dict[object, tuple[tuple[str, int], ...]] = {
        aten.embedding.default: (("weight", 1),),
        aten.layer_norm.default: (("bias", 0),),
        **dict.fromkeys(_LAYERS, (("weight", 0), ("bias", 0))),
    }
    named = [d for name, d in roles.get(user.target, ()) if argument(user, name) is node]
    return named == [dim] and _mean_unseen(spaces, user, atom)


def _ones_along(spaces: Spaces, node: fx.Node, dim: int) -> Iterator[Generator]:
    held = spaces.program.tensors[str(node.target)]
    for at in product(*(range(size) for d, size in enumerate(held.shape) if d != dim)):
        change = torch.zeros(held.shape, dtype=torch.float64)
        change.movedim(dim, -1)[at] = 1
        yield Generator("mean of writers", str(node.target), {str(node.target): change})


def _through_views(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(value, user) for all users of a value that are no views of it."""
    for user in node.users:
        if user.target in _VIEWS:
            yield from _through_views(user)
        else:
            yield node, user


def _gain_and_bias(spaces: Spaces, norm: fx.Node) -> tuple[Tensor, Tensor]:
    n = spaces.dims_of[norm][-1]
    size = flatten(n or ())[0][0].size
    held = []
    for name, default in (("weight", torch.ones), ("bias", torch.zeros)):
        node = argument(norm, name)
        held.append(
            default(size, dtype=torch.float64)
            if node is None
            else spaces.program.tensors[str(node.target)].double()
        )
    return held[0], held[1]


def _add_to_bias(
    spaces: Spaces, layer: fx.Node, by: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """As (change, missing); None where the bias is read elsewhere too."""
    bias = argument(layer, "bias")
    if bias is None:
        return {}, ({layer.name: by} if bool(by.abs().max() > 0) else {})
    if len(spaces.constant(bias).users) > 1:
        return None
    return {str(bias.target): by}, {}


def _readers(spaces: Spaces, norm: fx.Node) -> Iterator[Generator]:
    """W' = W + u (1 / g)^T, b' = b - u (1 . c / g), for each linear that reads the norm alone."""
    gain, bias = _gain_and_bias(spaces, norm)
    if bool((gain == 0).any()):
        return
    for read, user in _through_views(norm):
        if user.target is not aten.linear.default or argument(user, "input") is not read:
            continue
        weight = argument(user, "weight")
        if weight.op != "get_attr" or len(weight.users) > 1:
            continue
        held = spaces.program.tensors[str(weight.target)]
        for row in range(held.shape[0]):
            change = torch.zeros(held.shape, dtype=torch.float64)
            change[row] = gain.reciprocal()
            by = torch.zeros(held.shape[0], dtype=torch.float64)
            by[row] = -(bias / gain).sum()
            absorbed = _add_to_bias(spaces, user, by)
            if absorbed is not None:
                yield Generator(
                    "readers of LayerNorm",
                    str(weight.target),
                    {str(weight.target): change, **absorbed[0]},
                    absorbed[1],
                )


def _bias_between(spaces: Spaces, norm: fx.Node, atom: Atom) -> Iterator[Generator]:
    """c' = c + t 1 where some of what reads the norm are linears, which absorb it, and the rest does not see means."""
    bias = argument(norm, "bias")
    if bias is None or len(bias.users) > 1:
        return
    name = str(bias.target)
    change: dict[str, Tensor] = {name: torch.ones_like(spaces.program.tensors[name], dtype=torch.float64)}
    missing: dict[str, Tensor] = {}
    for read, user in _through_views(norm):
        if user.target is aten.linear.default and argument(user, "input") is read:
            weight = argument(user, "weight")
            if weight.op != "get_attr":
                return
            absorbed = _add_to_bias(spaces, user, -spaces.program.tensors[str(weight.target)].double().sum(1))
            if absorbed is None:
                return
            change |= absorbed[0]
            missing |= absorbed[1]
        elif user.target not in _SUMS or not _mean_unseen(spaces, user, atom):
            return
    yield Generator("mean of writers", name, change, missing)


__all__ = ["Dimension", "Generator", "generators", "learned", "symmetry_dimension"]
