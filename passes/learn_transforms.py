"""Learn rotations, scales and shifts through the differentiable program, with the rounding in the loop (OSTQuant).

    minimize over R, s, z:   loss( Q-program(R, s, z), program )

The student is the program with quantizers on activations (straight-through gradients), keys and values, and with every
weight computed from the frozen one at each step: turned by its spaces' matrices, scaled and shifted for its site,
Hadamard-transformed where the site has one, and rounded (straight through). The teacher is the program itself; the loss
is the divergence over the teacher's most likely tokens, or the relative squared error of hidden states (kl_top.py).

What is learned is what channel spaces and edges allow: an orthogonal matrix for each space that turns (on the Stiefel
manifold), an angle for each rotary pair where keys are quantized and not turned online (both channels of a pair turn as
one: the tie without which the transform would not be an identity), and log-scales and shifts of each site.

Where rotations or scales are learned and inputs are transformed online, the start is what makes the quadratic model of
the loss least (`choose_by_curvature`); elsewhere rotations start from randomised Hadamard matrices, scales and shifts
from the search of `choose_edges`. The start is folded first and steps are taken from there; it is kept where training
does not end below it, and is all there is with `steps: 0`.

The gradient is small against its noise: on a language model of 5.5 million parameters those of two halves of 16,000
tokens have a cosine of 0.1 for rotations. Batches of some thousand tokens learn; many steps of few tokens wander.

Source: OSTQuant (arXiv 2501.13987).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..compiler.graph import argument
from ..compiler.hadamard import apply_hadamard
from ..compiler.program import Program
from ..compiler.recipe import ActivationFormat, Fold, Recipe
from ..compiler.spaces.analysis import Space, Spaces, analyse
from ..compiler.spaces.atoms import Group
from ..compiler.spaces.change import by_parameter, rotated
from ..compiler.spaces.transform import pair_matrix
from .calibrate import batch_arguments
from .choose_by_curvature import Chosen, choose_by_curvature
from .choose_edges import choose_edges
from .choose_rotations import choose_rotations
from .fold_rotation import fold_rotation
from .kl_top import loss_against
from .layers import ROUNDERS, group_size_for
from .quantize_activations import quantize_activations
from .quantize_cache import quantize_cache
from .ranges import QuantizedMatrix, requantized
from .sites import EdgeTransform, Reader, Site, added, along, find_sites
from .stiefel import RiemannianAdam

ROTATION_RATE, SCALE_RATE, SHIFT_RATE = 0.02, 0.004, 0.008
"""Of a step: the angle of a channel, the change of a log-scale, of a shift in units of the mean shift.

Scales at a rate of 0.01 (MiniLM) and 0.03 (a language model) end above where they started or learn nothing: a step of
every channel's scale by so much costs more than its direction gains.
"""

SEARCH_EVERY = 8
"""Steps after which the ranges of the rounded weights are searched again: one step turns them by little."""

Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, loss)."""


@dataclass
class Learned:
    """What was learned: matrices by the space's name, edge transforms by the site's name, and the loss on the way."""

    rotations: dict[str, Tensor]
    edges: dict[str, EdgeTransform]
    losses: list[float] = field(default_factory=list)
    before: float = 0.0
    after: float = 0.0


@dataclass
class _SiteParameters:
    site: Site
    log_scale: Tensor
    shift: Tensor | None
    hadamard: tuple[int, ...]
    step: float
    """Typical magnitude of the value, by which its shift is measured."""

    def transform(self) -> EdgeTransform:
        shift = None if self.shift is None else (self.shift * self.step).detach().double()
        return EdgeTransform(self.log_scale.detach().double().exp(), shift, self.hadamard)


def _parameters(site: Site, start: EdgeTransform, fold: Fold) -> _SiteParameters:
    scales = torch.ones(site.channels, dtype=torch.float64) if start.scale is None else start.scale
    log_scale = scales.log().float().requires_grad_(fold.scale == "learned")
    step, offset = 1.0, None
    if site.shift_refusal is None and (fold.shift == "learned" or start.shift is not None):
        z = torch.zeros(site.channels, dtype=torch.float64) if start.shift is None else start.shift
        step = float(z.abs().mean()) or 1.0
        offset = (z / step).float().requires_grad_(fold.shift == "learned")
    return _SiteParameters(site, log_scale, offset, start.hadamard, step)


