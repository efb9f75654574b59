"""The least important channels, heads or stream channels become zero everywhere: `shrink_channels` then removes them.

    p[..., i, ...] = 0   for every parameter p of the space and its least important indices i

Which indices go together follows from the channel spaces: one space is one choice. Importance of index i:

    magnitude    sum over the space's parameters of |p[i]|^2 / |p|^2
    activation   sum over the readers of E[x_i^2] |W[:, i]|^2 / (the same, summed over i)       needs `calibration`

the share of what readers compute that comes from i (Wanda's score, squared and summed over a column).

structure: `channels` are hidden channels (of MLPs, convolutions, mixers), `heads` the heads of attentions with their
queries, keys, values and outputs (key heads with their group of queries), `stream` what norms see: the residual
stream.

LOSSY: nothing is retrained; expect another model at any fraction that is worth it. Refused, with the reason: spaces
from which no index can be removed, and those whose layers the recipe gives different structures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.dialect import linear_grouped
from ..compiler.editor import Editor
from ..compiler.graph import argument, module_path, place_of
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import Prune, Recipe
from ..compiler.spaces.analysis import Space, Spaces, analyse
from ..compiler.spaces.atoms import Atom, Group, leaves
from ..compiler.spaces.removal import labels, reason_against
from ..compiler.spaces.support import contracted
from .calibrate import stream
from .shrink_channels import place_of_space, readers

aten = torch.ops.aten

_FACTORS = (
    aten.linear.default, aten.embedding.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.convolution.default, aten.conv_transpose1d.default,
    aten.conv_transpose2d.input, aten.add.Tensor, aten.mul.Tensor, aten.matmul.default, aten.bmm.default,
    aten.rms_norm.default, aten.layer_norm.default, linear_grouped.overload,
)  # fmt: skip

PANEL = 16
"""Kernels store 16 output features side by side: channels are kept in multiples of it where there were."""


@define_pass(Guarantee.LOSSY)
def prune_channels(
    editor: Editor,
    *,
    recipe: Recipe,
    calibration: Iterable[Any] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> None:
    """Zero the least important indices of the spaces whose layers have a `prune.structure`."""
    spaces = analyse(editor.program)
    _refuse_pinned(editor, spaces, recipe)
    chosen: list[tuple[Space, Prune]] = []
    for space in spaces.spaces:
        form = _form(editor, spaces, space, recipe)
        if form is None:
            continue
        reason = reason_against(spaces, space)
        if reason is not None:
            editor.refused(place_of_space(space), f"{space.size} channels stay: {reason}")
        else:
            chosen.append((space, form))
    measured = [space for space, form in chosen if form.criterion == "activation"]
    power = _power(editor, spaces, measured, calibration, progress) if measured else {}
    for space, form in chosen:
        assert form.fraction is not None
        left = keep_count(space.size, form.fraction)
        if left == space.size:
            editor.refused(place_of_space(space), f"{form.fraction:g} of {space.size} channels is none")
            continue
        score = (
            _magnitude(editor, spaces, space)
            if form.criterion == "magnitude"
            else _energy(editor, spaces, space, power)
        )
        gone = score.argsort(stable=True)[: space.size - left]
        lost = float(score[gone].sum() / score.sum()) if float(score.sum()) else 0.0
        names = _zero(editor, spaces, space, gone)
        editor.applied(
            place_of_space(space),
            f"{len(gone)} of {space.size} {form.structure} become zero in {len(names)} parameters, {lost:.1%} of their "
            f"{form.criterion}",
            channels_before=space.size,
            channels_after=left,
            criterion=form.criterion,
            share_lost=lost,
        )


def keep_count(size: int, fraction: float) -> int:
    """How many of `size` indices stay: at least one, and whole panels where there were."""
    left = max(1, size - math.floor(fraction * size))
    return min(size, -(-left // PANEL) * PANEL) if size % PANEL == 0 and size > PANEL else left


def structure_of(spaces: Spaces, atom: Atom) -> str:
    """`heads`, `head dimensions`, `stream` or `channels`: what the operators on an atom make it."""
    found = "channels"
    for node in spaces.program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in (aten.rms_norm.default, aten.layer_norm.default):
            if _inside(spaces, argument(node, "input"), atom)[-1]:
                found = "stream"
            continue
        # Attention, also where it is written as products of two activations.
        for operand in _activations(node):
            inside = _inside(spaces, operand, atom)
            if any(inside[:-2]):
                return "heads"
            if any(inside):
                return "head dimensions"
    return found


def _activations(node: fx.Node) -> list[fx.Node]:
    if node.target == aten.scaled_dot_product_attention.default:
        return [argument(node, name) for name in ("query", "key", "value")]
    operands = [n for n in node.args[:2] if isinstance(n, fx.Node)]
    product = node.target in (aten.matmul.default, aten.bmm.default)
    return operands if product and all(n.op != "get_attr" for n in operands) else []


def _inside(spaces: Spaces, node: fx.Node, atom: Atom) -> list[bool]:
    """Which dimensions of a value have the atom."""
    return [any(a is atom for a, _ in leaves(dim)) for dim in spaces.dims_of[spaces.constant(node)]]


def _refuse_pinned(editor: Editor, spaces: Spaces, recipe: Recipe) -> None:
    """Say why channels that the recipe asks for are in no space."""
    seen: set[Atom] = set()
    for node in spaces.program.graph.nodes:
        sides = contracted(node) if node.op == "call_function" else []
        form = recipe.format_for(module_path(node), "prune") if len(sides) == 2 else None
        if form is None or form.structure is None or sides[1][0].op != "get_attr":
            continue
        operand, at = sides[0]
        for atom, _ in leaves(spaces.dims_of[spaces.constant(operand)][at]):
            pins = [r for r in atom.reasons if r.group == Group.NONE]
            if atom.size < 2 or atom in seen or not pins or structure_of(spaces, atom) != form.structure:
                continue
            seen.add(atom)
            where = f" ({pins[0].place})" if pins[0].place else ""
            editor.refused(place_of(node), f"{atom.size} {form.structure} stay: {pins[0].why}{where}")


def _form(editor: Editor, spaces: Spaces, space: Space, recipe: Recipe) -> Prune | None:
    """The recipe's format for the layers that read the space, None where they have none of its structure."""
    calls = [node for node, operand, _ in readers(spaces, space) if spaces.constant(operand).op != "get_attr"]
    forms = {module_path(node): recipe.format_for(module_path(node), "prune") for node in calls}
    wanted = [form for form in forms.values() if form is not None and form.structure is not None]
    if not wanted or structure_of(spaces, space.atom) != wanted[0].structure:
        return None
    if any(form != wanted[0] for form in forms.values()):
        names = ", ".join(f"{path or '<root>'}" for path in forms)
        editor.refused(place_of_space(space), f"its readers have different formats to prune ({names})")
        return None
    found: Prune = wanted[0]
    return found


