"""Every row of the legality table: what is legal is accepted and exact, what is not is refused, for the right reason.

A refusal alone proves little (a rule that always refuses passes), so the illegal change is also forced, past the check,
and has to change the outputs; and side conditions are removed from the rules one by one, after which the random fold
that every program must survive has to fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  # registers transformers::grouped_mm_fallback
from torch import Tensor, nn
from torch.nn import functional as F

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.dialect import linear_grouped
from isofold.compiler.dialect.gated import gated
from isofold.compiler.dialect.rotary import rotary
from isofold.compiler.driver import relative_error
from isofold.compiler.editor import Editor
from isofold.compiler.graph import module_path
from isofold.compiler.passes import PassReport
from isofold.compiler.program import Program
from isofold.compiler.spaces import sample
from isofold.compiler.spaces.analysis import RULES, Analysis, Space, Spaces, analyse
from isofold.compiler.spaces.atoms import Group
from isofold.compiler.spaces.change import apply_bases, apply_factors, apply_shifts, project
from isofold.compiler.spaces.potentials import Key
from isofold.compiler.spaces.rules import attention, contraction, convolution, experts
from isofold.compiler.spaces.transform import pair_matrix, random_orthogonal
from isofold.passes.center_norms import center_norms
from isofold.passes.fold_norm_affine import fold_norm_affine
from isofold.passes.fold_permutation import fold_permutation
from isofold.passes.fold_rotation import fold_rotation
from isofold.passes.fold_scale import channel_key, fold_scale
from isofold.passes.untie_embeddings import untie_embeddings

aten = torch.ops.aten
WRONG = 1e-3
"""Legal changes stay below 1e-12 here; everything illegal must show above this."""


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def program_of(module: nn.Module, *args: Tensor) -> Program:
    """The canonical program in float64, all parameters random."""
    module = module.double().eval()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            noise = torch.randn(parameter.shape, generator=seed(index), dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.add_(0.4 * noise)
    return canonicalize(capture(module, args)).program


def error(before: Program, after: Program) -> float:
    return relative_error(before.run_float64(), after.run_float64())


def random_folds(program: Program) -> Program:
    """Everything that the analysis allows, drawn at random and applied."""
    g = seed(7)
    program = center_norms(fold_norm_affine(program).program).program
    program = forced_bases(program, lambda spaces: sample.random_bases(spaces, g))
    program = fold_permutation(program, orders=sample.random_orders(analyse(program), g)).program
    for draw, apply in ((sample.random_factors, apply_factors), (sample.random_shifts, apply_shifts)):
        spaces, editor = analyse(program), Editor(program)
        apply(editor, spaces, draw(spaces, g))  # type: ignore[operator]
        program = editor.finish()
    return program


def forced_bases(program: Program, draw: Callable[[Spaces], dict[str, Tensor]]) -> Program:
    """Apply matrices without asking whether they are in the group, or whether gains are folded."""
    spaces = analyse(program)
    for space in spaces.spaces:
        space.gains = []
    editor = Editor(program)
    apply_bases(editor, spaces, draw(spaces))
    return editor.finish()


def space_of(spaces: Spaces, parameter: str, dim: int) -> Space:
    """The space of the innermost atom of a parameter's dimension (the channels of a head, not the heads)."""
    found = [
        space
        for space in spaces.spaces
        if any(str(m.node.target).endswith(parameter) and m.dim == dim for m in space.parameters)
    ]
    assert found, (parameter, dim)
    return found[-1]


def node_of(program: Program, module: str) -> str:
    """The name of the linear of a module."""
    targets = (aten.linear.default, aten.conv1d.default)
    found = [n for n in program.graph.nodes if n.target in targets and module_path(n).endswith(module)]
    assert len(found) == 1, (module, found)
    return str(found[0].name)


def reasons(report: PassReport) -> str:
    return "; ".join(r.reason for r in report.refused)


def turn(program: Program, parameter: str, dim: int, matrix: Tensor) -> tuple[Program, PassReport]:
    result = fold_rotation(program, rotations={space_of(analyse(program), parameter, dim).name: matrix})
    return result.program, result.report


# ---- modules