def learn_transforms(
    program: Program,
    recipe: Recipe,
    fold: Fold,
    calibration: Iterable[Any],
    *,
    hadamard: Callable[[Sequence[Site], Spaces], set[str]],
    progress: Progress | None = None,
) -> Learned:
    """Transforms for a canonical program whose gains are folded (`rotation: learned`) or not.

    calibration: batches as in `calibrate`; they are gone through in turn. hadamard: which sites get an online
    transform.
    """
    batches = [batch_arguments(program, batch, index) for index, batch in enumerate(calibration)]
    generator = torch.Generator().manual_seed(fold.seed)
    start = _start(program, recipe, fold, calibration, hadamard)
    turned = fold_rotation(program.lent(), rotations=start.rotations).program if start.rotations else program
    student = _Student(turned, recipe, fold, start)
    loss = loss_against(program)
    order = _order(len(batches), fold.steps, generator)
    teacher = {}

    def of(index: int) -> Tensor:
        flat = program.flatten_inputs(*batches[index])
        if index not in teacher:
            with torch.no_grad():
                teacher[index] = pytree.tree_leaves(
                    program.graph_module(*batches[index][0], **batches[index][1])
                )
        expected = teacher[index] if len(teacher) <= 16 else teacher.pop(index)
        return loss(student.run(flat), expected)

    probe = list(range(min(4, len(batches))))
    with torch.no_grad():
        before = sum(float(of(i)) for i in probe) / len(probe)
    first = student.snapshot()
    learned = Learned({}, {}, before=before)
    optimizer = student.optimizer(fold)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(fold.steps, 1))
    for done, index in enumerate(order):
        optimizer.zero_grad()
        found = of(index)
        found.backward()
        optimizer.step()
        schedule.step()
        learned.losses.append(float(found.detach()))
        if progress is not None:
            progress(done + 1, fold.steps, learned.losses[-1])
    if fold.steps:
        with torch.no_grad():
            learned.after = sum(float(of(i)) for i in probe) / len(probe)
    if not fold.steps or not learned.after < before:
        student.restore(first)
        learned.after = before
    learned.rotations, learned.edges = student.rotations(), student.edges()
    return learned


def _start(
    program: Program,
    recipe: Recipe,
    fold: Fold,
    calibration: Iterable[Any],
    hadamard: Callable[[Sequence[Site], Spaces], set[str]],
) -> Chosen:
    """Rotations and edges that learning starts from."""
    spaces, sites = analyse(program), find_sites(program, recipe)
    names = hadamard(sites, spaces)
    if names and "learned" in (fold.rotation, fold.scale):
        found = choose_by_curvature(program, spaces, sites, fold, calibration, hadamard=names)
        if len(found.edges) == len(sites) and fold.scale in ("learned", "none"):
            return found
        rotations = found.rotations
    elif fold.rotation == "none":
        rotations = {}
    else:
        method = "hadamard" if fold.rotation == "learned" else fold.rotation
        rotations = choose_rotations(spaces, method, fold.seed)
    turned = fold_rotation(program.lent(), rotations=rotations).program if rotations else program
    scale: Any = "search" if fold.scale == "learned" else fold.scale
    shift: Any = "search" if fold.shift == "learned" else fold.shift
    chosen = choose_edges(
        turned, recipe, scale=scale, shift=shift, calibration=calibration, hadamard=names, seed=fold.seed
    )
    return Chosen(rotations, {name: choice.transform for name, choice in chosen.items()})


def _order(batches: int, steps: int, generator: torch.Generator) -> Iterator[int]:
    left: list[int] = []
    for _ in range(steps):
        if not left:
            left = torch.randperm(batches, generator=generator).tolist()
        yield left.pop()


