"""Applying a change of basis, a scale or a shift to every parameter that it touches.

    bases    {space: T}        p' = T p along every dimension of the space (T^-t where the tie is contravariant)
    factors  {root: vector}    p' = p * product of vector^coefficient      (scales; the exponents solve the equations)
    shifts   {root: vector}    biases and tables: b' = b - W z_x + z_y, E' = E + z

All products are computed in float64 and rounded once to the parameter's own type. A parameter is a nest of atoms
(atoms.py): each of its direct summands is viewed with one axis for each atom, changed there, and joined again. Float64
copies are of parts of a parameter, never of a whole large one: what a change needs beside its result stays small.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, fx

from ..dialect import linear_grouped
from ..editor import Editor
from ..graph import argument
from ..hadamard import apply_hadamard, hadamard_matrix
from ..hadamard_orders import factor
from .analysis import Absorber, Space, Spaces
from .atoms import Atom, Dim, Group, Ref, flatten, size_of
from .potentials import Block, Key, Solution

aten = torch.ops.aten

Root = tuple[Key, Block]
Axis = tuple[Atom, int, int]
"""Atom, sign, and the dimension of the parameter that it lies in."""
_ELEMENTS_AT_ONCE = 1 << 20
"""Elements that are held in float64 at a time: 8 MiB, where products are fast and caches still help."""


def by_blocks(tensor: Tensor, dims: Sequence[Dim], change: Callable[[Tensor, list[Axis]], Tensor]) -> Tensor:
    """Apply `change(view, axes)` to every direct summand, viewed with one axis for each plain atom."""
    flat = [(ref, index) for index, dim in enumerate(dims) for ref in flatten(dim or ())]
    return _by_blocks(tensor.reshape([ref[0].size for ref, _ in flat]), flat, change).reshape(tensor.shape)


def _by_blocks(
    view: Tensor, axes: list[tuple[Ref, int]], change: Callable[[Tensor, list[Axis]], Tensor]
) -> Tensor:
    for at, ((atom, sign), index) in enumerate(axes):
        if atom.sum is None:
            continue
        results = []
        offset = 0
        for part in atom.sum:
            inner = [((a, s * sign), index) for a, s in flatten(part)]
            sizes = [ref[0].size for ref, _ in inner]
            length = size_of(part)
            piece = view.narrow(at, offset, length)
            shape = [*piece.shape[:at], *sizes, *piece.shape[at + 1 :]]
            done = _by_blocks(piece.reshape(shape), [*axes[:at], *inner, *axes[at + 1 :]], change)
            results.append(done.reshape(piece.shape))
            offset += length
        return torch.cat(results, at)
    return change(view, [(atom, sign, index) for (atom, sign), index in axes])


@torch.no_grad()
def by_parts(
    tensor: Tensor,
    dims: Sequence[Dim],
    mixed: Collection[Atom],
    change: Callable[[Tensor, list[Axis]], Tensor],
) -> Tensor:
    """`by_blocks` for a change that is computed in float64, a part at a time, and rounded to the tensor's own type.

    change: from a float64 view to one of the same shape; mixed: atoms of which it needs all indices at once.
    """

    def parts(view: Tensor, axes: list[Axis]) -> Tensor:
        free = [at for at, (atom, _, _) in enumerate(axes) if atom not in mixed]
        result = torch.empty(view.shape, dtype=view.dtype, device=view.device)
        at = max(free, key=lambda at: view.shape[at], default=0)
        at_once = max(1, _ELEMENTS_AT_ONCE * view.shape[at] // max(view.numel(), 1)) if free else view.numel()
        for part, into in zip(view.split(at_once, at), result.split(at_once, at), strict=True):
            into.copy_(change(part.double(), axes))
        return result

    return by_blocks(tensor, dims, parts).contiguous()


class Basis:
    """A matrix float64 `[..., n, n]` for vectors of a space, with what its uses share."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @functools.cached_property
    def inverse_transposed(self) -> Tensor:
        """What contravariant dimensions take."""
        return torch.linalg.inv(self.matrix).mT

    @functools.cached_property
    def signs(self) -> Tensor | None:
        """Signs `[n]` where the matrix is H^T diag(signs), so that it takes n log n products; None where it is not."""
        n = self.matrix.shape[-1]
        if self.matrix.dim() != 2 or self.matrix.requires_grad or not factor(n):
            return None
        straight = hadamard_matrix(n).mT
        signs = torch.sign((straight * self.matrix).sum(0))
        return signs if torch.equal(straight * signs, self.matrix) else None

    def along(self, view: Tensor, at: int, sign: int, varies: Sequence[int]) -> Tensor:
        """The matrix (sign -1: its inverse transposed) on one axis of a view; `varies`: axes of its leading ones."""
        if self.signs is not None:
            # Orthogonal: both are the same.
            rows = view.movedim(at, -1) * self.signs
            return apply_hadamard(rows, factor(view.shape[at])).movedim(-1, at)
        given = self.matrix if sign > 0 else self.inverse_transposed
        letters = string.ascii_letters[: view.dim()]
        new = string.ascii_letters[view.dim()]
        leading = "".join(letters[axis] for axis in varies) if given.dim() > 2 else ""
        result = letters[:at] + new + letters[at + 1 :]
        return torch.einsum(f"{leading}{new}{letters[at]},{letters}->{result}", given, view)