class Residual(nn.Module):
    """Embedding, blocks of norm and linear on a stream, head."""

    def __init__(self, norm: Callable[[], nn.Module], tied: bool = False, width: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.norms = nn.ModuleList([norm(), norm(), norm()])
        self.up = nn.ModuleList([nn.Linear(width, 6) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(6, width) for _ in range(2)])
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(F.silu(up(norm(x))))
        return self.head(self.norms[2](x))


IDS = torch.randint(0, 11, (3, 5), generator=seed(1))


def rms() -> nn.Module:
    return nn.RMSNorm(8, eps=0.1)


def layer() -> nn.Module:
    return nn.LayerNorm(8, eps=0.1)


class Heads(nn.Module):
    """Self-attention with 4 query heads of 4 channels, optionally grouped, rotary, with sinks, normed, or biased by
    head."""

    def __init__(self, kv: int = 4, rotary: bool = False, sink: bool = False, mask: bool = False) -> None:
        super().__init__()
        self.kv, self.rotary, self.sink = kv, rotary, sink
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 4 * kv), nn.Linear(8, 4 * kv)
        self.o = nn.Linear(16, 8)
        angle = torch.arange(5)[:, None] * torch.tensor([1.0, 0.3])
        self.register_buffer("angle", torch.cat([angle, angle], -1).double())
        if mask:
            self.register_buffer("mask", torch.randn(1, 4, 5, 5, generator=seed(3)).double())

    def turned(self, x: Tensor) -> Tensor:
        half = torch.cat([-x[..., 2:], x[..., :2]], -1)
        return x * self.angle.cos() + half * self.angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.rotary:
            q, k = self.turned(q), self.turned(k)
        if self.sink:
            scores = q @ k.transpose(-1, -2) / 2
            scores = torch.cat([scores, torch.ones_like(scores[..., :1])], -1)
            y = scores.softmax(-1)[..., :-1] @ v
        else:
            mask = self.mask if hasattr(self, "mask") else None
            y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=self.kv != 4)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], 16))


X = torch.randn(2, 5, 8, generator=seed(2), dtype=torch.float64)


class Between(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, first: nn.Module, function: Callable[[Tensor], Tensor], second: nn.Module) -> None:
        super().__init__()
        self.first, self.function, self.second = first, function, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


# ---- norms


def test_rotation_needs_gains_folded_first() -> None:
    program = program_of(Residual(rms), IDS)
    matrix = random_orthogonal(8, seed(0))
    same, report = turn(program, "table.weight", 1, matrix)
    assert "gains are not folded yet" in reasons(report)
    assert error(program, same) == 0
    with pytest.raises(ValueError, match="fold the gains"):
        apply_bases(Editor(program), (s := analyse(program)), {space_of(s, "table.weight", 1).name: matrix})
    wrong = forced_bases(program, lambda s: {space_of(s, "table.weight", 1).name: matrix})
    assert error(program, wrong) > WRONG
    folded = fold_norm_affine(program)
    assert len(folded.report.applied) == 3
    turned, report = turn(folded.program, "table.weight", 1, matrix)
    assert not report.refused
    assert error(program, turned) < 1e-12


def test_layer_norm_turns_after_its_writers_are_centred() -> None:
    program = fold_norm_affine(program_of(Residual(layer), IDS)).program
    matrix = random_orthogonal(8, seed(0))
    _, report = turn(program, "table.weight", 1, matrix)
    assert "does not keep the vector of ones" in reasons(report)
    assert "layer_norm" in reasons(report)
    wrong = forced_bases(program, lambda s: {space_of(s, "table.weight", 1).name: matrix})
    assert error(program, wrong) > WRONG
    fixing = sample.random_bases(analyse(program), seed(0))[
        space_of(analyse(program), "table.weight", 1).name
    ]
    turned, report = turn(program, "table.weight", 1, fixing)
    assert not report.refused
    assert error(program, turned) < 1e-12
    centred = center_norms(program)
    assert len(centred.report.applied) == 3
    turned, report = turn(centred.program, "table.weight", 1, matrix)
    assert not report.refused
    assert error(program, turned) < 1e-12


