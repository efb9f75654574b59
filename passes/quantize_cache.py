"""Keys and values of attentions are rounded to unsigned 8 or 4 bits, with a pair for each token and head.

    sdpa(q, k, v) → sdpa(q, quantize_dequantize(k), quantize_dequantize(v))

LOSSY: each element moves by at most s/2, s = (max - min) / (2^bits - 1) over the dimensions of its head. This is what a
cache of such codes computes with: keys are rounded as they enter the attention, after norms and rotary embedding,
so that a cached key need never be touched again, and the pair belongs to the token and head, so that a new token
leaves the old ones alone.

Caches that are stored as codes are `quantize_past`'s. One node serves all attentions that read the same value in one
format. Side conditions: float32, a dimension of heads (four dimensions or more), so that the last one is the head's;
what is already quantized stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.dialect import dequantize_cache, quantize_dequantize
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype, module_path, shape
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import CacheFormat, Recipe
from .layers import ATTENTIONS, ROUNDERS, is_call_of, set_argument

_READ = ("key", "value")


@define_pass(Guarantee.LOSSY)
def quantize_cache(editor: Editor, *, recipe: Recipe) -> None:
    """Quantize keys and values of the attentions for which the recipe has a format `kv`."""
    rounded: dict[tuple[fx.Node, CacheFormat], fx.Node] = {}
    for node in editor.calls(*ATTENTIONS):
        form = recipe.format_for(module_path(node), "kv")
        if form is None or form.storage != "rounded":
            continue
        done = [name for name in _READ if _quantize(editor, node, name, form, rounded)]
        if done:
            facts: dict[str, Any] = {
                "bits": form.bits,
                "head_size": (shape(argument(node, done[0])) or ())[-1],
            }
            editor.applied(
                node,
                f"{' and '.join(f'{name}s' for name in done)} to uint{form.bits}, per token and head",
                **facts,
            )


def _quantize(
    editor: Editor,
    node: fx.Node,
    name: str,
    form: CacheFormat,
    rounded: dict[tuple[fx.Node, CacheFormat], fx.Node],
) -> bool:
    x = argument(node, name)
    reason = _reason_against(x)
    if reason is not None:
        editor.refused(node, f"its {name}s stay as they are: {reason}")
        return False
    if (x, form) not in rounded:
        rounded[x, form] = editor.call(quantize_dequantize.overload, x, None, "token", form.bits, like=node)
    set_argument(node, name, rounded[x, form])
    return True


def _reason_against(x: fx.Node) -> str | None:
    if is_call_of(x, *ROUNDERS, dequantize_cache.overload):
        return "they are already quantized"
    if dtype(x) != torch.float32:
        return f"they are {dtype(x)}, not float32"
    rank = len(shape(x) or ())
    return None if rank >= 4 else f"they have {rank} dimensions, so none of heads"
