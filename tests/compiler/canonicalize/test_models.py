"""Public architectures come out in canonical form.

What torch.export gives for them, before: RMSNorm as (cast,) pow 2, mean, add eps, rsqrt, mul, (cast,) mul; rotary as
x * cos + cat(neg(slice), slice) * sin, in GPT-NeoX inside another cat; T5's gelu as eight products and sums;
repeated keys as unsqueeze, expand, reshape; attention as one operator, or (eager, MPT always) matmul, mul, add or
masked_fill, softmax, matmul; a causal mask as some forty nodes of arange, cumsum, diff, gathers and comparisons
that look for packed sequences; a padding mask gathered and expanded to [batch, 1, query, key]; weight norm as an
operator on constants in front of each convolution.
"""

from __future__ import annotations

import collections

import pytest
import torch

import isofold.models
from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import REAL_TOLERANCE, relative_error

from ...captured import captured

FORMS = ("scaled_dot_product_attention", "rms_norm", "layer_norm", "rotary", "gated", "gelu")
#: attention, RMSNorm, LayerNorm, rotary, gated products, gelu, of two layers (Bamba three, MiniLM six)
EXPECTED = {
    "llama": (2, 5, 0, 4, 2, 0),
    "qwen3": (2, 9, 0, 4, 2, 0),
    "qwen3_moe": (2, 9, 0, 4, 2, 0),
    "gpt_oss": (0, 5, 0, 4, 0, 0),
    "opt": (2, 0, 5, 0, 0, 0),
    "gpt_neox": (2, 0, 5, 4, 0, 2),
    "mpt": (2, 0, 5, 0, 0, 2),
    "gemma2": (0, 9, 0, 4, 2, 0),
    "gemma3": (2, 13, 0, 4, 2, 0),
    "falcon": (2, 0, 3, 4, 0, 2),
    "bloom": (2, 0, 6, 0, 0, 2),
    "gpt2": (2, 0, 5, 0, 0, 2),
    "phi3": (2, 5, 0, 4, 2, 0),
    "olmo2": (2, 9, 0, 4, 2, 0),
    "mamba2": (0, 5, 0, 0, 2, 0),
    "bamba": (1, 9, 0, 2, 5, 0),
    "bert": (2, 0, 5, 0, 0, 2),
    "minilm": (6, 0, 13, 0, 0, 6),
    "t5": (6, 12, 0, 0, 4, 0),
    "t5_encoder": (2, 5, 0, 0, 2, 0),
    "t5_decoder": (4, 7, 0, 0, 2, 0),
    "marian": (6, 0, 10, 0, 0, 0),
    "whisper": (6, 0, 12, 0, 0, 6),
    "whisper_encoder": (2, 0, 5, 0, 0, 4),
    "whisper_decoder": (4, 0, 7, 0, 0, 2),
    "wav2vec2": (2, 0, 6, 0, 0, 6),
    "wav2vec2_bert": (2, 0, 13, 0, 0, 0),
    "vit": (2, 0, 5, 0, 0, 2),
    "fastspeech2_encoder": (2, 0, 14, 0, 0, 0),
    "fastspeech2_decoder": (2, 0, 10, 0, 0, 0),
    "hifigan": (0, 0, 0, 0, 0, 0),
    "convnext": (0, 0, 9, 0, 0, 5),
    "resnet": (0, 0, 0, 0, 0, 0),
}
CAUSAL = {
    "llama", "qwen3", "qwen3_moe", "opt", "gpt_neox", "falcon", "gpt2", "phi3", "olmo2", "bamba", "whisper",
    "whisper_decoder",
}  # fmt: skip
GONE = {
    "rsqrt", "erf", "sigmoid", "softmax", "_weight_norm", "_weight_norm_interface", "clone", "alias", "dropout",
    "view", "_unsafe_view", "contiguous", "split", "chunk", "split_with_sizes", "diff", "addmm", "mm",
    "_native_batch_norm_legit_no_training", "batch_norm", "_assert_tensor_metadata", "repeat_interleave",
    "type_as", "baddbmm", "bmm", "sort", "histc", "index_put", "grouped_mm_fallback", "_grouped_mm",
}  # fmt: skip
#: Mamba2 repeats its B and C over heads, which is no attention; the operator has no place for Gemma 2's logit cap, nor
#: for GPT-OSS's sinks, whose gate is no SiLU; routers have a softmax.
KEPT = {
    "mamba2": {"repeat_interleave"}, "bamba": {"repeat_interleave"}, "gemma2": {"softmax", "diff"},
    "qwen3_moe": {"softmax"}, "gpt_oss": {"softmax", "sigmoid"},
}  # fmt: skip


def test_the_table_is_complete() -> None:
    assert list(EXPECTED) == isofold.models.names()


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "sdpa") for name in EXPECTED]
    + [
        pytest.param(name, "eager", marks=pytest.mark.slow)
        for name in ("llama", "gpt_neox", "bert", "t5", "whisper", "wav2vec2")
    ],
)
def test_canonical_form(name: str, attention: str) -> None:
    if attention == "sdpa":
        case, program = captured(name)
    else:
        case = isofold.models.get(name, attention=attention)
        program = capture(case.module, case.args, dynamic_shapes=case.dynamic_shapes)
    result = canonicalize(program)
    called = collections.Counter(
        node.target._schema.name.split("::")[1]
        for node in result.program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    )
    assert tuple(called[form] for form in FORMS) == EXPECTED[name]
    assert set(called) & (GONE - KEPT.get(name, set())) == set()
    if name in CAUSAL:
        attentions = result.program.graph.find_nodes(
            op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
        )
        assert any(node.args[5] for node in attentions)
        assert all(node.args[3] is None for node in attentions)
    for inputs in (case.args, case.other_args):
        assert (
            relative_error(program.run_float64(inputs), result.program.run_float64(inputs)) < REAL_TOLERANCE
        )
        with torch.no_grad():
            expected, got = case.module(*inputs), result.program(*inputs)
        assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_canonical_form_is_stable() -> None:
    once = canonicalize(captured("t5_decoder")[1])
    twice = canonicalize(once.program)
    assert twice.report.applied == []
    assert twice.program.operator_count == once.program.operator_count


def test_both_attention_implementations_come_out_alike() -> None:
    eager = isofold.models.get("t5_encoder", attention="eager")
    texts = []
    for program in (
        captured("t5_encoder")[1],
        capture(eager.module, eager.args, dynamic_shapes=eager.dynamic_shapes),
    ):
        nodes = canonicalize(program).program.graph.nodes
        texts.append(sorted(str(node.target) for node in nodes if node.op == "call_function"))
    assert texts[0] == texts[1]
