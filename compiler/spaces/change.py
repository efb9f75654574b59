"""Applying a change of basis, a scale or a shift to every parameter that it touches.

    bases    {space: T}        p' = T p along every dimension of the space (T^-t where the tie is contravariant)
    factors  {root: vector}    p' = p * product of vector^coefficient      (scales; the exponents solve the equations)
    shifts   {root: vector}    biases and tables: b' = b - W z_x + z_y, E' = E + z

All products are computed in float64 and rounded once to the parameter's own type. A parameter is a nest of atoms
(atoms.py): each of its direct summands is viewed with one axis for each atom, changed there, and joined again.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, fx

from ..editor import Editor
from ..graph import argument
from .analysis import Absorber, Space, Spaces
from .atoms import Atom, Dim, Group, Ref, flatten, size_of
from .potentials import Block, Key, Solution

aten = torch.ops.aten

Root = tuple[Key, Block]
Axis = tuple[Atom, int, int]
"""Atom, sign, and the dimension of the parameter that it lies in."""


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


def _inverse_transposed(matrix: Tensor) -> Tensor:
    return torch.linalg.inv(matrix).mT


def rotated(tensor: Tensor, dims: Sequence[Dim], space: Space, matrix: Tensor) -> Tensor:
    """A float64 tensor with the space's matrix (`[*sizes of space.varies, n, n]` or `[n, n]`) along its dimensions.

    Differentiable in both.
    """
    contravariant: list[Tensor] = []

    def change(view: Tensor, axes: list[Axis]) -> Tensor:
        atoms = [a for a, _, _ in axes]
        for at, (atom, sign, _) in enumerate(axes):
            if atom is not space.atom:
                continue
            given = matrix
            if sign < 0:
                if not contravariant:
                    contravariant.append(_inverse_transposed(matrix))
                given = contravariant[0]
            letters = string.ascii_letters[: len(axes)]
            new = string.ascii_letters[len(axes)]
            varies = "".join(letters[atoms.index(a)] for a in space.varies) if given.dim() > 2 else ""
            result = letters[:at] + new + letters[at + 1 :]
            view = torch.einsum(f"{varies}{new}{letters[at]},{letters}->{result}", given, view)
        return view

    return by_blocks(tensor, dims, change)


def apply_bases(editor: Editor, spaces: Spaces, bases: Mapping[str, Tensor]) -> list[Space]:
    """Change the basis of the named spaces; matrices as in `rotated`. Returns the spaces that were changed.

    Raises ValueError where gains of a space are not folded yet (permutations may pass them).
    """
    chosen = [space for space in spaces.spaces if space.name in bases]
    unfolded = [space.name for space in chosen if space.gains and space.group != Group.PERMUTATION]
    if unfolded:
        raise ValueError(f"fold the gains of {', '.join(unfolded)} first (fold_norm_affine)")
    for node, inside in by_parameter(chosen).items():
        held = editor.tensors[str(node.target)]
        changed = held.double()
        for space in inside:
            changed = rotated(changed, spaces.dims_of[node], space, bases[space.name].double())
        editor.tensors[str(node.target)] = changed.to(held.dtype).contiguous()
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
    # One parameter at a time: in float64 all of them would be twice the model.
    for name, keys in by_name.items():
        held: Tensor | None = None
        for key in keys:
            dims = spaces.dims_of[key.node]
            factor = assignment.over(key, dims if key.dim is None else [dims[key.dim]])
            if factor is None:
                continue
            held = editor.tensors[name].double() if held is None else held
            if key.dim is not None:
                factor = factor.reshape([-1 if d == key.dim else 1 for d in range(held.dim())])
            held = held * factor
        if held is not None:
            editor.tensors[name] = held.to(editor.tensors[name].dtype).contiguous()
            changed.append(name)
    return changed


def apply_shifts(editor: Editor, spaces: Spaces, values: Mapping[Root, Tensor]) -> list[fx.Node]:
    """Shift values by moving what is added to them into biases. Returns the nodes whose bias or table changed."""
    assignment = Assignment(spaces.shifts, values, multiply=False)
    nodes = {node.name: node for node in editor.graph.nodes}
    done: list[fx.Node] = []
    for key in spaces.shifts.ordered_keys():
        node = key.node
        if node.op == "get_attr" and key.use is None:
            dims = spaces.dims_of[node]
            added = assignment.over(key, dims if key.dim is None else [dims[key.dim]])
            if added is not None and not _stands_for_norm(spaces, node):
                held = editor.tensors[str(node.target)]
                editor.tensors[str(node.target)] = (held.double() + added).to(held.dtype)
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
        # The weight as it is: a change moves either scales or shifts.
        matrix = held.double().flatten(2).sum(2) if held.dim() > 2 else held.double()
        taken = (matrix.mT if absorber.rows == 1 else matrix) @ z_x
        total = -taken if total is None else total - taken
    assert total is not None
    name = str(bias.target) if bias is not None else f"{absorber.weight.target}_bias"
    set_bias(new, editor.constant(total.to(held.dtype), name))
    done.append(new)


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
