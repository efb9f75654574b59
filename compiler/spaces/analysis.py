"""Channel-space analysis: which parameters must change basis together, and by which maps.

    analyse(program) -> Spaces

A *change of basis* gives every dimension of every value an invertible matrix T. The program computes the same function
when the choice satisfies every operator, is the identity at inputs and outputs, and every parameter is replaced by what
the constraints give. Rules (`rules/`) state the constraint of one operator each: which dimensions are tied (atoms.py),
what group they may take, and the equations of scales and shifts (potentials.py). An operator without a rule allows
nothing, and says so. Nothing looks at names; the graph is read once, in order.

`Spaces` is the result: a space for each set of tied atoms with its group, what it is made of and what set its bound;
the gains that fold away; and the solutions of the scale and shift equations.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import argument, place_of, value
from ..program import Program
from .atoms import Atom, Dim, Group, Reason, flatten, leaves, new, restrict, unify
from .potentials import Block, Key, Potentials, Solution

Rule = Callable[["Analysis", fx.Node], None]
RULES: dict[object, Rule] = {}
"""What is known about operators, by overload; filled by the modules in `rules/`."""


def rule(*targets: object) -> Callable[[Rule], Rule]:
    """Register the constraint of some operators."""

    def register(function: Rule) -> Rule:
        for target in targets:
            if target in RULES:
                raise ValueError(f"{target} has two rules")
            RULES[target] = function
        return function

    return register


@dataclass(frozen=True)
class Gain:
    """A vector that multiplies the channels of a value (a norm's weight): in its way where a rotation should pass."""

    node: fx.Node
    parameter: fx.Node
    input: fx.Node
    norm: bool


@dataclass(frozen=True)
class Absorber:
    """A linear or convolution whose bias takes up shifts: b' = b - W z_x + z_y.

    input, output: whose vectors z_x and z_y are, None where that side is pinned. rows: the weight's dimension of
    outputs.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    input: Key | None
    output: Key | None
    rows: int


class Analysis:
    """The state that rules write into."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.dims_of: dict[fx.Node, list[Dim]] = {}
        self.scales = Potentials("scale")
        self.shifts = Potentials("shift")
        self.gains: list[Gain] = []
        self.centred: list[fx.Node] = []
        """LayerNorms, whose input may lose its mean."""
        self.axes: set[tuple[fx.Node, int]] = set()
        """Dimensions of weight matrices, which have a scale of their own."""
        self.absorbers: list[Absorber] = []
        self.carried: dict[fx.Node, Dim] = {}
        """An index that every row of a value has beside its dimensions: the expert that it chose."""
        self.stacked: set[fx.Node] = set()
        """Weights of a matrix for each expert, whose axes have a scale for each (dimension 0)."""
        self._choosers: dict[tuple[fx.Node, int], Dim] = {}
        self._constants: dict[str, fx.Node] = {}

    # ---- structure

    def constant(self, node: fx.Node) -> fx.Node:
        """The one node that stands for a parameter, however often the graph reads it."""
        return self._constants.setdefault(str(node.target), node) if node.op == "get_attr" else node

    def is_parameter(self, node: object) -> bool:
        """Whether a node reads a floating-point constant."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return False
        held = self.program.tensors.get(str(node.target))
        return isinstance(held, Tensor) and held.is_floating_point()

    def dims(self, node: fx.Node) -> list[Dim]:
        """The dimensions of a value; those of a parameter are made when it is first read."""
        node = self.constant(node)
        if node not in self.dims_of:
            self.dims_of[node] = self.fresh(node)
        return self.dims_of[node]

    def fresh(self, node: fx.Node) -> list[Dim]:
        """New dimensions of the node's shape."""
        fake = value(node)
        assert isinstance(fake, Tensor)
        return [new(size) if isinstance(size, int) else None for size in fake.shape]

    def chooser(self, ids: fx.Node, count: int) -> Dim:
        """The index of what each row chooses of `count`, by a value of ids."""
        return self._choosers.setdefault((ids, count), new(count))

    def tie(self, node: fx.Node, a: Dim, b: Dim, sign: int = 1) -> None:
        """The two dimensions take one matrix (sign -1: its inverse transposed)."""
        unify(a, b, Reason(Group.NONE, "the sizes on both sides do not fit", place_of(node)), sign)

    def allow(self, node: fx.Node, dims: Iterable[Dim], group: Group, why: str) -> None:
        """Leave dimensions no more than `group`."""
        for dim in dims:
            restrict(dim, Reason(group, why, place_of(node)))

    # ---- potentials

    def key(self, node: fx.Node, dim: int | None = None) -> Key:
        """The vector of a value, or of a dimension of a weight matrix."""
        node = self.constant(node)
        if dim is not None:
            self.axes.add((node, dim))
        return Key(node, dim)

    def same_scale(self, a: fx.Node, b: fx.Node) -> None:
        """Both values have one scale."""
        self.scales.equal(self.key(a), self.key(b))

    def same_shift(self, a: fx.Node, b: fx.Node) -> None:
        """Both values have one shift."""
        self.shifts.equal(self.key(a), self.key(b))

    def pin_scale(self, node: fx.Node, at: fx.Node, why: str) -> None:
        """A value cannot be scaled."""
        self.scales.pin(self.key(at), Reason(Group.NONE, why, place_of(node)))

    def pin_shift(self, node: fx.Node, at: fx.Node, why: str, only: Dim = None) -> None:
        """A value cannot be shifted (the part of it with the indices of `only`, if given)."""
        self.shifts.pin(self.key(at), Reason(Group.NONE, why, place_of(node)), only)

    def pin(self, node: fx.Node, at: fx.Node, why: str) -> None:
        """Neither basis, nor scale, nor shift of a value can change."""
        self.allow(node, self.dims(at), Group.NONE, why)
        self.pin_scale(node, at, why)
        self.pin_shift(node, at, why)

    def is_own_bias(self, bias: fx.Node | None) -> bool:
        """Whether no operator before has this bias: two uses of one cannot take up different shifts."""
        if bias is None:
            return True
        others = (a.bias for a in self.absorbers if a.bias is not None)
        return all(self.constant(other) is not self.constant(bias) for other in others)


def tensors(node: fx.Node) -> list[fx.Node]:
    """The tensors that a call reads."""
    return [n for n in node.all_input_nodes if isinstance(value(n), Tensor)]


def _without_rule(analysis: Analysis, node: fx.Node) -> None:
    why = f"{node.target} has no rule" if node.op == "call_function" else f"it is an {node.op} of the program"
    for operand in tensors(node):
        analysis.pin(node, operand, why)
    if isinstance(value(node), Tensor):
        analysis.pin(node, node, why)


def _visit(analysis: Analysis, node: fx.Node) -> None:
    if node.op == "get_attr":
        return
    fake = value(node)
    if node.op == "placeholder" or node.op == "output":
        if node.op == "output" or isinstance(fake, Tensor):
            _without_rule(analysis, node)
        return
    if node.target is operator.getitem and not isinstance(fake, Tensor):
        return
    given = RULES.get(node.target)
    floating = not isinstance(fake, Tensor) or fake.is_floating_point()
    if given is None or not floating:
        _without_rule(analysis, node)
        return
    given(analysis, node)
    if node.target in ROW_BY_ROW:
        _carry(analysis, node)
    # A shape in which the rule did not say a dimension is one that it forgot: never free.
    if isinstance(fake, Tensor) and node not in analysis.dims_of:
        raise AssertionError(f"the rule of {node.target} gave {node} no dimensions")


ROW_BY_ROW: set[object] = set()
"""Operators whose result has the rows of what they read, each made of that row alone; filled by `rules/`."""
_ALONG = (torch.ops.aten.slice.Tensor, torch.ops.aten.narrow.default, torch.ops.aten.cat.default)
"""Those of them that work along a dimension, which may be that of the rows."""


def _carry(analysis: Analysis, node: fx.Node) -> None:
    """Rows carry on what all operands' rows carry; constants are the same for all rows."""
    carried = [analysis.carried.get(x) for x in tensors(node) if not analysis.is_parameter(x)]
    along_rows = node.target in _ALONG and argument(node, "dim") % len(value(node).shape) == 0
    alike = all(c == carried[0] for c in carried)
    if carried and carried[0] and alike and len(value(node).shape) == 2 and not along_rows:
        analysis.carried[node] = carried[0]


@dataclass(frozen=True)
class Member:
    """One place of a space: a dimension of a parameter or of a value.

    sign: -1 where it takes the inverse transposed of the space's matrix.
    """

    node: fx.Node
    dim: int
    sign: int


@dataclass
class Space:
    """A set of dimensions that change basis together.

    group: the maps that all operators allow, after the gains in `Spaces.foldable` are gone. varies: atoms on whose
    index the matrix may depend (heads). bound: the reasons that set the group, the decisive ones first.
    """

    name: str
    atom: Atom
    group: Group
    varies: tuple[Atom, ...]
    parameters: list[Member]
    values: list[Member]
    bound: list[Reason]
    gains: list[Gain] = field(default_factory=list)
    """Gains that must be folded before anything but a permutation is applied."""

    @property
    def size(self) -> int:
        """Number of channels."""
        return self.atom.size

    @property
    def copies(self) -> int:
        """Number of independent matrices."""
        return math.prod(atom.size for atom in self.varies)


@dataclass
class Spaces:
    """The result of the analysis of one program."""

    program: Program
    spaces: list[Space]
    scales: Solution
    shifts: Solution
    gains: list[Gain]
    foldable: list[Gain]
    kept: list[tuple[Gain, Reason]]
    dims_of: dict[fx.Node, list[Dim]] = field(repr=False)
    constant: Callable[[fx.Node], fx.Node] = field(repr=False)
    centred: list[fx.Node] = field(default_factory=list, repr=False)
    absorbers: list[Absorber] = field(default_factory=list, repr=False)
    carried: dict[fx.Node, Dim] = field(default_factory=dict, repr=False)
    stacked: set[fx.Node] = field(default_factory=set, repr=False)

    def axes(self, key: Key) -> tuple[int, ...]:
        """The dimensions of a node that a key's vector is over."""
        return axes_of(key, len(self.dims_of[key.node]), self.stacked)

    def vector_dims(self, node: fx.Node) -> list[Dim]:
        """What a value's vector is over: what its rows carry, of one size for all, and its dimensions."""
        return [self.carried.get(node, ()), *self.dims_of[node]]

    def key(self, node: fx.Node, dim: int | None = None) -> Key:
        """The key of a value's vector, or of a dimension of a weight matrix."""
        return Key(self.constant(node), dim)

    def space_of(self, atom: Atom) -> Space | None:
        """The space of a plain root, or None where nothing may change."""
        return self._by_atom.get(atom)

    def __post_init__(self) -> None:
        self._by_atom = {space.atom: space for space in self.spaces}


def analyse(program: Program) -> Spaces:
    """Find the spaces of a canonical program (`canonicalize` first; a spelling without a rule is a pin)."""
    importlib.import_module(".rules", __package__)  # fills the table
    analysis = Analysis(program)
    for node in program.graph.nodes:
        _visit(analysis, node)
    return _resolve(analysis)


def blocks_of_dims(dims: Iterable[Dim]) -> list[Block]:
    """The direct summands of a value: the plain atoms of each."""
    choices: list[list[frozenset[Atom]]] = []
    for dim in dims:
        for atom, _ in flatten(dim or ()):
            choices.append(_parts(atom))
    return list(dict.fromkeys(frozenset().union(*chosen) for chosen in product(*choices)))


def axes_of(key: Key, rank: int, stacked: Collection[fx.Node]) -> tuple[int, ...]:
    """The dimensions that a key's vector is over: an axis of experts has a scale for each, a use of one does not."""
    if key.dim is None:
        return tuple(range(rank))
    return (0, key.dim) if key.node in stacked and key.use is None else (key.dim,)


def _parts(atom: Atom) -> list[frozenset[Atom]]:
    if atom.sum is None:
        return [frozenset([atom])]
    return [block for part in atom.sum for block in blocks_of_dims([part])]


def _resolve(analysis: Analysis) -> Spaces:
    def blocks_of(key: Key) -> list[Block]:
        dims = analysis.dims(key.node)
        axes = axes_of(key, len(dims), analysis.stacked)
        return blocks_of_dims([analysis.carried.get(key.node, ()), *(dims[axis] for axis in axes)])

    _pin_mixed_uses(analysis)
    scales, shifts = analysis.scales.close(blocks_of), analysis.shifts.close(blocks_of)
    foldable, kept = _foldable(analysis, scales)
    for gain, reason in kept:
        for dim in analysis.dims(gain.parameter):
            restrict(
                dim,
                Reason(Group.PERMUTATION, f"a gain that cannot be folded: {reason.why}", place_of(gain.node)),
            )
    return Spaces(
        analysis.program,
        _spaces(analysis, foldable),
        scales,
        shifts,
        analysis.gains,
        foldable,
        kept,
        analysis.dims_of,
        analysis.constant,
        analysis.centred,
        analysis.absorbers,
        analysis.carried,
        analysis.stacked,
    )


def _pin_mixed_uses(analysis: Analysis) -> None:
    """A parameter read as a matrix here and as a plain value there has no scale; one bias of two linears no shift."""
    whole = {key.node for terms in analysis.scales.equations for _, key in terms if key.dim is None}
    whole |= {key.node for key, _, _ in analysis.scales.pins if key.dim is None}
    for node, dim in analysis.axes:
        if node in whole:
            reason = Reason(
                Group.NONE, "the parameter is read as a matrix and as a plain value", place_of(node)
            )
            analysis.scales.pin(Key(node, dim), reason)
            analysis.scales.pin(Key(node), reason)


def _foldable(analysis: Analysis, scales: Solution) -> tuple[list[Gain], list[tuple[Gain, Reason]]]:
    """Gains that can all become one at the same time, and the others with the reason."""
    foldable: list[Gain] = []
    kept: list[tuple[Gain, Reason]] = []
    wanted: list[Any] = []
    for gain in analysis.gains:
        key = analysis.key(gain.parameter)
        roots = [scales.find((key, block))[0] for block in scales.blocks(key)]
        reason = scales.pin_of(key)
        if reason is None and any(
            _wide(scales.variable(r).support) != _wide(b)
            for r, b in zip(roots, scales.blocks(key), strict=True)
        ):
            reason = Reason(
                Group.NONE, "it would have to be constant over part of its channels", place_of(gain.node)
            )
        if reason is None and any(
            a.group in (Group.PAIR, Group.PAIR_ORTHOGONAL) or a.interleaved is not None
            for a, _ in leaves(analysis.dims(gain.parameter)[-1])
        ):
            reason = Reason(
                Group.NONE, "its channels are rotary pairs, whose two scales are one", place_of(gain.node)
            )
        if reason is None:
            free, _ = scales.parametrize([*wanted, *(r for r in roots if r not in wanted)])
            if all(r in free for r in [*wanted, *roots]) and not any(r in wanted for r in roots):
                wanted.extend(roots)
                foldable.append(gain)
                continue
            reason = Reason(Group.NONE, "another gain takes the same freedom", place_of(gain.node))
        kept.append((gain, reason))
    return foldable, kept


def _wide(atoms: Iterable[Atom]) -> frozenset[Atom]:
    """Atoms without the marks of parts."""
    return frozenset(atom for atom in atoms if atom.size > 1)


def _spaces(analysis: Analysis, foldable: list[Gain]) -> list[Space]:
    """One space for each plain root that may change, in the order of the graph."""
    members: dict[Atom, tuple[list[Member], list[Member]]] = {}
    beside: dict[Atom, set[Atom]] = {}
    for node, dims in analysis.dims_of.items():
        parameter = node.op == "get_attr"
        for block in blocks_of_dims(dims):
            for atom in block:
                others = set(block) - {atom}
                beside[atom] = others if atom not in beside else beside[atom] & others
        for index, dim in enumerate(dims):
            for atom, sign in leaves(dim):
                members.setdefault(atom, ([], []))[0 if parameter else 1].append(Member(node, index, sign))
    found = []
    for atom, (parameters, values) in members.items():
        group = atom.group
        if group == Group.NONE or atom.size < 2 or not parameters:
            continue
        indices = sorted(_wide(beside[atom]), key=lambda a: a.serial)
        varies = tuple(indices) if group != Group.PERMUTATION else ()
        bound = [r for r in atom.reasons if r.group == group] + [r for r in atom.reasons if r.group != group]
        inside = {member.node for member in parameters}
        gains = [gain for gain in foldable if gain.parameter in inside]
        found.append(Space("", atom, group, varies, parameters, values, bound, gains))
    for index, space in enumerate(found):
        space.name = f"space{index}"
    return found
