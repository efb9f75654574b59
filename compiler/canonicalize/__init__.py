"""Canonical form: one spelling for what models write in many.

`canonicalize` runs the passes of this folder in a fixed order until nothing changes. After it, a program says
norms with `aten.layer_norm` and `aten.rms_norm`, attention with `aten.scaled_dot_product_attention` (all
arguments spelled out, grouped queries by `enable_gqa`), rotary embedding with `isofold.rotary`, gated products
with `isofold.gated`, activations with `aten.gelu` and `aten.silu`, products with a constant matrix with
`aten.linear` (einsums, and pointwise convolutions of what was channels last, too), products with a matrix that each row
chooses with `isofold.linear_grouped`, views with `aten.reshape` and
`aten.slice`, what is written part by part with `aten.cat`; outputs of linears that are taken in turn lie in blocks;
constants are folded, batch norms gone where they can, complex numbers are pairs of real ones. Custom operators with a
kernel in Python are the ATen calls that it makes, and what quantizers compute with integers is computed with floats.

Each file is one form: its docstring states the identity and the side conditions, its pass reports what was
recognised and what was refused, and why.
"""

from __future__ import annotations

from ..editor import Editor
from ..passes import Guarantee, Pass, define_pass
from .activation import canonicalize_activations
from .assembled import canonicalize_assembled
from .attention import canonicalize_attention
from .batch_norm import fold_batch_norm
from .complex_numbers import split_complex_numbers
from .custom_operators import expand_custom_operators
from .einsum import canonicalize_einsum
from .embedding_bag import canonicalize_embedding_bags
from .fold_constants import fold_constants
from .gated import canonicalize_gated
from .grouped_linear import canonicalize_grouped_linear
from .grouped_query import absorb_grouped_queries
from .integer_product import canonicalize_integer_products
from .integer_values import canonicalize_integer_values
from .interleaved import canonicalize_interleaved
from .layer_norm import canonicalize_layer_norm
from .linear import canonicalize_linear
from .masks import simplify_masks
from .merge_duplicates import merge_duplicates
from .merged_heads import split_merged_heads
from .output_scale import fold_output_scale
from .pointwise import canonicalize_pointwise
from .rms_norm import canonicalize_rms_norm
from .rotary import canonicalize_rotary
from .scatter import canonicalize_scatter
from .sorted_rows import remove_sorting
from .split import canonicalize_splits
from .strip_no_ops import strip_no_ops

#: In the order in which they run. LayerNorm goes before RMSNorm, which it contains; linears go before constants
#: are folded, so that a transposed weight is not copied; gates after the activations they are made of; factors of
#: outputs after attention, which takes the scale of its queries.
FORMS: tuple[Pass, ...] = (
    expand_custom_operators,
    strip_no_ops,
    split_complex_numbers,
    merge_duplicates,
    canonicalize_integer_values,
    canonicalize_splits,
    canonicalize_assembled,
    canonicalize_einsum,
    canonicalize_embedding_bags,
    canonicalize_scatter,
    canonicalize_linear,
    canonicalize_integer_products,
    canonicalize_grouped_linear,
    remove_sorting,
    canonicalize_interleaved,
    canonicalize_pointwise,
    fold_constants,
    fold_batch_norm,
    canonicalize_activations,
    canonicalize_layer_norm,
    canonicalize_rms_norm,
    canonicalize_rotary,
    split_merged_heads,
    canonicalize_attention,
    absorb_grouped_queries,
    fold_output_scale,
    simplify_masks,
    canonicalize_gated,
)

_MOST_ROUNDS = 6


@define_pass(Guarantee.REAL)
def canonicalize(editor: Editor) -> None:
    """Run all forms until a round changes nothing. Refusals are those of the last round, when all else is settled."""
    for _ in range(_MOST_ROUNDS):
        before = len(editor.applied_entries)
        editor.refused_entries.clear()
        for form in FORMS:
            form.edit(editor)
        if len(editor.applied_entries) == before:
            return


__all__ = ["FORMS", "canonicalize"]