def test_tied_head_holds_the_last_gain_until_it_is_untied() -> None:
    program = program_of(Residual(rms, tied=True), IDS)
    kept = fold_norm_affine(program)
    assert (len(kept.report.applied), len(kept.report.refused)) == (2, 1)
    assert space_of(analyse(kept.program), "table.weight", 1).group == Group.PERMUTATION
    _, report = turn(kept.program, "table.weight", 1, random_orthogonal(8, seed(0)))
    assert "a gain that cannot be folded" in reasons(report)
    wrong = forced_bases(
        kept.program, lambda s: {space_of(s, "table.weight", 1).name: random_orthogonal(8, seed(0))}
    )
    assert error(program, wrong) > WRONG
    untied = fold_norm_affine(untie_embeddings(program).program)
    assert len(untied.report.applied) == 3
    turned, report = turn(untied.program, "table.weight", 1, random_orthogonal(8, seed(0)))
    assert not report.refused
    assert error(program, turned) < 1e-12


def test_norms_on_the_writers_keep_the_stream_from_turning() -> None:
    class Sandwich(Residual):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            x = x + self.norms[0](self.down[0](F.silu(self.up[0](x))))
            return self.head(self.norms[2](x))

    program = fold_norm_affine(program_of(Sandwich(rms), IDS)).program
    _, report = turn(program, "table.weight", 1, random_orthogonal(8, seed(0)))
    assert "a gain that cannot be folded" in reasons(report)
    wrong = forced_bases(
        program, lambda s: {space_of(s, "table.weight", 1).name: random_orthogonal(8, seed(0))}
    )
    assert error(program, wrong) > WRONG


def test_static_part_of_power_norm_folds_into_the_linear() -> None:
    """PowerNorm at inference: RMS of the group, then x / sqrt(phi + eps) * gamma + beta with a stored phi."""

    class Power(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.writer, self.reader = nn.Linear(8, 8), nn.Linear(8, 8)
            self.gamma, self.beta = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
            self.register_buffer("phi", torch.rand(8, generator=seed(4)) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.writer(x)
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1)
            return self.reader(x / torch.sqrt(self.phi + 0.1) * self.gamma + self.beta)

    program = program_of(Power(), X)
    folded = fold_norm_affine(program)
    assert folded.report.applied
    assert error(program, folded.program) < 1e-12
    turned, report = turn(folded.program, "writer.weight", 0, random_orthogonal(8, seed(0)))
    assert not report.refused
    assert error(program, turned) < 1e-12


def test_common_factor_of_a_stream_would_change_epsilon() -> None:
    program = fold_norm_affine(program_of(Residual(rms), IDS)).program
    down = node_of(program, "down.0")
    result = fold_scale(program, scales={down: torch.full((8,), 2.0)})
    assert "rms_norm of a scaled value" in reasons(result.report)
    editor = Editor(program)
    for name, held in program.parameters.items():
        if name.endswith("table.weight") or ".down." in name or name.startswith("down."):
            editor.tensors[name] = 2 * held
    scaled = editor.finish()
    assert error(program, scaled) > WRONG
    for node in scaled.graph.nodes:
        if node.target is aten.rms_norm.default:
            x, shape, weight, eps = node.args
            node.args = (x, shape, weight, eps * 4)
    rebuilt = Program(scaled.graph, scaled.tensors, scaled.example_args, scaled.example_kwargs)
    assert error(program, rebuilt) < 1e-12


# ---- heads


def test_rotary_pairs_take_one_complex_number_and_no_more() -> None:
    program = program_of(Heads(rotary=True), X)
    space = space_of(analyse(program), "q.weight", 0)
    assert space.group == Group.PAIR
    assert space.copies == 4
    g = seed(5)
    angle, log = (torch.randn(4, 2, generator=g, dtype=torch.float64) for _ in range(2))
    legal = pair_matrix(3 * angle, torch.exp(log), False)
    turned, report = turn(program, "q.weight", 0, legal)
    assert not report.refused
    assert error(program, turned) < 1e-12
    free = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64))
    interleaved = pair_matrix(angle[0], torch.ones(2, dtype=torch.float64), True)
    for illegal, why in (
        (free, "no rotation and scale inside a rotary pair"),
        (interleaved, "mixes rotary pairs"),
        (random_orthogonal(4, seed(0)), "mixes rotary pairs"),
    ):
        same, report = turn(program, "q.weight", 0, illegal)
        assert why in reasons(report)
        assert "rotary" in reasons(report)
        assert error(program, same) == 0
        wrong = forced_bases(program, lambda s, m=illegal: {space_of(s, "q.weight", 0).name: m})
        assert error(program, wrong) > WRONG


