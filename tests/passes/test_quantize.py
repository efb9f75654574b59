"""quantize_*, pack_* and the pipeline on small graphs: what is applied, what is refused and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.errors import InputError, RecipeError
from isofold.compiler.graph import argument
from isofold.compiler.passes import PassReport
from isofold.compiler.program import Program
from isofold.compiler.recipe import (
    ActivationFormat,
    ConvolutionFormat,
    EmbeddingFormat,
    LayerRule,
    Recipe,
    WeightFormat,
)
from isofold.passes.layers import check_recipe
from isofold.passes.pack_convolutions import pack_convolutions
from isofold.passes.pack_embeddings import pack_embeddings
from isofold.passes.pack_linears import pack_linears
from isofold.passes.pipeline import plan
from isofold.passes.quantize_activations import quantize_activations
from isofold.passes.quantize_convolutions import quantize_convolutions
from isofold.passes.quantize_embeddings import quantize_embeddings
from isofold.passes.quantize_weights import quantize_weights

from ..processes import PATIENCE

OPS: Any = torch.ops.isofold
DYNAMIC = ActivationFormat(mode="dynamic")


def recipe(
    bits: int = 8, group_size: int = 0, activations: ActivationFormat = DYNAMIC, **more: Any
) -> Recipe:
    return Recipe(weights=WeightFormat(bits=bits, group_size=group_size), activations=activations, **more)


def captured(model: nn.Module, *args: Tensor) -> Program:
    return capture(model.eval(), args)


def compressed(
    program: Program, chosen: Recipe, calibration: Any = None
) -> tuple[Program, dict[str, PassReport]]:
    options = {"recipe": chosen}
    steps = [
        Step(quantize_activations, {**options, "calibration": calibration}),
        Step(quantize_weights, options),
        Step(quantize_embeddings, options),
        Step(quantize_convolutions, options),
        Step(pack_linears),
        Step(pack_convolutions),
    ]
    program, reports = run_steps(program, steps)
    return program, {r.name: r for r in reports}


def count(program: Program, target: Any) -> int:
    return sum(n.target == target for n in program.graph.nodes)


class Attention(nn.Module):
    """Three linears on one value, one on another, an embedding in front."""

    def __init__(self, width: int = 48, vocabulary: int = 50) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocabulary, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.table(ids))
        return self.o(torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x))


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 49]])


@pytest.mark.parametrize(
    ("bits", "group_size"), [(b, g) for b in (2, 3, 4, 8) for g in (0, 32, 128) if g or b >= 4]
)
@pytest.mark.parametrize("mode", ["float", "dynamic", "static"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_linears_are_quantized_and_packed(bits: int, group_size: int, mode: Any, symmetric: bool) -> None:
    model = Attention()
    program = captured(model, IDS)
    chosen = Recipe(
        weights=WeightFormat(bits=bits, group_size=group_size, symmetric=symmetric),
        activations=ActivationFormat(mode=mode),
        embeddings=EmbeddingFormat(bits=max(bits, 4), group_size=group_size, symmetric=symmetric),
    )
    packed, reports = compressed(program, chosen, [(IDS,), (IDS.flip(0),)])
    assert reports["pack_linears"].error is not None
    assert reports["pack_linears"].error <= 1e-12
    assert count(packed, torch.ops.aten.linear.default) == 0
    operator = OPS.linear_packed_float if mode == "float" else OPS.linear_packed
    assert count(packed, operator.default) == 4
    # q, k and v read one quantized activation.
    assert count(packed, OPS.quantize_activation.default) == (0 if mode == "float" else 2)
    assert count(packed, OPS.embedding_packed.default) == 1
    floats = [
        t for t in packed.parameters.values() if t.dtype == torch.float32 and t.dim() == 2 and t.numel() > 500
    ]
    assert not floats
    expected = model(IDS).detach()
    error = float((packed(IDS) - expected).norm() / expected.norm())
    assert error < {2: 0.75, 3: 0.4, 4: 0.25, 8: 0.03}[bits]
    linears = [n for n in packed.graph.nodes if n.target == operator.default]
    assert [argument(n, "bits") for n in linears] == [bits] * 4
    facts = reports["quantize_weights"].applied[0].facts
    assert {"kind", "bits", "group_size", "bytes_before", "bytes_after", "weight_error"} <= facts.keys()
    assert facts["bytes_after"] < facts["bytes_before"] == 4 * 48 * 48
    stored = reports["pack_linears"].applied[0].facts["bytes_after"]
    assert stored == facts["bytes_after"]


def test_the_captured_model_is_untouched_and_the_same_input_gives_the_same_bytes() -> None:
    model = Attention()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    program = captured(model, IDS)
    first, _ = compressed(program, recipe(4, 32, embeddings=EmbeddingFormat()))
    second, _ = compressed(program, recipe(4, 32, embeddings=EmbeddingFormat()))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(t, second.tensors[name]) for name, t in first.parameters.items())


def test_a_weight_tied_between_embedding_and_head_gets_codes_of_both_kinds() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(40, 32)
            self.head = nn.Linear(32, 40, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    program = captured(Tied(), IDS[:, :3] % 40)
    packed, reports = compressed(program, recipe(embeddings=EmbeddingFormat()))
    assert "tied with table" in reports["quantize_weights"].applied[0].what
    assert count(packed, OPS.linear_packed.default) == count(packed, OPS.embedding_packed.default) == 1
    assert not any(t.dtype == torch.float32 and t.numel() == 40 * 32 for t in packed.parameters.values())
    half, _ = compressed(program, recipe())
    assert count(half, torch.ops.aten.embedding.default) == 1


def test_one_module_called_twice_shares_its_codes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.relu(self.linear(x)))

    packed, reports = compressed(captured(Twice(), torch.randn(3, 32)), recipe())
    assert [a.facts["bytes_after"] for a in reports["quantize_weights"].applied][1] == 0
    assert sum(t.dtype == torch.int8 for t in packed.parameters.values()) == 1


def test_readers_that_pad_differently_get_their_own_codes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(160, 32), nn.Linear(160, 32), nn.Linear(160, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + self.c(x)

    rules = [
        LayerRule(match="b", weights=WeightFormat(bits=8, group_size=128)),
        LayerRule(match="c", weights=WeightFormat()),
    ]
    packed, _ = compressed(captured(Two(), torch.randn(3, 160)), recipe(4, 32, layers=rules))
    sizes = [n.args[2] for n in packed.graph.nodes if n.target == OPS.quantize_activation.default]
    assert sorted(sizes) == [32, 128]


class Refusing(nn.Module):
    """One linear for each reason not to quantize it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.small, self.shared = nn.Linear(32, 32), nn.Linear(32, 2), nn.Linear(32, 32)
        self.matrix = nn.Parameter(torch.randn(32, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        computed = nn.functional.linear(x, torch.tanh(self.fine.weight + x.mean()))
        return (
            self.fine(x),
            self.small(x),
            self.shared(x) + self.shared.weight.sum(),
            computed,
            torch.sin(self.matrix) * x.sum(),
        )


def test_refusals_say_why() -> None:
    _, reports = compressed(captured(Refusing(), torch.randn(3, 32)), recipe())
    reasons = {r.place.module or r.place.node: r.reason for r in reports["quantize_weights"].refused}
    everything = "\n".join(reasons.values()) + "\n" + str(reports["quantize_weights"].refused)
    assert "too small: its weight [2, 32] takes 256 bytes in float" in reasons["small"]
    assert "also read in float by aten.sum" in reasons["shared"]
    assert "computed in the graph" in everything
    assert "'matrix' [32, 64] is read by aten.sin.default, which has no packed form" in everything


def test_half_precision_weights_are_refused_with_what_to_do() -> None:
    _, reports = compressed(
        captured(nn.Linear(64, 64).bfloat16(), torch.randn(2, 64, dtype=torch.bfloat16)), recipe()
    )
    assert "capture model.float()" in reports["quantize_weights"].refused[0].reason


def test_weights_that_are_not_finite_are_an_error_that_names_every_layer() -> None:
    model = Attention()
    with torch.no_grad():
        model.q.weight[0, :3] = torch.nan
        model.o.weight[1, 1] = torch.inf
    program = captured(model, IDS)
    with pytest.raises(
        InputError,
        match=r"NaN or infinity and cannot be quantized\n  where: q .*3 of 2304 values of 'q.weight'; o .*1 of",
    ):
        quantize_weights(program, recipe=recipe())


def test_rules_choose_formats_by_path() -> None:
    rules = [
        LayerRule(match=["o"], weights=None),
        LayerRule(match="k", activations=ActivationFormat(mode="float")),
    ]
    packed, _ = compressed(captured(Attention(), IDS), recipe(layers=rules))
    assert count(packed, torch.ops.aten.linear.default) == 1
    assert count(packed, OPS.linear_packed.default) == 2
    assert count(packed, OPS.linear_packed_float.default) == 1


def test_a_glob_that_matches_nothing_and_a_recipe_that_selects_nothing_are_errors() -> None:
    program = captured(Attention(), IDS)
    with pytest.raises(RecipeError, match=r"match no layer: 'tabel'[\s\S]*did you mean 'table'"):
        check_recipe(program, recipe=recipe(layers=[LayerRule(match="tabel", weights=None)]))
    with pytest.raises(
        RecipeError, match=r"quantizes nothing in this model[\s\S]*got: 0 layers: none[\s\S]*'float32'"
    ):
        check_recipe(captured(nn.ReLU(), torch.randn(2, 3)), recipe=recipe())
    with pytest.raises(RecipeError, match="quantizes nothing"):
        check_recipe(program, recipe=Recipe(activations=DYNAMIC, convolutions=ConvolutionFormat()))
    assert not check_recipe(program, recipe=recipe()).report.applied
    check_recipe(program, recipe=Recipe())


def test_static_without_calibration_is_an_error() -> None:
    with pytest.raises(InputError, match="need calibration data"):
        quantize_activations(
            captured(Attention(), IDS), recipe=recipe(activations=ActivationFormat(mode="static"))
        )


CONVOLUTIONS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Conv1d(8, 24, 3, stride=2, padding=1), (2, 8, 17)),
    (lambda: nn.Conv1d(8, 24, 3, padding="same", dilation=2, bias=False), (2, 8, 17)),
    (lambda: nn.Conv2d(8, 20, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 8, 9, 7)),
    (lambda: nn.Conv2d(8, 20, 3, padding="valid", dilation=2), (2, 8, 9, 7)),
]