def _turned(view: Tensor, axes: list[Axis], space: Space, basis: Basis) -> Tensor:
    atoms = [atom for atom, _, _ in axes]
    for at, (atom, sign, _) in enumerate(axes):
        if atom is space.atom:
            varies = [atoms.index(a) for a in space.varies] if basis.matrix.dim() > 2 else []
            view = basis.along(view, at, sign, varies)
    return view


def rotated(tensor: Tensor, dims: Sequence[Dim], space: Space, matrix: Tensor) -> Tensor:
    """A float64 tensor with the space's matrix (`[*sizes of space.varies, n, n]` or `[n, n]`) along its dimensions.

    Differentiable in both.
    """
    basis = Basis(matrix)
    return by_blocks(tensor, dims, lambda view, axes: _turned(view, axes, space, basis))


def apply_bases(editor: Editor, spaces: Spaces, bases: Mapping[str, Tensor]) -> list[Space]:
    """Change the basis of the named spaces; matrices as in `rotated`. Returns the spaces that were changed.

    Raises ValueError where gains of a space are not folded yet (permutations may pass them).
    """
    chosen = [space for space in spaces.spaces if space.name in bases]
    unfolded = [space.name for space in chosen if space.gains and space.group != Group.PERMUTATION]
    if unfolded:
        raise ValueError(f"fold the gains of {', '.join(unfolded)} first (fold_norm_affine)")
    shared = {space.name: Basis(bases[space.name].double()) for space in chosen}
    for node, inside in by_parameter(chosen).items():

        def change(view: Tensor, axes: list[Axis], inside: list[Space] = inside) -> Tensor:
            for space in inside:
                view = _turned(view, axes, space, shared[space.name])
            return view

        mixed = {space.atom for space in inside}
        mixed |= {a for space in inside if shared[space.name].matrix.dim() > 2 for a in space.varies}
        name = str(node.target)
        editor.set_tensor(name, by_parts(editor.tensors[name], spaces.dims_of[node], mixed, change))
    return chosen


def by_parameter(spaces: Iterable[Space]) -> dict[fx.Node, list[Space]]:
    """For each parameter the given spaces that it has dimensions in, each once, in their order."""
    found: dict[fx.Node, list[Space]] = {}
    for space in spaces:
        for node in dict.fromkeys(member.node for member in space.parameters):
            found.setdefault(node, []).append(space)
    return found


class Assignment:
    """Vectors for independent roots of a solution, and through it a vector for everything that moves.

    values: `[sizes of the root's support]` for each chosen root, in the order of `Solution.ordered_support`.
    """

    def __init__(self, solution: Solution, values: Mapping[Root, Tensor], multiply: bool) -> None:
        self.solution, self.values, self.multiply = solution, values, multiply
        free, self.expressed = solution.parametrize(list(values))
        if len(free) != len(values):
            raise ValueError("the chosen vectors are not independent")

    def _block(self, key: Key, block: Block) -> tuple[Tensor, list[Atom]] | None:
        """The vector of one block over its support, or None where nothing moves."""
        root, sign = self.solution.find((key, block))
        terms = self.expressed.get(root)
        if not terms:
            return None
        # All roots of one equation have one support, and its order is fixed.
        support = self.solution.ordered_support(root)
        total: Tensor | None = None
        for source, coefficient in terms.items():
            given = self.values[source].double()
            power = coefficient * sign
            if self.multiply:
                given = _power(given, power)
                total = given if total is None else total * given
            else:
                given = given * float(power)
                total = given if total is None else total + given
        assert total is not None
        return total, support

    def over(self, key: Key, dims: Sequence[Dim]) -> Tensor | None:
        """The vector spread over a tensor of these dimensions (those of the key), or None where nothing moves."""
        moved = False

        def fill(view: Tensor, axes: list[Axis]) -> Tensor:
            nonlocal moved
            found = self._block(key, frozenset(a for a, _, _ in axes))
            if found is None:
                return view
            moved = True
            vector, support = found
            atoms = [a for a, _, _ in axes]
            shape = [a.size if a in support else 1 for a in atoms]
            ordered = vector.permute([support.index(a) for a in atoms if a in support])
            return ordered.reshape(shape).expand_as(view)

        sizes = [size_of(d or ()) for d in dims]
        start = torch.ones if self.multiply else torch.zeros
        spread = by_blocks(start(sizes, dtype=torch.float64), dims, fill)
        return spread if moved else None