class _Student:
    """The rounded program as a function of the transforms."""

    def __init__(self, program: Program, recipe: Recipe, fold: Fold, start: Chosen) -> None:
        """program: with the start's rotations folded."""
        self.spaces = analyse(program)
        self.start = start.rotations
        self.matrices = {
            name: torch.eye(matrix.shape[-1]).expand_as(matrix).contiguous().requires_grad_()
            for name, matrix in start.rotations.items()
            if fold.rotation == "learned"
        }
        self.angles = self._angles(recipe) if fold.rotation == "learned" else {}
        dynamic = _dynamic(recipe)
        quantized = (
            quantize_activations(program, recipe=dynamic).program if recipe.quantizes_activations else program
        )
        if recipe.kv is not None:
            quantized = quantize_cache(quantized, recipe=recipe).program
        self.program = quantized
        self.sites = [_parameters(site, start.edges[site.name], fold) for site in find_sites(program, recipe)]
        self.reader_of: dict[str, tuple[_SiteParameters, Reader]] = {
            reader.node: (parameters, reader)
            for parameters in self.sites
            for reader in parameters.site.readers
        }
        nodes = {node.name: node for node in quantized.graph.nodes}
        self.input_of: dict[str, _SiteParameters] = {}
        for parameters in self.sites:
            source = argument(nodes[parameters.site.readers[0].node], "input")
            if source.target in ROUNDERS:
                self.input_of[source.name] = parameters
        self.ranges: dict[str, QuantizedMatrix] = {}
        self.runs = 0
        self.turned = by_parameter(
            s for s in self.spaces.spaces if s.name in self.matrices or s.name in self.angles
        )

    def _angles(self, recipe: Recipe) -> dict[str, Tensor]:
        if recipe.kv is None:
            return {}
        found = {}
        for space in self.spaces.spaces:
            if space.group in (Group.PAIR, Group.PAIR_ORTHOGONAL):
                sizes = [atom.size for atom in space.varies]
                found[space.name] = torch.zeros(*sizes, space.size // 2, requires_grad=True)
        return found

    # ---- parameters

    def optimizer(self, fold: Fold) -> RiemannianAdam:
        """Rotations on the Stiefel manifold, everything else by plain Adam steps (scales in their logarithm)."""
        groups: list[dict[str, Any]] = []
        for matrix in self.matrices.values():
            if matrix.requires_grad:
                # The optimizer's step is a length of the whole matrix; this turns each channel by the rate.
                rate = ROTATION_RATE * matrix.shape[-1] ** 0.5
                groups.append({"params": [matrix], "lr": rate, "manifold": "stiefel"})
        if self.angles:
            groups.append(
                {"params": list(self.angles.values()), "lr": ROTATION_RATE, "manifold": "euclidean"}
            )
        scales = [p.log_scale for p in self.sites if p.log_scale.requires_grad]
        if scales:
            groups.append({"params": scales, "lr": SCALE_RATE, "manifold": "euclidean"})
        shifts = [p.shift for p in self.sites if p.shift is not None and p.shift.requires_grad]
        if shifts:
            groups.append({"params": shifts, "lr": SHIFT_RATE, "manifold": "euclidean"})
        return RiemannianAdam(groups)

    def _all(self) -> list[Tensor]:
        shifts = [p.shift for p in self.sites if p.shift is not None]
        return [*self.matrices.values(), *self.angles.values(), *(p.log_scale for p in self.sites), *shifts]

    def snapshot(self) -> list[Tensor]:
        """All values, to come back to."""
        return [t.detach().clone() for t in self._all()]

    def restore(self, values: Sequence[Tensor]) -> None:
        """Values of `snapshot`."""
        with torch.no_grad():
            for parameter, held in zip(self._all(), values, strict=True):
                parameter.copy_(held)

    def rotations(self) -> dict[str, Tensor]:
        """Float64 matrices: what the start's are turned by is made orthogonal to that precision."""
        found = dict(self.start)
        for name, matrix in self.matrices.items():
            left, _, right = torch.linalg.svd(matrix.detach().double())
            found[name] = left @ right @ self.start[name]
        for space in self.spaces.spaces:
            if space.name in self.angles:
                angle = self.angles[space.name].detach().double()
                found[space.name] = pair_matrix(angle, torch.ones_like(angle), bool(space.atom.interleaved))
        return found

    def edges(self) -> dict[str, EdgeTransform]:
        """The transform of every site."""
        return {p.site.name: p.transform() for p in self.sites}

    # ---- running

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs."""
        parameters = {str(node.target): self._turned(node, inside) for node, inside in self.turned.items()}
        if self.runs % SEARCH_EVERY == 0:
            self.ranges.clear()
        self.runs += 1
        result = _Interpreter(self, parameters).run(*flat, enable_io_processing=False)
        return pytree.tree_leaves(result)

    def rounded(self, reader: Reader, weight: Tensor) -> Tensor:
        """The weight as its format leaves it, with a straight-through gradient; ranges are searched now and then."""
        if getattr(reader.format, "format", "int") != "int":
            return weight + (reader.rounded(weight.detach()) - weight).detach()
        with torch.no_grad():
            if reader.node not in self.ranges:
                self.ranges[reader.node] = reader.quantized(weight)
            size = group_size_for(tuple(weight.shape), reader.format)
            found = requantized(weight, self.ranges[reader.node], bits=reader.format.bits, group_size=size)
        return weight + (found - weight).detach()

    def _turned(self, node: fx.Node, inside: Sequence[Space]) -> Tensor:
        held: Tensor = self.program.tensors[str(node.target)].detach()
        for space in inside:
            held = rotated(held, self.spaces.dims_of[node], space, self._matrix(space))
        return held

    def _matrix(self, space: Space) -> Tensor:
        if space.name in self.matrices:
            return self.matrices[space.name]
        angle = self.angles[space.name]
        return pair_matrix(angle, torch.ones_like(angle), bool(space.atom.interleaved))


class _Interpreter(fx.Interpreter):
    def __init__(self, student: _Student, parameters: dict[str, Tensor]) -> None:
        super().__init__(student.program.graph_module)
        self.student, self.parameters = student, parameters

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        held = self.parameters.get(str(target))
        return super().get_attr(target, args, kwargs) if held is None else held

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.student.input_of:
            site = self.student.input_of[n.name]
            x, params, *rest = self.fetch_args_kwargs_from_env(n)[0]
            return n.target(_moved(site, x), params, *rest)  # type: ignore[operator]  # one of ROUNDERS
        if n.name in self.student.reader_of:
            return self._read(n, *self.student.reader_of[n.name])
        return super().run_node(n)

    def _read(self, n: fx.Node, site: _SiteParameters, reader: Reader) -> Any:
        x, weight, bias = (self._value(argument(n, name)) for name in ("input", "weight", "bias"))
        ids = self._value(argument(n, "expert")) if reader.experts else None
        if ids is not None:
            weight, bias = (None if t is None else t.flatten(0, 1) for t in (weight, bias))
        if argument(n, "input").name not in self.student.input_of:
            x = _moved(site, x)  # activations stay float
        y = reader.run(x, self.student.rounded(reader, _folded(site, weight)), ids)
        total = bias
        if site.shift is not None:
            shift = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
            offset = shift @ (site.shift * site.step)
            total = offset if total is None else total + offset
        return y if total is None else y + added(total, y, ids, reader.experts, site.site.channel_dim)

    def _value(self, node: Any) -> Any:
        return self.env[node] if isinstance(node, fx.Node) else node


def _moved(site: _SiteParameters, x: Tensor) -> Tensor:
    dim = site.site.channel_dim
    if site.shift is not None:
        x = x - along(site.shift * site.step, x, dim)
    x = x * along(torch.exp(-site.log_scale), x, dim)
    return EdgeTransform(hadamard=site.hadamard).apply(x, dim) if site.hadamard else x


def _folded(site: _SiteParameters, weight: Tensor) -> Tensor:
    scaled = weight * along(torch.exp(site.log_scale), weight, 1)
    return apply_hadamard(scaled, site.hadamard) if site.hadamard else scaled


def _dynamic(recipe: Recipe) -> Recipe:
    """The recipe with ranges that follow each token: static ones are measured after the transforms are folded."""

    def free(form: ActivationFormat) -> ActivationFormat:
        return form.model_copy(update={"mode": "dynamic"}) if form.mode == "static" else form

    layers = [
        rule.model_copy(update={"activations": free(rule.activations)})
        if rule.activations is not None
        else rule
        for rule in recipe.layers
    ]
    return recipe.model_copy(update={"activations": free(recipe.activations), "layers": layers})