def test_scales_of_queries_are_tied_inside_rotary_pairs() -> None:
    program = program_of(Heads(rotary=True), X)
    wanted = torch.exp(torch.randn(16, generator=seed(6), dtype=torch.float64))
    result = fold_scale(program, scales={node_of(program, "q"): wanted})
    assert result.report.applied
    assert error(program, result.program) < 1e-12
    old, new = (p.parameters["q.weight"] for p in (program, result.program))
    factor = (new / old)[:, 0].reshape(4, 2, 2)
    assert torch.allclose(factor[:, 0], factor[:, 1], rtol=1e-12)
    assert torch.allclose(factor[:, 0], wanted.reshape(4, 2, 2).prod(1).sqrt(), rtol=1e-12)


def test_heads_without_rotary_take_any_matrix() -> None:
    program = program_of(Heads(kv=2), X)
    matrix = torch.randn(2, 4, 4, generator=seed(0), dtype=torch.float64)
    for parameter in ("k.weight", "v.weight"):
        space = space_of(analyse(program), parameter, 0)
        assert (space.group, space.copies) == (Group.GENERAL, 2)
        turned, report = turn(program, parameter, 0, matrix)
        assert not report.refused
        assert error(program, turned) < 1e-11


@pytest.mark.parametrize(("name", "legal"), [("v", {"sink": False}), ("k", {"rotary": False})])
def test_shifts_of_values_and_keys(name: str, legal: dict[str, bool]) -> None:
    program = program_of(Heads(**legal), X)
    z = torch.randn(16, generator=seed(8), dtype=torch.float64)
    assert error(program, shifted(program, name, z)) < 1e-12
    illegal = program_of(Heads(**{k: not v for k, v in legal.items()}), X)
    node = next(n for n in illegal.graph.nodes if n.name == node_of(illegal, name))
    why = channel_key(analyse(illegal), analyse(illegal).shifts, node)
    assert isinstance(why, str)
    assert {"v": "a product of two activations", "k": "rotary: a shift would turn with the position"}[
        name
    ] in why
    # Forced: the key's bias takes the shift and nothing else has to; the output bias takes the values' shift.
    tensors = dict(illegal.tensors)
    tensors[f"{name}.bias"] = tensors[f"{name}.bias"] + z
    if name == "v":
        tensors["o.bias"] = tensors["o.bias"] - tensors["o.weight"] @ z
    wrong = Program(illegal.graph, tensors, illegal.example_args, illegal.example_kwargs)
    assert error(illegal, wrong) > WRONG


def shifted(program: Program, module: str, z: Tensor) -> Program:
    """The program with a layer's output shifted through `apply_shifts`."""
    spaces, editor = analyse(program), Editor(program)
    node = next(n for n in program.graph.nodes if n.name == node_of(program, module))
    weight = spaces.constant(node.args[1])
    key = Key(weight, 0, node)
    apply_shifts(editor, spaces, project(spaces.shifts, key, [spaces.dims_of[weight][0]], z))
    return editor.finish()


def test_state_of_a_scan_turns_only_online() -> None:
    """B R and C R^-T cancel in C B^T, but B and C leave an activation, so R cannot go into what writes them."""

    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.c, self.x = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 8)

        def forward(self, u: Tensor, r: Tensor) -> Tensor:
            b, c = F.silu(self.b(u)) @ r, F.silu(self.c(u)) @ r
            return c @ b.transpose(-1, -2) @ self.x(u)

    r = random_orthogonal(4, seed(0))
    program = program_of(State(), X, torch.eye(4, dtype=torch.float64))
    online = relative_error(program.run_float64(), program.run_float64((X, r)))
    assert online < 1e-12

    class Folded(State):
        def forward(self, u: Tensor) -> Tensor:  # type: ignore[override]
            b, c = F.silu(self.b(u)), F.silu(self.c(u))
            return c @ b.transpose(-1, -2) @ self.x(u)

    program = program_of(Folded(), X)
    _, report = turn(program, "b.weight", 0, r)
    assert "silu: only permutations commute" in reasons(report)
    wrong = forced_bases(program, lambda s: {space_of(s, "b.weight", 0).name: r})
    assert error(program, wrong) > WRONG