def along_parameter(assignment: Assignment, spaces: Spaces, key: Key) -> Tensor | None:
    """The vector of a parameter's key, float64, shaped to broadcast to the parameter; None where nothing moves."""
    dims, axes = spaces.dims_of[key.node], spaces.axes(key)
    vector = assignment.over(key, [dims[axis] for axis in axes])
    sizes = [size_of(dim or ()) if axis in axes else 1 for axis, dim in enumerate(dims)]
    return None if vector is None else vector.reshape(sizes)


def _power(vector: Tensor, power: Fraction) -> Tensor:
    if power == 1:
        return vector
    return vector.reciprocal() if power == -1 else vector ** float(power)


def project(solution: Solution, key: Key, dims: Sequence[Dim], wanted: Tensor) -> dict[Root, Tensor]:
    """Values for the roots behind a key that come closest to `wanted` (over the key's dimensions, float64).

    A root that depends on fewer atoms than the key gets the mean over the others, rotary pairs get the mean of their
    two; give logarithms for scales. Roots that are not free are left out.
    """
    found: dict[Root, Tensor] = {}
    counts: dict[Root, int] = {}

    def read(view: Tensor, axes: list[Axis]) -> Tensor:
        root, sign = solution.find((key, frozenset(a for a, _, _ in axes)))
        if not solution.is_free(root):
            return view
        support = solution.ordered_support(root)
        atoms = [a for a, _, _ in axes]
        drop = [i for i, a in enumerate(atoms) if a not in support]
        kept = [a for a in atoms if a in support]
        value = view.mean(drop) if drop else view
        value = value.permute([kept.index(a) for a in support]) * sign
        for axis, atom in enumerate(support):
            value = pairs_tied(value, axis, atom)
        found[root] = found[root] + value if root in found else value
        counts[root] = counts.get(root, 0) + 1
        return view

    by_blocks(wanted.double(), dims, read)
    return {root: value / counts[root] for root, value in found.items()}


def pairs_tied(value: Tensor, axis: int, atom: Atom) -> Tensor:
    """The values along an atom, those of a rotary pair replaced by their mean."""
    if atom.interleaved is None:
        return value
    pairs = value.unflatten(axis, (-1, 2) if atom.interleaved else (2, -1))
    return (
        pairs.mean(axis + 1 if atom.interleaved else axis, keepdim=True)
        .expand_as(pairs)
        .flatten(axis, axis + 1)
    )


def apply_factors(editor: Editor, spaces: Spaces, values: Mapping[Root, Tensor]) -> list[str]:
    """Scale every parameter as the equations say. Returns the names of the parameters that changed."""
    assignment = Assignment(spaces.scales, values, multiply=True)
    by_name: dict[str, list[Key]] = {}
    for key in spaces.scales.ordered_keys():
        if key.node.op == "get_attr" and key.use is None:
            by_name.setdefault(str(key.node.target), []).append(key)
    changed: list[str] = []
    for name, keys in by_name.items():
        held = editor.tensors[name]
        factors = []
        for key in keys:
            vector = along_parameter(assignment, spaces, key)
            if vector is not None:
                factors.append(vector)
        if factors:
            editor.set_tensor(name, _scaled(held, factors))
            changed.append(name)
    return changed