def _along(tensor: Tensor, spaces: Spaces, node: fx.Node, space: Space) -> Tensor:
    """float64 `[n]`: squares of a parameter summed over everything but the space."""
    total = torch.zeros(space.size, dtype=torch.float64)
    for at, dim in enumerate(spaces.dims_of[node]):
        index = labels(dim, space.atom)
        if len(index) == tensor.shape[at] and bool((index >= 0).any()):
            others = [d for d in range(tensor.dim()) if d != at]
            squares = tensor.detach().double().square()
            energy = squares.sum(others) if others else squares
            total.index_add_(0, index[index >= 0], energy[index >= 0])
    return total


def _magnitude(editor: Editor, spaces: Spaces, space: Space) -> Tensor:
    total = torch.zeros(space.size, dtype=torch.float64)
    for node in dict.fromkeys(member.node for member in space.parameters):
        energy = _along(editor.tensors[str(node.target)], spaces, node, space)
        total += energy / energy.sum().clamp(min=1e-300)
    return total


def _power(
    editor: Editor,
    spaces: Spaces,
    chosen: list[Space],
    calibration: Iterable[Any] | None,
    progress: Callable[[int, int | None], None] | None,
) -> dict[str, Tensor]:
    """Mean squares of what the spaces' readers read, along the dimension that they sum over, by the value's name."""
    at = {operand.name: dim for space in chosen for _, operand, dim in readers(spaces, space)}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def observe(name: str, found: Tensor, batch: int) -> None:
        rows = found.movedim(at[name], -1).flatten(0, -2).double()
        sums[name] = sums.get(name, 0) + rows.square().sum(0)
        counts[name] = counts.get(name, 0) + len(rows)

    given = calibration if calibration is not None else [_examples(editor)]
    stream(editor.program, at, given, observe, progress)
    return {name: total / counts[name] for name, total in sums.items()}


def _examples(editor: Editor) -> Any:
    program = editor.program
    return program.example_args if not program.example_kwargs else dict(program.example_kwargs)


def _energy(editor: Editor, spaces: Spaces, space: Space, power: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(space.size, dtype=torch.float64)
    for node, operand, dim in readers(spaces, space):
        weight, axis = contracted(node)[1]
        held = editor.tensors.get(str(weight.target)) if weight.op == "get_attr" else None
        if held is None:
            continue
        others = [d for d in range(held.dim()) if d != axis % held.dim()]
        energy = held.detach().double().square().sum(others) * power[operand.name]
        index = labels(spaces.dims_of[spaces.constant(operand)][dim], space.atom)
        share = energy / energy.sum().clamp(min=1e-300)
        total.index_add_(0, index[index >= 0], share[index >= 0])
    return total


def _zero(editor: Editor, spaces: Spaces, space: Space, gone: Tensor) -> list[str]:
    """Parameters that are factors or terms; what others divide by or take a root of stays."""
    names = []
    for node in dict.fromkeys(member.node for member in space.parameters):
        name = str(node.target)
        readers = [
            u for n in spaces.program.graph.nodes if n.op == "get_attr" and n.target == name for u in n.users
        ]
        if any(user.target not in _FACTORS for user in readers):
            continue
        held = editor.tensors[name].detach().clone()
        for at, dim in enumerate(spaces.dims_of[node]):
            index = labels(dim, space.atom)
            if len(index) == held.shape[at]:
                held.index_fill_(at, torch.isin(index, gone).nonzero().flatten(), 0)
        editor.set_tensor(name, held)
        names.append(name)
    return names
