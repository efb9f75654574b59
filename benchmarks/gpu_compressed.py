"""What the rarer encodings cost on a GPU, beside the plain ones: outliers, sparse layouts, caches of codes.

Ratios of times at equal shapes. That 2:4 sparsity or any other encoding pays is said of those that are below 1.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from gpu_device import Gpu
from gpu_runner import linear_arguments, time_operator
from harness import Results
from isofold.compiler.dialect.outlier_packing import pack_outliers, storable_values
from isofold.compiler.dialect.sparse_packing import pack_sparse

SIZE = 4096
OUTLIERS = 20
"""Outliers of a row: 0.5 %."""
COLD_BYTES = 256 << 20


def compressed_rows(results: Results, gpu: Gpu, arch: str, folder: Path, quick: bool) -> None:
    """All rows."""
    rounds = 5 if quick else 20
    for rows in (1, 16, 512):
        layers = max(4, COLD_BYTES // (SIZE * SIZE)) if rows <= 16 else 4

        def median(name: str, arguments: dict[str, Any], layers: int = layers) -> float:
            return statistics.median(time_operator(gpu, arch, folder, name, arguments, layers, rounds))

        tokens = f"{rows} token{'s' * (rows > 1)}"
        plain = linear_arguments(SIZE, SIZE, 4, 128, rows, True)
        ratio = median("linear_outliers_float", plain | outliers()) / median("linear_packed_float", plain)
        results.add(f"W4A16 g128 with 0.5 % outliers, {tokens}: of the time without", ratio, "x")
        dense = linear_arguments(SIZE, SIZE, 8, 0, rows, False)
        base = median("linear_packed", dense)
        for layout, density in (("2:4", 0.5), ("bitmask", 0.2)):
            ratio = median("linear_sparse", dense | sparse(dense, layout, density)) / base
            results.add(f"W8A8 {layout} ({density:.0%} stored), {tokens}: of the dense time", ratio, "x")
    for keys in (4096, 32768):
        base = statistics.median(time_operator(gpu, arch, folder, "attention", cache(keys, 0), 1, rounds))
        for bits, group in ((8, 0), (4, 0), (4, 32)):
            arguments = cache(keys, bits, group)
            times = time_operator(gpu, arch, folder, "attention_cached", arguments, 1, rounds)
            name = (
                f"attention, decode, {keys} keys of {bits}-bit codes{f' in groups of {group}' * bool(group)}"
            )
            results.sampled(f"{name}: of the float time", [t / base for t in times], "x")


def outliers() -> dict[str, Any]:
    """Outliers of a square matrix."""
    g = torch.Generator().manual_seed(1)
    places = torch.rand(SIZE, SIZE, generator=g).topk(OUTLIERS).indices
    values, multiplier = storable_values(torch.randn(SIZE, OUTLIERS, generator=g))
    held = pack_outliers(places, values, SIZE, multiplier)
    tensors = {"places": held.places, "values": held.values, "offsets": held.offsets}
    return {**tensors, "outlier_multiplier": multiplier}


def sparse(dense: dict[str, Any], layout: str, density: float) -> dict[str, Any]:
    """Sparse weights in the place of dense ones."""
    g = torch.Generator().manual_seed(2)
    codes = torch.randint(-127, 128, (SIZE, SIZE), generator=g).to(torch.int8)
    order = torch.rand(SIZE, SIZE // 4, 4, generator=g)
    keep = order.argsort(-1) < 2 if layout == "2:4" else order < density
    packed = pack_sparse(codes * keep.flatten(1), layout)
    weights = {"places": packed.places, "values": packed.values, "offsets": packed.offsets}
    return {**weights, "layout": layout, "bits": 8, "group_size": 0, "scale_multiplier": 1.0}


def cache(
    keys: int, bits: int, group: int = 0, heads: int = 32, kv: int = 8, depth: int = 128
) -> dict[str, Any]:
    """A decoding step over a cache of codes, or of floats (0)."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, n, h, depth, generator=g) for n, h in ((1, heads), (keys, kv), (keys, kv)))
    shared = {"q": q, "mask": None, "heads": heads, "kv_heads": kv, "q_start": 0, "scale": depth**-0.5}
    shared |= {"causal": False, "softcap": 0.0}
    if not bits:
        return {**shared, "k": k, "v": v, "k_start": 0, "v_start": 0}
    pairs = [torch.ops.isofold.quantize_cache(x.transpose(1, 2), None, bits, [], group) for x in (k, v)]
    tensors = {"k": pairs[0][0], "k_params": pairs[0][1], "v": pairs[1][0], "v_params": pairs[1][1]}
    return {**shared, **tensors, "depth": depth, "value_depth": depth, "bits": bits, "group": group}