@pytest.mark.parametrize(("make", "sizes"), CONVOLUTIONS)
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_convolutions_are_quantized_and_packed(
    make: Callable[[], nn.Module], sizes: tuple[int, ...], mode: Any
) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(sizes)
    chosen = Recipe(activations=ActivationFormat(mode=mode), convolutions=ConvolutionFormat())
    packed, reports = compressed(captured(model, x), chosen, [(x,)])
    assert count(packed, OPS.conv_packed.default) == 1
    assert reports["pack_convolutions"].error is not None
    assert reports["pack_convolutions"].error < 1e-12
    expected = model(x)
    assert float((packed(x) - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize(
    ("model", "sizes", "reason"),
    [
        (nn.Conv1d(16, 16, 3, groups=16), (2, 16, 9), "grouped convolutions"),
        (nn.ConvTranspose1d(16, 16, 3), (2, 16, 9), "transposed convolutions"),
        (nn.Conv3d(4, 16, 3), (1, 4, 5, 5, 5), "over 3 dimensions"),
        (nn.Conv1d(16, 16, 4, padding="same"), (2, 16, 9), "even kernel"),
        (nn.Conv1d(4, 16, 1), (2, 4, 9), "too small"),
    ],
)
def test_convolutions_without_packed_form_are_refused(
    model: nn.Module, sizes: tuple[int, ...], reason: str
) -> None:
    program = captured(model, torch.randn(sizes))
    chosen = Recipe(activations=DYNAMIC, convolutions=ConvolutionFormat())
    after, reports = compressed(program, chosen)
    assert reason in reports["quantize_convolutions"].refused[0].reason
    assert after.operator_count == program.operator_count


def test_a_convolution_whose_activations_stay_float_is_refused() -> None:
    chosen = Recipe(
        activations=DYNAMIC,
        convolutions=ConvolutionFormat(),
        layers=[LayerRule(match="", activations=ActivationFormat(mode="float"))],
    )
    _, reports = compressed(captured(nn.Conv1d(8, 24, 3), torch.randn(2, 8, 9)), chosen)
    assert "activations stay float" in reports["quantize_convolutions"].refused[0].reason


def test_pack_embeddings_packs_tables_that_other_passes_quantized() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            g = torch.Generator().manual_seed(0)
            self.register_buffer("codes", torch.randint(-8, 8, (20, 33), generator=g, dtype=torch.int8))
            self.register_buffer("scale", torch.rand(20, 2, generator=g))

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.embedding(ids, OPS.dequantize_weight(self.codes, self.scale, None, 32))

    program = captured(Table(), IDS % 20)
    packed, (report,) = run_steps(program, [Step(pack_embeddings)])
    assert report.error == 0
    assert report.applied[0].facts["bits"] == 4
    assert torch.equal(packed(IDS % 20), program(IDS % 20))


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_four_bit_activations_are_codes_below_16_that_the_linears_read(mode: Any) -> None:
    model = Attention()
    errors = {}
    for bits in (4, 8):
        chosen = recipe(8, activations=ActivationFormat(mode=mode, bits=bits))
        packed, reports = compressed(captured(model, IDS), chosen, [(IDS,), (IDS.flip(0),)])
        assert reports["pack_linears"].error is not None
        assert reports["pack_linears"].error <= 1e-12
        assert {a.facts["activations"] for a in reports["pack_linears"].applied} == {f"uint{bits}"}
        seen: list[int] = []

        def observe(node: torch.fx.Node, found: Any, seen: list[int] = seen) -> None:
            if node.target == OPS.quantize_activation.default:
                seen.append(int(found[0].max()))

        packed.run_observed(observe, (IDS,), {})
        # A dynamic range has its largest value at the last code, or next to it: the zero point is a whole number.
        assert len(seen) == 2
        assert all(value <= 2**bits - 1 and (mode == "static" or value >= 2**bits - 2) for value in seen)
        expected = model(IDS).detach()
        errors[bits] = float((packed(IDS) - expected).norm() / expected.norm())
    assert 4 * errors[8] < errors[4] < 0.35


def test_convolutions_read_eight_bits_beside_linears_that_read_four() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.convolution, self.linear = nn.Conv1d(8, 24, 3), nn.Linear(40, 40)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.convolution(x), self.linear(x)

    x = torch.randn(2, 8, 40)
    for mode in ("dynamic", "static"):
        chosen = recipe(
            activations=ActivationFormat(mode=mode, bits=4),
            convolutions=ConvolutionFormat(),  # type: ignore[arg-type]
        )
        packed, reports = compressed(captured(Both(), x), chosen, [(x,)])
        assert count(packed, OPS.conv_packed.default) == count(packed, OPS.linear_packed.default) == 1
        assert sorted(a.facts["bits"] for a in reports["quantize_activations"].applied) == [4, 8]


def test_pack_convolutions_refuses_four_bit_inputs() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.convolution = nn.Conv1d(8, 24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.convolution(OPS.quantize_dequantize(x, None, "sample", 4))

    chosen = Recipe(activations=DYNAMIC, convolutions=ConvolutionFormat())
    packed, reports = compressed(captured(Narrow(), torch.randn(2, 8, 9)), chosen)
    assert not count(packed, OPS.conv_packed.default)
    assert "quantized to 4 bits" in reports["pack_convolutions"].refused[0].reason


@pytest.mark.parametrize(
    "name", ["float32", "w8a8", "w4a8", "w8a16", "w4a16", "w4a4", "w4a4kv4", "w3a8", "w2a8", "w3a16", "w2a16"]
)
def test_the_pipeline_of_every_preset_runs_verified(name: str) -> None:
    from isofold.compiler.recipe import PRESETS

    model = Attention()
    program = captured(model, IDS)
    after, reports = run_steps(program, plan(program, PRESETS[name]))
    assert reports[0].name == "canonicalize"
    expected = model(IDS).detach()
    error = float((after(IDS) - expected).norm() / expected.norm())
    assert error < {"float32": 1e-6, "w8a8": 0.03, "w8a16": 0.03, "w4a4": 0.4, "w4a4kv4": 0.4,
                     "w2a8": 0.5, "w2a16": 0.5}.get(name, 0.25)  # fmt: skip
    assert (after.weight_bytes < 0.5 * program.weight_bytes) == (name != "float32")


def test_importing_the_plugin_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, isofold.passes.plugin; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
