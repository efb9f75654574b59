"""Channels and heads go altogether: which are dead, what is left computes the same, what is refused, criteria,
recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import isofold
from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.errors import InputError, RecipeError, VerificationError
from isofold.compiler.frontend import prepare
from isofold.compiler.graph import argument
from isofold.compiler.program import Program
from isofold.compiler.recipe import PRESETS, Recipe
from isofold.compiler.spaces import removal
from isofold.models.registry import get
from isofold.passes.prune_channels import keep_count, prune_channels
from isofold.passes.shrink_channels import shrink_channels

aten = torch.ops.aten

MODELS = {
    "llama": ("channels", "heads", "stream"),
    "qwen3": ("heads", "stream"),
    "phi3": ("channels", "heads"),  # fused projections, cut by slices
    "gemma2": ("heads", "stream"),  # attention as products and a softmax
    "bert": ("channels", "heads"),
    "opt": ("channels", "heads"),
    "gpt_neox": ("channels", "heads"),
    "whisper": ("channels", "heads"),
    "t5": ("channels", "stream"),
    "resnet": ("channels",),
    "convnext": ("channels",),
}
CASES = [(name, structure) for name, structures in MODELS.items() for structure in structures]


def structured(structure: str, fraction: float = 0.5, **more: Any) -> Recipe:
    return Recipe.model_validate({"prune": {"structure": structure, "fraction": fraction, **more}})


def elements(program: Program) -> int:
    return sum(t.numel() for t in program.tensors.values() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize(("name", "structure"), CASES)
def test_what_is_left_computes_what_the_zeroed_model_does(name: str, structure: str) -> None:
    case = get(name)
    program = canonicalize(capture(case.module, case.args, None, case.dynamic_shapes)).program
    zeroed, (pruned,) = run_steps(program, [Step(prune_channels, {"recipe": structured(structure)})])
    small, (shrunk,) = run_steps(zeroed, [Step(shrink_channels)])  # verified in float64 as REAL
    assert pruned.applied
    assert len(shrunk.applied) == len(pruned.applied)
    assert elements(small) < 0.95 * elements(program)
    assert sum(entry.facts["bytes_saved"] for entry in shrunk.applied) > 0
    for entry in shrunk.applied:
        assert entry.facts["channels_after"] < entry.facts["channels_before"]
    # Sizes that are dynamic stay so.
    for args in (case.args, case.other_args):
        leaves = [torch.utils._pytree.tree_leaves(p(*args)) for p in (small, zeroed)]
        for got, wanted in zip(*leaves, strict=True):
            assert torch.allclose(got, wanted, atol=2e-4 * float(wanted.abs().max()))


class _Mlp(nn.Module):
    def __init__(
        self, activation: Callable[[torch.Tensor], torch.Tensor], norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 8)
        self.activation, self.norm = activation, norm or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.norm(self.up(x))))


def shrunk(module: nn.Module, *args: torch.Tensor) -> tuple[Program, Any]:
    program, reports = run_steps(capture(module.eval(), args), [Step(canonicalize), Step(shrink_channels)])
    return program, reports[1]


def width(program: Program) -> int:
    """Rows of the first linear."""
    node = next(n for n in program.graph.nodes if n.target == aten.linear.default)
    return int(program.tensors[str(argument(node, "weight").target)].shape[0])


X = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("activation", "dead"),
    [
        (F.gelu, True),
        (F.silu, True),
        (F.relu, True),
        (torch.tanh, True),
        (torch.sigmoid, False),
        (torch.exp, False),
    ],
)
def test_a_zero_row_is_dead_where_the_function_keeps_zero(activation: Any, dead: bool) -> None:
    module = _Mlp(activation)
    with torch.no_grad():
        module.up.weight[3:7] = 0
        module.up.bias[3:7] = 0
    program, _ = shrunk(module, X)
    assert width(program) == (28 if dead else 32)
    assert torch.allclose(program(X), module(X), atol=1e-5)


def test_a_bias_keeps_a_zero_row_alive_and_a_zero_column_does_not() -> None:
    module = _Mlp(F.gelu)
    with torch.no_grad():
        module.up.weight[3] = 0  # its bias is not zero
        module.up.weight[4] = 0
        module.up.bias[4] = 0
        module.down.weight[:, 9] = 0
    program, _ = shrunk(module, X)
    assert width(program) == 30
    assert torch.allclose(program(X), module(X), atol=1e-5)


def test_nothing_dead_changes_nothing_and_everything_dead_leaves_one_channel() -> None:
    program, report = shrunk(_Mlp(F.gelu), X)
    assert not report.applied
    assert width(program) == 32
    module = _Mlp(F.gelu)
    with torch.no_grad():
        module.down.weight.zero_()
    program, _ = shrunk(module, X)
    assert width(program) == 1
    assert torch.allclose(program(X), module(X), atol=1e-6)


@pytest.mark.parametrize("norm", [nn.LayerNorm(32), nn.RMSNorm(32), nn.Softmax(-1), nn.Identity()])
def test_norms_over_the_channels(norm: nn.Module) -> None:
    module = _Mlp(F.gelu, norm)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.3 * torch.randn(32))
        module.up.weight[:8] = 0
        module.up.bias[:8] = 0
        module.down.weight[:, :8] = 0
    program, report = shrunk(module, X)
    assert torch.allclose(program(X), module(X), atol=1e-5)
    if isinstance(norm, (nn.RMSNorm, nn.Identity)):
        assert width(program) == 24
        return
    assert width(program) == 32
    why = "layer_norm takes the mean over it" if isinstance(norm, nn.LayerNorm) else "softmax over it"
    assert [why in entry.reason for entry in report.refused] == [True]
    assert report.refused[0].reason.startswith("8 of 32 channels contribute nothing, but")


def test_without_the_gain_an_rms_norm_would_move(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _Mlp(F.gelu, nn.RMSNorm(32))
    with torch.no_grad():
        module.up.weight[:8] = 0
        module.up.bias[:8] = 0

    def only_the_shape(editor: Any, old: Any, node: Any, mask: torch.Tensor, rescaled: Any) -> None:
        removal._set(node, "normalized_shape", [int(mask.sum())])

    monkeypatch.setattr(removal, "_renumber_norm", only_the_shape)
    with pytest.raises(VerificationError, match="shrink_channels"):
        shrunk(module, X)


class _Attention(nn.Module):
    def __init__(self, heads: int = 4, size: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, heads * size) for _ in range(3))
        self.o = nn.Linear(heads * size, 24)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def zero_rows(layer: nn.Linear, rows: Any) -> None:
    with torch.no_grad():
        layer.weight[rows] = 0
        layer.bias[rows] = 0


def test_a_head_with_zero_values_goes_with_its_queries_and_keys() -> None:
    module, x = _Attention(), torch.randn(2, 7, 24)
    zero_rows(module.v, slice(16, 32))
    program, report = shrunk(module, x)
    shapes = [tuple(t.shape) for name, t in program.tensors.items() if name.endswith("weight")]
    assert shapes == [(48, 24)] * 3 + [(24, 48)]
    assert torch.allclose(program(x), module(x), atol=1e-5)
    assert len(report.applied) == 1
    assert report.applied[0].facts["parameters"][0].startswith("q.")


def test_dimensions_of_all_heads_go_and_the_scale_stays() -> None:
    module, x = _Attention(), torch.randn(2, 7, 24)
    of_each_head = [16 * head + i for head in range(4) for i in (2, 5, 11)]
    zero_rows(module.q, of_each_head)
    zero_rows(module.v, [16 * head + 7 for head in range(4)])
    zero_rows(module.k, [3])  # of one head only: stays
    program, _ = shrunk(module, x)
    shapes = {name: tuple(t.shape) for name, t in program.tensors.items()}
    assert shapes["q.weight"] == shapes["k.weight"] == (52, 24)
    assert shapes["v.weight"] == (60, 24)
    node = next(n for n in program.graph.nodes if n.target == aten.scaled_dot_product_attention.default)
    assert argument(node, "scale") == 0.25
    assert torch.allclose(program(x), module(x), atol=1e-5)


class _Convolutions(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.first, self.middle = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1, groups=groups),
        )
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.relu(F.max_pool2d(self.middle(F.relu(self.first(x))), 2)))


@pytest.mark.parametrize(("groups", "channels"), [(16, 12), (1, 12), (4, 16)])
def test_convolutions(groups: int, channels: int) -> None:
    module, x = _Convolutions(groups), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for layer in (module.first, module.middle):
            layer.weight[[1, 2, 7, 9]] = 0
            layer.bias[[1, 2, 7, 9]] = 0
    program, report = shrunk(module, x)
    assert program.tensors["first.weight"].shape[0] == program.tensors["middle.weight"].shape[0] == channels
    assert torch.allclose(program(x), module(x), atol=1e-5)
    assert bool(report.refused) == (groups == 4)


def test_magnitude_and_activation_choose_differently() -> None:
    module = _Mlp(F.relu)
    with torch.no_grad():
        module.up.bias.zero_()
        module.up.weight[:16] = 1.0
        module.up.weight[16:] = -0.9
        module.down.weight.fill_(0.5)
    positive = torch.rand(64, 24)
    program = canonicalize(capture(module, (positive,))).program
    gone = {}
    for criterion, data in (
        ("magnitude", None),
        ("activation", [(positive,)]),
        ("activation", [(-positive,)]),
    ):
        options = {"recipe": structured("channels", 0.5, criterion=criterion), "calibration": data}
        pruned, _ = run_steps(program, [Step(prune_channels, options)])
        rows = pruned.tensors["up.weight"].abs().sum(1) == 0
        gone[criterion, data is not None and float(data[0][0].sum()) < 0] = rows.nonzero().flatten().tolist()
    assert gone["magnitude", False] == gone["activation", False] == list(range(16, 32))
    assert gone["activation", True] == list(range(16))


def test_whole_panels_stay() -> None:
    assert [keep_count(64, f) for f in (0.1, 0.25, 0.3, 0.99)] == [64, 48, 48, 16]
    assert [keep_count(12, f) for f in (0.5, 0.99)] == [6, 1]
    assert keep_count(16, 0.5) == 8


def test_reasons_of_what_stays() -> None:
    case = get("bert")
    done = prepare(case.module, case.args, dynamic_shapes=case.dynamic_shapes, recipe=structured("stream"))
    report = next(r for r in done.passes if r.name == "prune_channels")
    assert [
        e.reason.startswith("64 stream stay: it is an output of the program") for e in report.refused
    ] == [True]
    both = {
        "prune": {"structure": "channels", "fraction": 0.5},
        "layers": [{"match": "b", "prune": {"structure": "channels", "fraction": 0.25}}],
    }

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.a, self.b = nn.Linear(24, 32), nn.Linear(32, 8), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.gelu(self.up(x))
            return self.a(y) + self.b(y)

    done = prepare(Two(), (X,), recipe=both)
    report = next(r for r in done.passes if r.name == "prune_channels")
    assert "its readers have different formats to prune (a, b)" in [e.reason for e in report.refused]


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", None])
def test_the_way_to_onnx_runtime(recipe: str | None) -> None:
    case = get("llama")
    chosen = {} if recipe is None else PRESETS[recipe].model_dump()
    chosen = {**chosen, "prune": {"structure": "heads", "fraction": 0.5}}
    compiled = isofold.compile(
        case.module, case.args, dynamic_shapes=case.dynamic_shapes, recipe=chosen, measure=False
    )
    program = canonicalize(capture(case.module, case.args, None, case.dynamic_shapes)).program
    zeroed, _ = run_steps(program, [Step(prune_channels, {"recipe": structured("heads")})])
    wanted = torch.utils._pytree.tree_leaves(zeroed(*case.args))[0]
    got = torch.as_tensor(torch.utils._pytree.tree_leaves(compiled(*case.args))[0])
    assert float((got - wanted).norm() / wanted.norm()) < (1e-4 if recipe is None else 0.3)


def test_recipes_with_sparsity_shrink_what_was_zero_before() -> None:
    module = _Mlp(F.gelu)
    zero_rows(module.up, slice(0, 16))
    done = prepare(module, (X,), recipe="sparse-float32")
    report = next(r for r in done.passes if r.name == "shrink_channels")
    assert [entry.facts["channels_after"] for entry in report.applied] == [16]


def test_wrong_recipes() -> None:
    for prune, message in (
        ({"structure": "channels"}, "a structure needs a fraction"),
        ({"structure": "channels", "fraction": 0.5, "density": 0.5}, "neither density nor pattern"),
        ({"structure": "rows", "fraction": 0.5}, "structure"),
        ({"fraction": 0.5}, "belong to a structure"),
        ({"density": 0.5, "criterion": "activation"}, "belong to a structure"),
    ):
        with pytest.raises(RecipeError, match=message):
            isofold.compile(_Mlp(F.gelu), (X,), recipe={"prune": prune})
    needs = {"prune": {"structure": "channels", "fraction": 0.5, "criterion": "activation"}}
    with pytest.raises(InputError, match="calibration"):
        isofold.compile(_Mlp(F.gelu), (X,), recipe=needs)
