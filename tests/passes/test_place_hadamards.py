"""Online Hadamard transforms: the same function over the reals, and only where the inverse is folded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, relative_error, run_steps
from isofold.compiler.errors import InputError, VerificationError
from isofold.compiler.graph import argument
from isofold.compiler.hadamard import hadamard_matrix
from isofold.compiler.passes import PassReport
from isofold.compiler.program import Program
from isofold.compiler.recipe import PRESETS
from isofold.passes import place_hadamards as module
from isofold.passes.pipeline import plan
from isofold.passes.place_hadamards import place_hadamards
from isofold.runtimes.onnx.oplib.build import library_path
from isofold.runtimes.onnx.translate import to_onnx

OPS: Any = torch.ops.isofold
EVERY: Callable[[Any], bool] = lambda node: True  # noqa: E731


class Block(nn.Module):
    """A feed-forward block with two readers of one value, and attention of two heads of 12."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(24, 40, bias=False), nn.Linear(24, 40)
        self.down = nn.Linear(40, 24)
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        q, k, v = (p(x).unflatten(-1, (2, 12)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
DYNAMIC = {"x": {0: Dim("batch", max=64), 1: Dim("length", max=64)}}


def place(
    body: nn.Module | None = None, dynamic: Any = None, **options: Any
) -> tuple[Program, PassReport, Program]:
    program = capture((body or Block()).eval(), (X,), None, dynamic)
    after, (report,) = run_steps(program, [Step(place_hadamards, options)])
    return after, report, program


def calls(program: Program, target: Any) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.target == target]


@pytest.mark.parametrize("seed", [None, 3])
def test_the_function_stays_the_same(seed: int | None) -> None:
    after, report, before = place(linears=EVERY, attentions=EVERY, seed=seed)
    assert report.error is not None
    assert report.error < 1e-6  # weights are float32, rounded once
    assert relative_error(list(before.run_float64()), list(after.run_float64())) < 1e-6
    assert len(calls(after, OPS.hadamard.default)) == 3 + 2  # x, the product, the sum; q and k
    assert not report.refused


def test_in_float64_nothing_is_left_of_the_error() -> None:
    program = capture(Block().double().eval(), (X.double(),))
    for seed in (None, 0):
        options = {"linears": EVERY, "attentions": EVERY, "seed": seed}
        after, (report,) = run_steps(program, [Step(place_hadamards, options)])
        assert report.error < 1e-14
        assert relative_error([program(X.double())], [after(X.double())]) < 1e-14


def test_the_graph_it_leaves(text: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(24, 4), nn.Linear(24, 6, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.a(x), self.b(x), x * 2

    after, report, before = place(Two(), linears=EVERY)
    assert text(after) == [
        "%0 = hadamard(x0, [12, 2], False)",
        "%1 = linear(%0, c, c)",
        "%2 = linear(%0, c)",
        "%3 = mul(x0, 2)",
    ]
    assert torch.allclose(
        after.tensors["a.weight_1"],
        (before.tensors["a.weight"].double() @ hadamard_matrix(24)).float(),
        atol=1e-7,
    )
    assert report.applied[0].facts["orders"] == [12, 2]
    assert report.applied[0].facts["readers"] == ["a", "b"]
    signed, _, _ = place(Two(), linears=EVERY, seed=0)
    assert text(signed)[:2] == ["%0 = mul(x0, c)", "%1 = hadamard(%0, [12, 2], False)"]
    assert "a.weight" in before.tensors
    assert text(before) == ["%0 = linear(x0, c, c)", "%1 = linear(x0, c)", "%2 = mul(x0, 2)"]


def test_without_the_fold_it_is_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_folded", lambda weight, signs: weight)
    with pytest.raises(VerificationError):
        place(linears=EVERY)


def test_with_the_transpose_of_an_unsymmetric_matrix_it_is_another_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(44, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.cat([x, x[..., :20]], -1))

    _, report, _ = place(Odd(), linears=EVERY)
    assert report.error is not None
    assert report.error < 1e-6
    honest = module.apply_hadamard
    monkeypatch.setattr(module, "apply_hadamard", lambda x, orders: honest(x, orders, True))
    with pytest.raises(VerificationError):
        place(Odd(), linears=EVERY)


def test_turning_queries_alone_is_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = module.set_argument
    monkeypatch.setattr(
        module, "set_argument", lambda node, name, new: None if name == "key" else honest(node, name, new)
    )
    with pytest.raises(VerificationError):
        place(attentions=EVERY)


def test_only_what_is_chosen_is_turned() -> None:
    after, report, _ = place(linears=["linear_2"])
    assert [entry.place.module for entry in report.applied] == ["down"]
    assert len(calls(after, OPS.hadamard.default)) == 1
    with pytest.raises(InputError, match="linear_77"):
        place(linears=["linear_2", "linear_77"])


def test_signs_go_into_a_scale_that_is_already_there(text: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(24, 8)
            self.register_buffer("z", torch.randn(24))
            self.register_buffer("r", torch.rand(24) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear((x - self.z) * self.r)

    after, report, _ = place(Scaled(), linears=EVERY, seed=1)
    assert report.error is not None
    assert report.error < 1e-6
    assert text(after) == [
        "%0 = sub(x0, c)",
        "%1 = mul(%0, c)",
        "%2 = hadamard(%1, [12, 2], False)",
        "%3 = linear(%2, c, c)",
    ]


def test_a_tied_weight_keeps_its_form_for_its_other_readers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Parameter(torch.randn(9, 24))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(x), self.table) + F.linear(x, self.table)

    _, report, _ = place(Tied(), linears=["linear"])
    assert report.error is not None
    assert report.error < 1e-6
    assert report.applied[0].facts["bytes_added"] == 9 * 24 * 4
    assert "bytes_added" not in place(Tied(), linears=EVERY)[1].applied[1].facts


def test_keys_and_queries_of_grouped_heads_turn_by_head() -> None:
    class Grouped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k = x.unflatten(-1, (4, 6)).transpose(1, 2), x[..., :12].unflatten(-1, (2, 6)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    after, report, _ = place(Grouped(), attentions=EVERY, seed=0)
    assert report.error is not None
    assert report.error < 1e-12
    assert report.applied[0].facts["orders"] == [2]
    assert report.applied[0].facts["blocks"] == 3
    (attention,) = calls(after, torch.ops.aten.scaled_dot_product_attention.default)
    query, key, values = attention.args[:3]
    assert query.target == key.target == OPS.hadamard.default
    assert values.target != OPS.hadamard.default


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight * 2) + F.linear(x[..., :7], self.linear.weight[:, :7].clone())


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[..., :7])


class Rounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(OPS.quantize_dequantize(x, None, "token"))


class OddHeads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x[..., :21].unflatten(-1, (3, 7)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (Computed(), "its weight is computed in the graph"),
        (Sliced(), "has 7 channels, which no Hadamard matrix divides"),
        (Rounded(), "quantized already"),
        (OddHeads(), "has 7 channels"),
    ],
)
def test_refusals(body: nn.Module, reason: str) -> None:
    result = place_hadamards(capture(body.eval(), (X,)), linears=EVERY, attentions=EVERY)
    assert not result.report.applied
    assert result.report.refused
    assert all(reason in r.reason for r in result.report.refused), result.report.refused


def test_it_is_not_placed_twice() -> None:
    after, _, _ = place(linears=EVERY, attentions=EVERY)
    again = place_hadamards(after, linears=EVERY, attentions=EVERY)
    assert not again.report.applied
    assert {r.reason.rpartition("is ")[2] for r in again.report.refused} == {"a Hadamard transform already"}


def results(model: ir.Model, folder: Path, with_library: bool, x: Tensor) -> list[np.ndarray]:
    """The model's outputs; with the library, through its kernels."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if with_library:
        options.register_custom_ops_library(str(library_path()))
        for key in [key for key, function in model.functions.items() if function.domain == "ai.isofold"]:
            del model.functions[key]
    ir.save(model, folder / "model.onnx")
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(None, {"x": x.numpy()})
    return found


@pytest.mark.parametrize("with_library", [False, True])
def test_exported_with_dynamic_sizes_it_computes_the_same(with_library: bool, tmp_path: Path) -> None:
    after, _, before = place(dynamic=DYNAMIC, linears=EVERY, attentions=EVERY, seed=2)
    for shape in ((2, 5, 24), (3, 11, 24)):
        model = to_onnx(after)
        assert sum(node.op_type == "Hadamard" for node in model.graph) == 5
        x = torch.randn(shape)
        (got,) = results(model, tmp_path, with_library, x)
        for program in (before, after):
            assert np.abs(got - program(x).detach().numpy()).max() < 1e-5


class Layer(nn.Module):
    """A post-norm layer with outlier channels: nothing in it can turn for free."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(96), nn.Linear(96, 160), nn.Linear(160, 96)
        with torch.no_grad():
            self.norm.weight[::40] = 30.0
            self.norm.bias.normal_()
            self.up.weight[:, ::40] /= 30.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x + torch.tanh(x))
        out: Tensor = self.down(F.gelu(self.up(y)))
        return out


def quantized(program: Program, **options: Any) -> Program:
    """The program by the recipe w4a4, with transforms where `options` say."""
    recipe = PRESETS["w4a4"]
    steps = plan(program, recipe)
    position = next(i for i, step in enumerate(steps) if "quantize" in step.run.name)
    return run_steps(program, [*steps[:position], Step(place_hadamards, options), *steps[position:]])[0]


@pytest.mark.parametrize("with_library", [False, True])
def test_through_the_pipeline_transforms_end_in_the_quantizers_and_pay(
    with_library: bool, tmp_path: Path, counts: Any
) -> None:
    x = torch.randn(3, 7, 96)
    program = capture(Layer().eval(), (x,), None, {"x": {0: Dim("batch", max=64), 1: Dim("length", max=64)}})
    turned = quantized(program, linears=EVERY, seed=0)
    assert counts(turned)["hadamard"] == counts(turned)["mul"] == 0
    assert counts(turned)["norm_quantize"] == counts(turned)["quantize_linear_packed"] == 1
    orders = [
        list(argument(node, "hadamard"))
        for node in (
            *calls(turned, OPS.norm_quantize.default),
            *calls(turned, OPS.quantize_linear_packed.default),
        )
    ]
    assert orders == [[12, 8], [20, 8]]
    exact = program(x)
    assert relative_error([exact], [turned(x)]) < 0.6 * relative_error([exact], [quantized(program)(x)])
    other = torch.randn(2, 11, 96)
    (got,) = results(to_onnx(turned), tmp_path, with_library, other)
    # A code may fall on either side of an edge: single steps of 4 bits, not the whole.
    assert np.abs(got - turned(other).detach().numpy()).mean() < 2e-3 * np.abs(got).mean()
