"""Example inputs for a model that describes itself: a `transformers` model given without any.

What it reads is the library's common interface (`main_input_name`, `forward`'s parameters, the configuration's
sizes), never the name of an architecture. Whether a padding mask belongs to the inputs is found out by trying:
a model whose earlier outputs do not move when the last token changes is causal, and right padding cannot reach
its real tokens; any other text model gets the mask.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from .errors import InputError

_BATCH, _LENGTH, _TARGET_LENGTH, _FRAMES = 2, 12, 7, 24


@dataclass(frozen=True)
class Examples:
    """A module on tensors, inputs for it, and the sizes that may vary."""

    module: nn.Module
    args: tuple[Tensor, ...]
    dynamic_shapes: tuple[dict[int, Any], ...]
    kwargs: dict[str, Tensor] = field(default_factory=dict)


class TensorsOnly(nn.Module):
    """Calls a model with named tensors, no cache, and returns a dictionary of the tensors it gives.

    The encoder's states inside an encoder-decoder are left out: they are no result of the model.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        signature = inspect.Signature(parameters)

        def forward(*args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
            result = self.model(**signature.bind(*args, **kwargs).arguments, **options)
            if isinstance(result, Tensor):
                return {"output": result}
            return {k: v for k, v in result.items() if isinstance(v, Tensor) and not k.startswith("encoder_")}

        # torch.export and callers see the model's own argument names.
        forward.__signature__ = signature  # type: ignore[attr-defined]  # functions take any attribute
        self.forward = forward


def examples_from(model: nn.Module) -> Examples | None:
    """Example inputs for `model`, or None where it is no `transformers` model.

    Raises InputError, naming the input, where the model's kind of input is not one that its configuration
    describes; the caller can always give `args` instead.
    """
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    parameters = inspect.signature(model.forward).parameters
    inputs = _inputs(model, parameters)
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    if "attention_mask" in parameters and _takes_padding(model, inputs, options):
        inputs["attention_mask"] = torch.ones(next(iter(inputs.values())).shape[:2], dtype=torch.int64)
    ordered = {name: inputs[name] for name in parameters if name in inputs}
    module = TensorsOnly(model, tuple(ordered), options)
    shapes = tuple(_free_sizes(name, tensor) for name, tensor in ordered.items())
    return Examples(module, tuple(ordered.values()), shapes)


def _inputs(model: Any, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Tensor]:
    """The main input, the decoder's, and images beside text where the model reads both."""
    config = model.config
    wanted = [model.main_input_name]
    modalities = getattr(model, "input_modalities", ())
    wanted += [name for name in ("pixel_values",) if "image" in modalities and name in parameters]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        wanted.append("decoder_input_ids")
    inputs = {name: _example(model, name) for name in dict.fromkeys(wanted)}
    unknown = [name for name, tensor in inputs.items() if tensor is None]
    if unknown:
        raise InputError(
            "The model's configuration does not say what its inputs look like",
            where=f"{type(model).__qualname__}.forward, {', '.join(unknown)}",
            hint="pass example inputs: args=(...) or kwargs={...}",
        )
    return {name: tensor for name, tensor in inputs.items() if tensor is not None}


def _example(model: Any, name: str) -> Tensor | None:
    """A random value of one input, by what the configuration says about its kind; None where it says nothing."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if name in ("input_ids", "decoder_input_ids"):
        text = config.get_text_config(decoder=name.startswith("decoder"))
        text = text if hasattr(text, "vocab_size") else getattr(config, "text_config", config)
        vocabulary = getattr(text, "vocab_size", None)
        if vocabulary is None:
            return None
        positions = getattr(text, "max_position_embeddings", None) or _LENGTH
        length = min(_LENGTH if name == "input_ids" else _TARGET_LENGTH, positions)
        # The lowest ids are padding and marks in most vocabularies.
        return torch.randint(min(3, vocabulary - 1), vocabulary, (_BATCH, length), generator=generator)
    shape = _shape(config, name)
    return None if shape is None else torch.randn((_BATCH, *shape), generator=generator)


def _shape(config: Any, name: str) -> tuple[int, ...] | None:
    """Shape without the batch of an input of floating-point numbers."""

    def size(*keys: str) -> Any:
        owners = (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None))
        return next((v for o in owners for k in keys if (v := getattr(o, k, None)) is not None), None)

    if name == "pixel_values":
        image = size("image_size") or 224
        rows, columns = image if isinstance(image, (list, tuple)) else (image, image)
        return int(size("num_channels", "in_channels") or 3), int(rows), int(columns)
    bins = size("num_mel_bins")
    if name == "input_values":
        stride = size("inputs_to_logits_ratio")
        if stride is not None:
            return (_FRAMES * int(stride),)
        length = size("max_length")
        return None if bins is None or length is None else (int(length), int(bins))
    if name == "input_features":
        width, positions = (
            size("feature_projection_input_dim", "input_feat_per_channel"),
            size("max_source_positions"),
        )
        if width is not None:
            return _FRAMES, int(width)
        return None if bins is None or positions is None else (int(bins), 2 * int(positions))
    if name == "spectrogram":
        width = size("model_in_dim", "num_mel_bins")
        return None if width is None else (_FRAMES, int(width))
    return None


def _takes_padding(model: Any, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> bool:
    """Whether a padding mask changes what the model gives for the real positions."""
    main = inputs[model.main_input_name]
    if main.dtype != torch.int64:
        # Sequences of feature vectors are padded like text; samples, spectra and images are not.
        return main.dim() == 3 and main.shape[1] == _FRAMES
    if "decoder_input_ids" in inputs:
        return True
    changed = main.clone()
    changed[:, -1] = torch.where(main[:, -1] == main.max(), main.min(), main.max())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            first, second = (
                model(**{**inputs, model.main_input_name: ids}, **options) for ids in (main, changed)
            )
    finally:
        for module, training in modes.items():
            module.training = training
    before, after = next(
        (
            (first[k], second[k])
            for k in first
            if isinstance(first[k], Tensor) and first[k].shape[:2] == main.shape and first[k].dim() == 3
        ),
        (None, None),
    )
    return before is None or after is None or not torch.equal(before[:, :-1], after[:, :-1])


def _free_sizes(name: str, tensor: Tensor) -> dict[int, Any]:
    """The batch varies, and everything but channels and features where the model allows it."""
    last = tensor.dim() - 1
    features = last if tensor.shape[1] == _FRAMES else 1
    fixed = {"pixel_values": 1, "input_features": features, "spectrogram": last}.get(name)
    return {0: Dim("batch", min=1)} | {d: Dim.AUTO for d in range(1, tensor.dim()) if d != fixed}
