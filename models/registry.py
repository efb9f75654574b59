"""Names of the models and how each is built."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping

from .case import ModelCase

#: name -> (module of this folder, options of its `build`)
_CASES: dict[str, tuple[str, dict[str, str]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gpt_oss": ("gpt_oss", {}),
    "opt": ("opt", {}),
    "gpt_neox": ("gpt_neox", {}),
    "mpt": ("mpt", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "falcon": ("falcon", {}),
    "bloom": ("bloom", {}),
    "gpt2": ("gpt2", {}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "mamba2": ("mamba2", {}),
    "bamba": ("bamba", {}),
    "bert": ("bert", {}),
    "minilm": ("minilm", {}),
    "t5": ("t5", {"part": "both"}),
    "t5_encoder": ("t5", {"part": "encoder"}),
    "t5_decoder": ("t5", {"part": "decoder"}),
    "marian": ("marian", {}),
    "whisper": ("whisper", {"part": "both"}),
    "whisper_encoder": ("whisper", {"part": "encoder"}),
    "whisper_decoder": ("whisper", {"part": "decoder"}),
    "wav2vec2": ("wav2vec2", {}),
    "wav2vec2_bert": ("wav2vec2_bert", {}),
    "vit": ("vit", {}),
    "fastspeech2_encoder": ("fastspeech2_conformer", {"part": "encoder"}),
    "fastspeech2_decoder": ("fastspeech2_conformer", {"part": "decoder"}),
    "hifigan": ("hifigan", {}),
    "convnext": ("convnext", {}),
    "resnet": ("resnet", {}),
}


def names() -> list[str]:
    """All model names, in a fixed order."""
    return list(_CASES)


def sizes(name: str) -> list[str]:
    """The sizes in which `name` can be built; the first is the smallest."""
    table: Mapping[str, object] = importlib.import_module(f".{_lookup(name)[0]}", __package__).SIZES
    return list(table)


def get(name: str, size: str = "tiny", *, attention: str = "sdpa", seed: int = 0) -> ModelCase:
    """Build the model `name`.

    `size` is `tiny` (fast tests) or `base` (the shapes of a small published model), some families have more;
    `attention` is the implementation asked of `transformers`, `sdpa` or `eager`; a family with one ignores
    it. The same arguments give the same weights. ValueError names unknown choices.
    """
    module_name, options = _lookup(name)
    module = importlib.import_module(f".{module_name}", __package__)
    if size not in module.SIZES:
        raise ValueError(f"model {name!r} has no size {size!r}; it has {', '.join(module.SIZES)}")
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"attention is 'sdpa' or 'eager', not {attention!r}")
    case: ModelCase = module.build(name=name, size=size, attention=attention, seed=seed, **options)
    return case


def _lookup(name: str) -> tuple[str, dict[str, str]]:
    if name not in _CASES:
        close = difflib.get_close_matches(name, _CASES) or list(_CASES)
        raise ValueError(f"no model {name!r}; did you mean {', '.join(close)}?")
    return _CASES[name]