@torch.no_grad()
def _scaled(held: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The product with float64 factors that broadcast to it, rounded once."""
    if held.numel() <= _ELEMENTS_AT_ONCE:
        return functools.reduce(torch.mul, factors, held.double()).to(held.dtype).contiguous()
    result = torch.empty_like(held, memory_format=torch.contiguous_format)
    for rows in row_parts(held):
        part = held[rows].double()
        for given in factors:
            part = part * (given if given.shape[0] == 1 else given[rows])
        result[rows] = part
    return result


def row_parts(tensor: Tensor) -> Iterator[slice]:
    """Slices of the first dimension with as many elements as are held in float64 at a time."""
    rows = tensor.shape[0]
    at_once = max(1, _ELEMENTS_AT_ONCE * rows // max(tensor.numel(), 1))
    return (slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once))


def apply_shifts(editor: Editor, spaces: Spaces, values: Mapping[Root, Tensor]) -> list[fx.Node]:
    """Shift values by moving what is added to them into biases. Returns the nodes whose bias or table changed."""
    assignment = Assignment(spaces.shifts, values, multiply=False)
    nodes = {node.name: node for node in editor.graph.nodes}
    done: list[fx.Node] = []
    for key in spaces.shifts.ordered_keys():
        node = key.node
        if node.op == "get_attr" and key.use is None:
            added = along_parameter(assignment, spaces, key)
            if added is not None and not _stands_for_norm(spaces, node):
                held = editor.tensors[str(node.target)]
                editor.set_tensor(str(node.target), (held.double() + added).to(held.dtype))
                done.append(node)
    for old in spaces.centred:
        _shift_norm(editor, spaces, assignment, old, nodes[old.name], done)
    for absorber in spaces.absorbers:
        _shift_layer(editor, spaces, assignment, absorber, nodes[absorber.node.name], done)
    return done


def _stands_for_norm(spaces: Spaces, node: fx.Node) -> bool:
    """Whether a shift's key is the gain of a norm without a bias (the bias is added by `_shift_norm`)."""
    return any(u.target is aten.layer_norm.default and argument(u, "weight") is node for u in node.users)


def _shift_norm(
    editor: Editor, spaces: Spaces, assignment: Assignment, old: fx.Node, new: fx.Node, done: list[fx.Node]
) -> None:
    if argument(old, "bias") is not None or argument(old, "weight") is None:
        return
    weight = spaces.constant(argument(old, "weight"))
    added = assignment.over(Key(weight), spaces.dims_of[weight])
    if added is None:
        return
    held = editor.tensors[str(weight.target)]
    bias = editor.constant(added.to(held.dtype), f"{weight.target}_bias")
    x, shape, gain = new.args[:3]
    new.args = (x, shape, gain, bias, argument(new, "eps"))
    done.append(new)


def _shift_layer(
    editor: Editor,
    spaces: Spaces,
    assignment: Assignment,
    absorber: Absorber,
    new: fx.Node,
    done: list[fx.Node],
) -> None:
    def vector(key: Key | None) -> Tensor | None:
        if key is None or key.dim is None:
            return None
        return assignment.over(key, [spaces.dims_of[key.node][key.dim]])

    z_x, z_y = vector(absorber.input), vector(absorber.output)
    if z_x is None and z_y is None:
        return
    bias = absorber.bias
    held = editor.tensors[str(absorber.weight.target)]
    total = z_y
    if bias is not None:
        given = editor.tensors[str(bias.target)].double()
        total = given if total is None else given + total
    if z_x is not None:
        taken = _taken(held, absorber, z_x)
        total = -taken if total is None else total - taken
    assert total is not None
    if absorber.node.target == linear_grouped.overload:
        total = total.expand(held.shape[:2]).contiguous()
    name = str(bias.target) if bias is not None else f"{absorber.weight.target}_bias"
    set_bias(new, editor.constant(total.to(held.dtype), name))
    done.append(new)


def _taken(weight: Tensor, absorber: Absorber, z: Tensor) -> Tensor:
    """W z, float64 `[N]` (`[E, N]` of experts). The weight as it is: a change moves either scales or shifts."""
    if absorber.node.target == linear_grouped.overload:
        return torch.stack([matrix.double() @ z for matrix in weight])
    matrix = weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight
    matrix = matrix.mT if absorber.rows == 1 else matrix
    return torch.cat([matrix[rows].double() @ z for rows in row_parts(matrix)])


def set_bias(node: fx.Node, bias: fx.Node) -> None:
    """Let a linear or convolution add `bias`."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]  # an overload
    at = names.index("bias")
    if len(node.args) > at:
        node.update_arg(at, bias)
    elif len(node.args) == at:
        node.args = (*node.args, bias)
    else:
        node.update_kwarg("bias", bias)