# ---- scales


def test_scale_between_up_and_down_but_not_through_the_gate() -> None:
    program = program_of(SwiGLU(), X)
    factors = torch.exp(torch.randn(6, generator=seed(9), dtype=torch.float64))
    result = fold_scale(program, scales={node_of(program, "up"): factors})
    assert result.report.applied
    assert error(program, result.program) < 1e-12
    assert not torch.equal(result.program.parameters["up.weight"], program.parameters["up.weight"])
    result = fold_scale(program, scales={node_of(program, "gate"): factors})
    assert "silu does not commute with scales" in reasons(result.report)
    _, report = turn(program, "up.weight", 0, random_orthogonal(6, seed(0)))
    assert "silu and a product: only permutations commute" in reasons(report)
    wrong = forced_bases(program, lambda s: {space_of(s, "up.weight", 0).name: random_orthogonal(6, seed(0))})
    assert error(program, wrong) > WRONG


@pytest.mark.parametrize("function", [F.relu, F.leaky_relu, F.gelu, F.silu])
def test_scale_through_functions(function: Callable[[Tensor], Tensor]) -> None:
    program = program_of(Between(nn.Linear(8, 6), function, nn.Linear(6, 8)), X)
    factors = torch.exp(torch.randn(6, generator=seed(9), dtype=torch.float64))
    result = fold_scale(program, scales={node_of(program, "first"): factors})
    tensors = dict(program.tensors)
    for sign in (1, -1):
        for name in ("first.weight", "first.bias"):
            held = program.tensors[name]
            tensors[name] = held * (sign * factors).reshape(-1, *[1] * (held.dim() - 1))
        tensors["second.weight"] = program.tensors["second.weight"] / (sign * factors)
        forced = Program(program.graph, tensors, program.example_args, program.example_kwargs)
        legal = sign == 1 and function in (F.relu, F.leaky_relu)
        assert (error(program, forced) < 1e-12) if legal else (error(program, forced) > WRONG)
    if function in (F.relu, F.leaky_relu):
        assert not result.report.refused
        assert error(program, result.program) < 1e-12
        assert not torch.equal(result.program.tensors["first.weight"], program.tensors["first.weight"])
    else:
        assert function.__name__ in reasons(result.report)
        assert error(program, result.program) == 0


# ---- convolutions


@pytest.mark.parametrize("padding", [0, 1])
def test_shift_into_a_convolution_needs_an_unpadded_one(padding: int) -> None:
    module = Between(nn.Conv1d(3, 4, 1), lambda x: x, nn.Conv1d(4, 3, 3, padding=padding))
    program = program_of(module, torch.randn(2, 3, 9, generator=seed(0), dtype=torch.float64))
    z = torch.randn(4, generator=seed(1), dtype=torch.float64)
    node = next(n for n in program.graph.nodes if n.name == node_of(program, "first"))
    spaces = analyse(program)
    pin = spaces.shifts.pin_of(spaces.key(node))
    tensors = dict(program.tensors)
    tensors["first.bias"] = tensors["first.bias"] + z
    tensors["second.bias"] = tensors["second.bias"] - tensors["second.weight"].sum(2) @ z
    forced = error(program, Program(program.graph, tensors, program.example_args, program.example_kwargs))
    if padding:
        assert pin is not None
        assert "padding adds zeros" in pin.why
        assert forced > WRONG
    else:
        assert pin is None
        assert forced < 1e-12
        result = shifted(program, "first", z)
        assert error(program, result) < 1e-12


# ---- each side condition removed from the code


Rule = Callable[[Analysis, torch.fx.Node], None]


def forgetting(rule: Rule, method: str, when: Callable[..., bool]) -> Rule:
    """The rule with some of its calls of a method of the analysis dropped."""

    def mutated(analysis: Analysis, node: torch.fx.Node) -> None:
        original = getattr(analysis, method)

        def some(*args: Any, **kwargs: Any) -> Any:
            return None if when(*args, **kwargs) else original(*args, **kwargs)

        setattr(analysis, method, some)
        try:
            rule(analysis, node)
        finally:
            delattr(analysis, method)

    return mutated


