"""Embedding tables are stored in 4 or 8 bits: `embedding(W, ids) → embedding_packed(ids, codes, scale, zero)`.

LOSSY: each row keeps its own scales (float32), so a row is never rounded with another's range. Tables are packed
at once: a program that decoded a whole table to look up a few rows would need more memory than the model. A table
tied to an output layer gets codes of its own here.

Refused: tables that are computed, not two-dimensional, not float32, also read in float by another operator,
or that would not become smaller.
"""

from __future__ import annotations

from ..compiler.editor import Editor
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import Recipe
from .pack_embeddings import pack_quantized_tables
from .quantize_weights import Progress, quantize_kind


@define_pass(Guarantee.LOSSY)
def quantize_embeddings(editor: Editor, *, recipe: Recipe, progress: Progress | None = None) -> None:
    """Quantize embedding tables as the recipe says. Raises InputError for NaN or infinite tables."""
    quantize_kind(editor, recipe, "embeddings", storable=False, progress=progress)
    for _ in pack_quantized_tables(editor):
        pass
