"""Example inputs that a transformers model's configuration gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from isofold.compiler.capture import capture
from isofold.compiler.errors import InputError
from isofold.compiler.examples_from import examples_from

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**TEXT, max_position_embeddings=32))


def bert_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT))


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    sizes = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))


def resnet() -> nn.Module:
    return transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))


def conformer() -> nn.Module:
    sizes = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    return transformers.Wav2Vec2BertModel(
        transformers.Wav2Vec2BertConfig(**sizes, feature_projection_input_dim=16)
    )


def vocoder() -> nn.Module:
    return transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=8,
            upsample_initial_channel=16,
            upsample_rates=[4],
            upsample_kernel_sizes=[8],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1]],
        )
    )


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    # A causal model needs no padding mask, others do; images and samples have none.
    "llama": (llama, ["input_ids"], ["logits"]),
    "bert": (bert, ["input_ids", "attention_mask"], ["last_hidden_state", "pooler_output"]),
    "bert_classifier": (bert_classifier, ["input_ids", "attention_mask"], ["logits"]),
    "t5": (t5, ["input_ids", "attention_mask", "decoder_input_ids"], ["logits"]),
    "vit": (vit, ["pixel_values"], ["last_hidden_state", "pooler_output"]),
    "resnet": (resnet, ["pixel_values"], ["last_hidden_state", "pooler_output"]),
    "conformer": (conformer, ["input_features", "attention_mask"], ["last_hidden_state", "extract_features"]),
    "vocoder": (vocoder, ["spectrogram"], ["output"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_without_inputs_is_captured(name: str) -> None:
    make, inputs, results = CASES[name]
    model = make().eval()
    found = examples_from(model)
    assert found is not None
    program = capture(found.module, found.args, found.kwargs, found.dynamic_shapes)
    assert [node.name for node in program.placeholders] == inputs
    one = tuple(tensor[:1] for tensor in found.args)
    got = program(*one)
    assert list(got) == results
    with torch.no_grad():
        expected = model(**dict(zip(inputs, one, strict=True)))
    for key in results:
        wanted = expected if isinstance(expected, torch.Tensor) else expected[key]
        torch.testing.assert_close(got[key].reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)


def test_text_length_is_free_and_names_are_keywords() -> None:
    found = examples_from(bert().eval())
    assert found is not None
    program = capture(found.module, found.args, found.kwargs, found.dynamic_shapes)
    ids = torch.randint(3, 96, (4, 21))
    result = found.module(attention_mask=torch.ones_like(ids), input_ids=ids)
    torch.testing.assert_close(program(ids, torch.ones_like(ids)), result, rtol=1e-4, atol=1e-5)


def test_training_mode_is_kept() -> None:
    model = llama().train()
    examples_from(model)
    assert model.model.training


def test_a_plain_module_is_left_to_the_caller() -> None:
    assert examples_from(nn.Linear(2, 2)) is None


def test_an_input_that_the_configuration_does_not_describe_is_named() -> None:
    model = vit()
    model.main_input_name = "sonar"
    with pytest.raises(InputError) as caught:
        examples_from(model)
    assert str(caught.value) == (
        "The model's configuration does not say what its inputs look like\n"
        "  where: ViTModel.forward, sonar\n"
        "  try: pass example inputs: args=(...) or kwargs={...}"
    )
