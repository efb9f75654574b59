"""What a weight becomes in a recipe's format, for passes that look ahead of rounding."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .code_ranges import quantize_codes
from .codebooks import fit_codebooks
from .layers import group_size_for
from .outliers import quantize_with_outliers, wants_outliers
from .ranges import QuantizedMatrix, dequantized, quantize_matrix


def rounded_weight(weight: Tensor, form: Any, *, storable: bool = True) -> Tensor:
    """`weight` float32 `[N, K, ...]` as its pass will leave it, float32.

    form: the recipe's format of weights or convolutions. storable: as for `ranges.quantize_matrix`.
    """
    if getattr(form, "format", "int") != "int":
        if form.format == "codebook":
            return fit_codebooks(weight, form.codebooks, form.code_bits).dequantized()
        return quantize_codes(weight, form.format, form.group_size, form.range).dequantized()
    if wants_outliers(form):
        group_size = group_size_for(tuple(weight.shape), form)
        found, outliers = quantize_with_outliers(weight, form, group_size, storable=storable)
        return dequantized(found, group_size) + outliers.dense(weight.shape[1])
    found = integer_codes(weight, form, storable=storable)
    return dequantized(found, group_size_for(tuple(weight.shape), form)).reshape(weight.shape)


def integer_codes(weight: Tensor, form: Any, *, storable: bool = True) -> QuantizedMatrix:
    """The same for a format of integers, as codes."""
    return quantize_matrix(
        weight,
        bits=form.bits,
        group_size=group_size_for(tuple(weight.shape), form),
        symmetric=getattr(form, "symmetric", True),
        search=form.range,
        storable=storable,
    )