def says(text: str) -> Callable[..., bool]:
    return lambda *args, **kwargs: any(isinstance(a, str) and text in a for a in args)


Patch = pytest.MonkeyPatch


def forget(target: object, method: str, when: Callable[..., bool]) -> Callable[[Patch], None]:
    return lambda patch: patch.setitem(RULES, target, forgetting(RULES[target], method, when))


def forget_gain(patch: Patch) -> None:
    original = RULES[aten.rms_norm.default]

    def mutated(analysis: Analysis, node: torch.fx.Node) -> None:
        original(analysis, node)
        analysis.gains.pop()

    patch.setitem(RULES, aten.rms_norm.default, mutated)


def forget_cut(patch: Patch) -> None:
    original = RULES[aten.slice.Tensor]

    def mutated(analysis: Analysis, node: torch.fx.Node) -> None:
        original(analysis, node)
        analysis.dims_of[node] = analysis.fresh(node)

    patch.setitem(RULES, aten.slice.Tensor, mutated)


class HeadBias(nn.Module):
    """One bias for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.zeros(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).view(*x.shape[:-1], 2, 4) + self.bias
        return self.second(y.flatten(-2))


class FusedSlices(nn.Module):
    """Queries, keys and values in one linear, cut apart."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.qkv(x)[..., i : i + 8] for i in (0, 8, 16))
        q, k, v = (p.reshape(*x.shape[:2], 2, 4).transpose(1, 2) for p in parts)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.b(x))


