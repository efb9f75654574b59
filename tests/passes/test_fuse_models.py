"""Fusion on real architectures: the nodes of a layer drop to what the kernels need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from isofold.compiler.driver import relative_error, run_steps
from isofold.compiler.program import Program
from isofold.compiler.recipe import PRESETS
from isofold.models import get
from isofold.passes.pipeline import plan

from ..captured import captured

Count = Callable[[Program], Counter[str]]

# Norms make the codes of q/k/v and of the wide linear; what attention and the MLP's activation give has one reader.
ENCODER_LAYER = {
    "linear_packed": 2,
    "quantize_linear_packed": 2,
    "quantize_activation": 0,
    "attention": 1,
    "norm_quantize": 2,
}
DECODER_LAYER = {**ENCODER_LAYER, "rotary": 1}
LAST = {"norm_quantize": 1, "linear_packed": 1}


def lowered(name: str, recipe: str) -> tuple[Program, Program]:
    """The packed program before and after the fusions of the pipeline."""
    _, program = captured(name)
    chosen = PRESETS[recipe]
    plain = plan(program, chosen.model_copy(update={"fuse": False}))
    steps = plan(program, chosen)
    assert [s.run.name for s in steps[: len(plain)]] == [s.run.name for s in plain]
    before, _ = run_steps(program, plain, verify=False)
    return before, run_steps(before, steps[len(plain) :])[0]


def isofold_calls(program: Program) -> int:
    """Operators that compute: not views, and not parts of results."""
    free = (torch.ops.aten.reshape.default, torch.ops.aten.unsqueeze.default, torch.ops.aten.slice.Tensor)
    called = [n for n in program.graph.nodes if n.op == "call_function" and n.target not in free]
    return sum(isinstance(n.target, torch._ops.OpOverload) for n in called)


@pytest.mark.parametrize(
    ("name", "recipe", "layer", "outside", "most"),
    [
        # Outside the layers: the last norm has no quantizer, the first one makes the first layer's codes.
        ("bert", "w8a8", ENCODER_LAYER, {"norm_quantize": 0, "norm": 1}, 0.6),
        ("llama", "w4a8", DECODER_LAYER, LAST, 0.6),
        pytest.param("gpt_neox", "w8a8", DECODER_LAYER, LAST, 0.65, marks=pytest.mark.slow),
        pytest.param("opt", "w4a8", ENCODER_LAYER, LAST, 0.7, marks=pytest.mark.slow),
    ],
)
def test_nodes_of_a_layer(
    counts: Count, name: str, recipe: str, layer: dict[str, int], outside: dict[str, int], most: float
) -> None:
    layers = 2
    before, after = lowered(name, recipe)
    found = counts(after)
    for operator in layer.keys() | outside.keys():
        assert found[operator] == layers * layer.get(operator, 0) + outside.get(operator, 0), operator
    assert found["transpose"] == found["scaled_dot_product_attention"] == found["gated"] == 0
    assert isofold_calls(after) <= most * isofold_calls(before)


NAMES = ["qwen3", "mpt", "bamba", "t5", "whisper", "wav2vec2_bert", "vit", "mamba2", "convnext"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_other_architectures_keep_their_values(counts: Count, name: str) -> None:
    """The driver has compared in float64 after every pass; here other sizes, in weights-only form, which rounds
    no activation."""
    case = get(name)
    before, after = lowered(name, "w8a16")
    results = [torch.utils._pytree.tree_leaves(p(*case.other_args)) for p in (before, after)]
    assert relative_error(*results) < 2e-5
    assert counts(after)["scaled_dot_product_attention"] == 0
    assert after.operator_count < before.operator_count
