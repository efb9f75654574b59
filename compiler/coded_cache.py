"""A cache of keys or values that a program takes and returns as codes instead of floats.

    floats x [B, H, T, D]  →  codes uint8 [B, H, T, ...] and pairs float32 [B, H, T, 2 G]    (`dialect.cache_packing`)

of `(x * scale) H`: a rotation or scale of cached keys, whose partner is on the queries, is taken in when a token is
quantized, so that what is stored need never be touched again. The program's record of it is what lets a result with
codes be compared with one of floats, and tells users what to allocate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .dialect import dequantize_cache, quantize_cache
from .hadamard import apply_hadamard


@dataclass(frozen=True)
class CodedCache:
    """One cache of keys or values.

    name: of the float input that it was in the captured model. kind: `keys` or `values`.
    inputs: names of the inputs of codes and of pairs (scale, zero point).
    output: index of the output of codes; the pairs are the next.
    depth: dimensions of a head. group: dimensions that share a pair, 0 for all of them.
    scale, hadamard: what floats are multiplied by, then transformed with, before they are rounded.
    """

    name: str
    kind: str
    inputs: tuple[str, str]
    output: int
    depth: int
    bits: int
    group: int = 0
    hadamard: tuple[int, ...] = ()
    scale: tuple[float, ...] = ()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and pairs (scale, zero point) of keys or values `[..., D]`, as the compiled model takes them."""
        scaled = x * torch.tensor(self.scale, dtype=x.dtype) if self.scale else x
        turned = apply_hadamard(scaled, self.hadamard)
        codes, pairs = quantize_cache.reference(turned, None, self.bits, (), self.group)
        return codes, pairs

    def decode(self, codes: Tensor, pairs: Tensor) -> Tensor:
        """The floats `[..., D]` that codes stand for, with the Hadamard transform and the scale undone."""
        x = dequantize_cache.reference(codes, pairs, self.depth, self.bits, self.group)
        x = apply_hadamard(x, self.hadamard, transpose=True)
        return x / torch.tensor(self.scale, dtype=x.dtype) if self.scale else x

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON-like data, for `Program.save` and reports."""
        return {
            **vars(self),
            "inputs": list(self.inputs),
            "hadamard": list(self.hadamard),
            "scale": list(self.scale),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> CodedCache:
        """The inverse of `to_json`."""
        lists = {key: tuple(data[key]) for key in ("inputs", "hadamard", "scale")}
        return CodedCache(**{**data, **lists})


def decoded(caches: Sequence[CodedCache], results: Sequence[Any]) -> list[Any]:
    """Flat results with the floats of every cache in place of its codes and pairs."""
    by_output = {cache.output: cache for cache in caches}
    found, index = [], 0
    while index < len(results):
        cache = by_output.get(index)
        found.append(results[index] if cache is None else cache.decode(*results[index : index + 2]))
        index += 1 if cache is None else 2
    return found


def renumbered(caches: Sequence[CodedCache], added: Sequence[CodedCache]) -> tuple[CodedCache, ...]:
    """All caches in the order of their outputs; those of `added` count outputs before any of them was split."""
    kept = [(cache, cache.output) for cache in caches]
    moved = []
    for cache, output in kept:
        moved.append(replace(cache, output=output + sum(new.output < output for new in added)))
    for new in added:
        moved.append(replace(new, output=new.output + sum(other.output < new.output for other in added)))
    return tuple(sorted(moved, key=lambda cache: cache.output))