class ExpertRows(nn.Module):
    """Experts with ReLU between; the second matrices chosen by the same ids, by others, or by both."""

    def __init__(self, second: str = "same") -> None:
        super().__init__()
        self.router, self.second = nn.Linear(8, 3), second
        self.up, self.down = nn.Parameter(torch.zeros(3, 6, 8)), nn.Parameter(torch.zeros(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 8)
        scores = self.router(x)
        ids, others = (scores.topk(1, -1, largest).indices.reshape(-1) for largest in (True, False))
        inner = F.relu(torch.bmm(self.up[ids], x[..., None])[..., 0])
        chosen = {"same": (ids,), "other": (others,), "both": (ids, others)}[self.second]
        return torch.stack([torch.bmm(self.down[c], inner[..., None])[..., 0] for c in chosen]).sum(0)


class RowsWithoutExperts(nn.Module):
    """A grouped product whose last offset lies in front of the last row, and a linear behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.zeros(3, 8, 6)), nn.Linear(6, 8)
        self.register_buffer("offsets", torch.tensor([2, 4, 7], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.ops.transformers.grouped_mm_fallback(x.reshape(-1, 8), self.weight, offs=self.offsets)
        return self.head(rows)


class RowsPutBack(nn.Module):
    """Several rows of one linear are added up, and read by another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 8)
        self.register_buffer("places", torch.arange(10) // 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x.reshape(-1, 8))
        return self.second(torch.zeros_like(rows).index_add(0, self.places, rows))


def one_choice(patch: Patch) -> None:
    """Whatever chooses, chooses the same."""
    original = Analysis.chooser
    made: dict[Analysis, Any] = {}
    patch.setattr(
        Analysis, "chooser", lambda self, ids, count: made.setdefault(self, original(self, ids, count))
    )


GROUPED = linear_grouped.overload


def convolutions(padding: int, groups: int = 1) -> nn.Module:
    middle = nn.Conv1d(4, 4, 3, padding=padding, groups=groups)
    return nn.Sequential(nn.Conv1d(8, 4, 1), middle, nn.Conv1d(4, 4, 1))


def mean_over_channels() -> nn.Module:
    return Between(nn.Linear(8, 6), lambda x: x.mean(-1, keepdim=True).expand(-1, -1, 6), nn.Linear(6, 8))


SDPA = aten.scaled_dot_product_attention.default
XC = X.transpose(1, 2).contiguous()


def heads_of_queries_and_keys(node: Any, a: Any, b: Any, sign: int = 1) -> bool:
    """The tie of a grouped query head with its key head, and with the copies beside it."""
    return a is not None and b is not None and len(b) == 2


MUTATIONS: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[Patch], None]]] = {
    "rotary pairs": (
        lambda: Heads(rotary=True), X, forget(rotary.overload, "allow", says("each pair of channels"))
    ),
    "rotary shift": (
        lambda: Heads(rotary=True), X, forget(rotary.overload, "pin_shift", says("turn with the position"))
    ),
    "gelu as relu": (
        lambda: Between(nn.Linear(8, 6), F.gelu, nn.Linear(6, 8)), X,
        lambda patch: patch.setitem(RULES, aten.gelu.default, RULES[aten.relu.default]),
    ),
    "relu takes matrices": (
        lambda: Between(nn.Linear(8, 6), F.relu, nn.Linear(6, 8)), X,
        forget(aten.relu.default, "allow", says("only permutations")),
    ),
    "gate of a gated product": (
        SwiGLU, X, forget(gated.overload, "pin_scale", says("does not commute with scales"))
    ),
    "gated product takes matrices": (SwiGLU, X, forget(gated.overload, "allow", says("only permutations"))),
    "padding of a convolution": (
        lambda: convolutions(1), XC,
        lambda patch: patch.setattr(convolution, "_unpadded", lambda node, transposed: True),
    ),
    "depthwise convolution": (
        lambda: convolutions(0, groups=4), XC,
        forget(aten.conv1d.default, "allow", says("depthwise")),
    ),
    "mean of layer_norm": (
        lambda: Residual(layer), IDS,
        forget(aten.layer_norm.default, "allow", says("the mean of the channels")),
    ),
    "norm of a scaled stream": (
        lambda: Residual(rms), IDS, forget(aten.rms_norm.default, "pin_scale", says("of a scaled value"))
    ),
    "norm of a shifted stream": (
        lambda: Residual(rms), IDS, forget(aten.rms_norm.default, "pin_shift", says("of a shifted value"))
    ),
    "gain of a norm": (lambda: Residual(rms), IDS, forget_gain),
    "rows of an embedding": (
        lambda: Residual(rms), IDS, forget(aten.embedding.default, "allow", says("rows are chosen"))
    ),
    "groups of queries": (lambda: Heads(kv=2), X, forget(SDPA, "tie", heads_of_queries_and_keys)),
    "queries against keys": (
        lambda: Heads(), X, lambda patch: patch.setattr(attention, "flipped", lambda dim: dim)
    ),
    "linear against what it reads": (
        lambda: Residual(rms), IDS, lambda patch: patch.setattr(contraction, "flipped", lambda dim: None)
    ),
    "shift of queries": (lambda: Heads(), X, forget(SDPA, "pin_shift", says("a shifted query"))),
    "mask of heads": (
        lambda: Heads(mask=True), X, lambda patch: patch.setattr(attention, "_mask", lambda *args: None)
    ),
    "slices": (FusedSlices, X, forget_cut),
    "broadcast sum": (HeadBias, X, forget(aten.add.Tensor, "allow", says("broadcast"))),
    "product takes matrices": (Product, X, forget(aten.mul.Tensor, "allow", says("only permutations"))),
    "product takes shifts": (Product, X, forget(aten.mul.Tensor, "pin_shift", says("a product"))),
    "order of experts": (ExpertRows, X, forget(GROUPED, "allow", says("rows choose experts"))),
    "experts against what they read": (
        ExpertRows, X, lambda patch: patch.setattr(experts, "flipped", lambda dim: None)
    ),
    "experts by other ids": (lambda: ExpertRows("other"), X, one_choice),
    "experts by several ids": (
        lambda: ExpertRows("both"), X, lambda patch: patch.setattr(experts, "_read_by", lambda *args: True)
    ),
    "rows without experts": (
        RowsWithoutExperts, X, lambda patch: patch.setattr(experts, "_in_range", lambda *args: True)
    ),
    "what is ranked": (ExpertRows, X, forget(aten.topk.default, "pin", says("its entries are ranked"))),
    "sum of rows": (RowsPutBack, X, forget(aten.index_add.default, "pin_shift", says("a sum of rows"))),
    "mean over channels": (mean_over_channels, X, forget(aten.mean.dim, "allow", says("mean over it"))),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_removing_a_side_condition_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, x, mutate = MUTATIONS[name]
    program = program_of(build(), x)
    assert error(program, random_folds(program)) < 1e-11
    mutate(monkeypatch)
    assert error(program, random_folds(program)) > WRONG
