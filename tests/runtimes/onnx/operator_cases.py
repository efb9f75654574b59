"""Uses of every dialect operator: all combinations of optional inputs, ragged sizes, both widths, groups, gating."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from isofold.compiler.dialect import OPERATORS, packing
from isofold.compiler.dialect.dense_packing import pack_dense
from isofold.compiler.dialect.element_formats import FORMATS
from isofold.compiler.dialect.linear_fp8 import WEIGHT_FORMATS
from isofold.compiler.dialect.outlier_packing import (
    PackedOutliers,
    outlier_rows,
    pack_outliers,
    storable_values,
    unpack_outliers,
)
from isofold.compiler.dialect.packing_codebook import CodebookMatrix, pack_codebook
from isofold.compiler.dialect.packing_coded import CodedMatrix, pack_coded
from isofold.compiler.dialect.sparse_layouts import HELD
from isofold.compiler.dialect.sparse_packing import pack_sparse

Case = tuple[str, str, dict[str, Any]]
"""(operator, what is special, arguments)"""


class _Random:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)


def packed(random: _Random, rows: int, k: int, bits: int, group: int, zero: bool) -> packing.PackedLinear:
    """A packed random matrix."""
    low, high = packing.code_range(bits, not zero)
    codes = random.integers(low, high + 1, rows, k).to(torch.int8)
    groups = -(-k // group) if group else 1
    scale, _ = packing.storable_scale(random.normal(rows, groups).abs() * 0.02 + 0.001, group)
    zeros = random.integers(-5, 6, rows, groups).to(torch.int8) if zero else None
    if zeros is not None and packing.zero_steps(bits) > 1:
        zeros = random.integers(-80, 81, rows, groups) / packing.zero_steps(bits)
    return packing.pack_linear(codes, scale, zeros, bits, group)


def cases() -> Iterator[Case]:
    """All cases."""
    yield from _linears()
    yield from _grouped()
    yield from _outliers()
    yield from _coded()
    yield from _fp8()
    yield from _sparse()
    yield from _dense()
    yield from _codebooks()
    yield from _embeddings()
    yield from _convolutions()
    yield from _norms()
    yield from _attentions()
    yield from _caches()
    yield from _elementwise()


def _linears() -> Iterator[Case]:
    formats = [(8, 0), (8, 32), (4, 32), (4, 64), (4, 128), (3, 32), (3, 128), (2, 32), (2, 64)]
    for index, ((bits, group), zero, bias, residual) in enumerate(product(formats, *[(False, True)] * 3)):
        activation = ("none", "relu", "gelu", "gelu_tanh", "silu")[index % 5]
        gated, k = index % 3 == 2, (70, 96, 131)[index % 3]
        yield linear(
            index, 37, k, bits, group, zero, bias, residual, activation, gated, static=index % 4 == 1
        )
    # Odd ones: one row and one column, K below one group, N a multiple of 16, a 4-dimensional activation.
    yield linear(90, 1, 1, 8, 0, False, True, False, "none", False, static=False)
    yield linear(91, 16, 5, 4, 128, True, True, True, "none", False, static=False)
    yield linear(92, 32, 64, 4, 32, False, True, True, "silu", True, static=False)
    yield linear(97, 3, 5, 2, 64, True, True, False, "none", False, static=True)
    yield linear(98, 17, 33, 3, 32, True, False, True, "gelu", True, static=False)
    floating = [(70, 4, False), (131, 8, True), (96, 4, True), (64, 8, False), (45, 2, False), (131, 3, True)]
    floating += [(70, 3, False), (96, 2, True)]
    for i, (k, bits, gated) in enumerate(floating):
        yield _floating(linear(99 + i, 37, k, bits, 32, i % 2 == 1, i > 1, i == 3, "gelu", gated, False))

    for i, (bits, group) in enumerate(formats):
        zero, bias, gated = i % 2 == 1, i % 3 == 0, i == 3
        plain = linear(97 + i, 37, 70, bits, group, zero, bias, not bias, "gelu", gated, False)
        for static, vectors, input_bits in product((False, True), (False, True), (8, 4)):
            yield _quantizing(plain, static, vectors, input_bits, [2] if (static, vectors)[i % 2] else [])


def linear(
    seed: int, n: int, k: int, bits: int, group: int, zero: bool, bias: bool, residual: bool, activation: str,
    gated: bool, static: bool,
) -> Case:  # fmt: skip
    random = _Random(seed)
    rows = 2 * packing.ceil_to(n, 16) if gated else n
    matrix = packed(random, rows, k, bits, group, zero)
    width = packing.ceil_to(k, packing.alignment(group))
    lead = (2, 3)
    u = random.integers(0, 256, *lead, width).to(torch.uint8)
    u[..., k:] = 0
    params = torch.tensor([0.02, 131.0]) if static else random.normal(*lead, 2).abs()
    if not static:
        params[..., 1] = random.integers(0, 256, *lead).float()
    arguments = {
        "u": u,
        "params": params,
        "weight": matrix.weight,
        "scale": matrix.scale,
        "zero": matrix.zero,
        "wsum": matrix.wsum,
        "bias": random.normal(rows) if bias else None,
        "residual": random.normal(*lead, n) if residual else None,
        "n": n,
        "k": k,
        "bits": bits,
        "group_size": group,
        "scale_multiplier": matrix.scale_multiplier,
        "activation": activation,
        "gated": gated,
    }
    present = "+".join(name for name in ("zero", "bias", "residual") if arguments[name] is not None)
    what = f"w{bits}g{group}-{present or 'bare'}-{activation}{'-gated' if gated else ''}-k{k}"
    return "linear_packed", what, arguments


def _grouped() -> Iterator[Case]:
    """Rows of no expert, experts without rows, one expert and no rows at all, all packed formats."""
    formats = [(8, 0), (4, 32), (8, 32), (4, 0), (3, 32), (2, 64)]
    for i, (bits, group) in enumerate(formats):
        yield grouped(
            i, 37, (70, 128, 131)[i % 3], bits, group, i % 2 == 1, i % 3 < 2, rows=7 + i, static=i == 2
        )
    yield grouped(11, 16, 64, 4, 32, False, False, rows=40, experts=2)
    yield grouped(12, 33, 40, 8, 0, True, True, rows=1, experts=5)
    yield grouped(13, 5, 33, 4, 32, False, True, rows=0)
    for i, (bits, group) in enumerate(formats[:3] + formats[4:]):
        name, what, arguments = grouped(
            20 + i, 37, 70 + i, bits, group, i % 2 == 0, i % 2 == 1, rows=6 + 7 * i
        )
        u, params = arguments.pop("u"), arguments.pop("params")
        x = params[..., :1] * (u[..., : arguments["k"]].float() - params[..., 1:])
        del arguments["wsum"]
        yield f"{name}_float", what, {"x": x, **arguments}
    random = _Random(31)
    for rows, n, k, bias in ((9, 37, 45, True), (1, 32, 64, False), (30, 70, 33, False), (0, 4, 3, True)):
        weight, own = random.normal(4, n, k), random.normal(4, n) if bias else None
        expert, x = random.integers(-1, 5, rows), random.normal(rows, k)
        what = f"{rows}x{n}x{k}{'-bias' * bias}"
        yield "linear_grouped", what, {"input": x, "expert": expert, "weight": weight, "bias": own}
        panels = torch.stack([pack_dense(w) for w in weight])
        dense = {"x": x, "expert": expert, "weight": panels, "bias": own, "n": n, "k": k}
        yield "linear_grouped_dense", what, dense


def grouped(
    seed: int, n: int, k: int, bits: int, group: int, zero: bool, bias: bool, *, rows: int, experts: int = 4,
    static: bool = False,
) -> Case:  # fmt: skip
    """`linear_grouped_packed`; an expert in ten is none."""
    random = _Random(seed)
    matrix = packed(random, experts * packing.ceil_to(n, 16), k, bits, group, zero)
    width = packing.ceil_to(k, packing.alignment(group))
    u = random.integers(0, 256, rows, width).to(torch.uint8)
    u[..., k:] = 0
    pairs = random.normal(rows, 2).abs()
    pairs[..., 1] = random.integers(0, 256, rows).float()
    arguments = {
        "u": u,
        "params": torch.tensor([0.02, 131.0]) if static else pairs,
        "expert": random.integers(-1, experts + 1, rows),
        "weight": matrix.weight.unflatten(0, (experts, -1)),
        "scale": matrix.scale.unflatten(0, (experts, -1)),
        "zero": matrix.zero.unflatten(0, (experts, -1)) if matrix.zero is not None else None,
        "wsum": matrix.wsum.unflatten(0, (experts, -1)),
        "bias": random.normal(experts, n) if bias else None,
        "n": n,
        "k": k,
        "bits": bits,
        "group_size": group,
        "scale_multiplier": matrix.scale_multiplier,
    }
    what = f"w{bits}g{group}{'-zero' * zero}{'-bias' * bias}-{rows}x{n}x{k}-of-{experts}"
    return "linear_grouped_packed", what, arguments


def _quantizing(case: Case, static: bool, vectors: bool, input_bits: int, hadamard: list[int]) -> Case:
    """The linear with its quantizer inside."""
    _, what, arguments = case
    k = arguments["k"]
    random = _Random(k + input_bits)
    x = random.normal(2, 3, k)
    x[0, 0] = 0.0  # an empty range
    quantizer = {
        "x": x,
        "params": torch.tensor([3.8 / (2**input_bits - 1), 2 ** (input_bits - 1) - 1]) if static else None,
        "pre_shift": random.normal(k) if vectors else None,
        "pre_scale": random.normal(k) if vectors else None,
    }
    kept = {key: v for key, v in arguments.items() if key not in ("u", "params")}
    special = f"{what}-static{static}-vectors{vectors}-a{input_bits}-h{'x'.join(map(str, hadamard))}"
    return (
        "quantize_linear_packed",
        special,
        {**quantizer, **kept, "input_bits": input_bits, "hadamard": hadamard},
    )


def _floating(case: Case) -> Case:
    _, what, arguments = case
    kept = {key: v for key, v in arguments.items() if key not in ("u", "params", "wsum")}
    x = _Random(arguments["k"]).normal(2, 3, arguments["k"])
    return "linear_packed_float", what, {"x": x, **kept}


def coded(random: _Random, rows: int, k: int, name: str, group: int) -> CodedMatrix:
    """A random matrix of finite codes."""
    form = FORMATS[name]
    table = random.normal(16) if name == "table4" else None
    finite = torch.nonzero(form.values(table).isfinite()).flatten()
    codes = finite[random.integers(0, len(finite), rows, k)].to(torch.uint8)
    groups = -(-k // group) if group else 1
    if form.scale == "float":
        scale = packing.storable_scale(random.normal(rows, groups).abs() * 0.02 + 0.001, group)[0]
    else:
        low, high = (118, 128) if form.scale == "e8m0" else (1, 0x50)
        scale = random.integers(low, high, rows, groups).to(torch.uint8)
    return CodedMatrix(codes, scale, 0.03 if name == "nvfp4" else 1.0, table, name, group)


def _outliers() -> Iterator[Case]:
    formats = [(8, 0), (8, 32), (4, 0), (4, 32), (4, 128), (3, 64), (2, 32)]
    for index, ((bits, group), zero, gated) in enumerate(product(formats, (False, True), (False, True))):
        k, bias = (70, 96, 131)[index % 3], index % 2 == 0
        dense = linear(300 + index, 37, k, bits, group, zero, bias, not bias, "gelu", gated, index % 4 == 1)
        for case in (dense, _floating(dense)):
            name, what, arguments = with_outliers(case, index % 5)
            # Blocks of 16, 32 and 64 rows and a remainder, beside few rows.
            yield name, what, _with_rows(arguments, (1, 3, 7, 25, 50, 130)[index % 6])
    codes = _Random(3).integers(-8, 8, 20, 45).to(torch.int8)
    scale, _ = packing.storable_scale(_Random(4).normal(20, 2).abs() * 0.1, 32)
    held = outliers_of(5, 20, 45, 3)
    places, values = (t[:20] for t in outlier_rows(held.places, held.values, held.offsets))
    zeros: list[torch.Tensor | None] = [None, torch.ones(20, 2, dtype=torch.int8), torch.full((20, 2), 0.25)]
    for points in zeros:
        given: dict[str, Any] = {"codes": codes, "scale": scale, "zero": points, "places": places.int()}
        given["values"] = values
        rest = {"multiplier": held.multiplier, "group_size": 32}
        yield "dequantize_outliers", "bare" if points is None else str(points.dtype), {**given, **rest}


def outliers_of(seed: int, rows: int, k: int, each: int) -> PackedOutliers:
    """Up to `each` random outliers a row: every fifth row has none, others half or all."""
    random = _Random(seed)
    places = torch.stack([torch.randperm(k, generator=random.generator)[: min(each, k)] for _ in range(rows)])
    values, multiplier = storable_values(random.normal(*places.shape))
    for row in range(rows):
        values[row, (0, each // 2, each, each, each)[row % 5] :] = 0
    return pack_outliers(places, values, k, multiplier)


def with_outliers(case: Case, each: int) -> Case:
    """A packed linear with up to `each` outliers a row."""
    name, what, arguments = case
    n, k = arguments["n"], arguments["k"]
    rows = 2 * packing.ceil_to(n, 16) if arguments["gated"] else n
    held = outliers_of(k + each, rows, k, each)
    tensors = {"places": held.places, "values": held.values, "offsets": held.offsets}
    if name == "linear_packed":
        dense = unpack_outliers(
            held.places,
            held.values,
            held.offsets,
            packing.ceil_to(rows, 16),
            k,
            held.multiplier,
            torch.float64,
        )
        tensors["wsum"] = (arguments["wsum"] + dense.sum(1)).float()
    target = {"linear_packed": "linear_outliers", "linear_packed_float": "linear_outliers_float"}[name]
    return target, f"{what}-outliers{each}", {**arguments, **tensors, "outlier_multiplier": held.multiplier}


def _with_rows(arguments: dict[str, Any], rows: int) -> dict[str, Any]:
    """The same linear on that many rows of activations."""

    def grown(t: Tensor) -> Tensor:
        flat = t.flatten(0, -2)
        return flat.repeat(-(-rows // len(flat)), 1)[:rows].unsqueeze(0).roll(1, 1)

    moved = {
        name: grown(arguments[name])
        for name in ("u", "x", "params", "residual")
        if arguments.get(name) is not None and arguments[name].dim() > 1
    }
    return {**arguments, **moved}


def _coded() -> Iterator[Case]:
    formats = [(name, group) for name, form in FORMATS.items() for group in form.group_sizes]
    for index, (name, group) in enumerate(formats):
        random = _Random(index)
        n, k, gated = 37, (70, 96, 131)[index % 3], index % 4 == 1
        rows = 2 * packing.ceil_to(n, 16) if gated else n
        matrix = coded(random, rows, k, name, group)
        stored = pack_coded(matrix)
        yield (
            "linear_coded",
            f"{name}-g{group}",
            {
                "x": random.normal(2, 3, k) if index % 2 else random.normal(7, k),
                "weight": stored.weight,
                "scale": stored.scale,
                "table": stored.table,
                "bias": random.normal(rows) if index % 3 else None,
                "residual": random.normal(*((2, 3) if index % 2 else (7,)), n) if index % 5 == 0 else None,
                "n": n,
                "k": k,
                "format": name,
                "group_size": group,
                "scale_multiplier": stored.scale_multiplier,
                "activation": ("none", "relu", "gelu", "gelu_tanh", "silu")[index % 5],
                "gated": gated,
            },
        )
        yield (
            "dequantize_coded",
            f"{name}-g{group}",
            {
                "codes": matrix.codes,
                "scale": matrix.scale,
                "multiplier": torch.tensor(matrix.multiplier),
                "table": matrix.table,
                "format": name,
                "group_size": group,
            },
        )


def _fp8() -> Iterator[Case]:
    formats = [(name, group) for name in WEIGHT_FORMATS for group in FORMATS[name].group_sizes]
    for index, ((name, group), static) in enumerate(product(formats, (False, True))):
        random = _Random(900 + index)
        n, k, gated = 37, (70, 96, 131)[index % 3], index % 4 == 1
        rows = 2 * packing.ceil_to(n, 16) if gated else n
        stored = pack_coded(coded(random, rows, k, name, group))
        x = random.normal(2, 3, k)
        params = torch.tensor([0.004]) if static else None
        align = packing.alignment(group)
        u, scale = OPERATORS["quantize_activation_fp8"].reference(x, params, align)
        yield (
            "linear_fp8",
            f"{name}-g{group}-static{static}-k{k}{'-gated' if gated else ''}",
            {
                "u": u,
                "params": scale,
                "weight": stored.weight,
                "scale": stored.scale,
                "bias": random.normal(rows) if index % 3 else None,
                "residual": random.normal(2, 3, n) if index % 5 == 0 else None,
                "n": n,
                "k": k,
                "format": name,
                "group_size": group,
                "scale_multiplier": stored.scale_multiplier,
                "activation": ("none", "relu", "gelu", "gelu_tanh", "silu")[index % 5],
                "gated": gated,
            },
        )
    random = _Random(950)
    vectors = ((False, False), (True, False), (False, True), (True, True))
    hadamards = {45: [], 200: [8], 80: [20, 4]}
    for width, static, (shift, scaled) in product(hadamards, (False, True), vectors):
        x = random.normal(2, 3, width) * torch.logspace(-4, 2, width)  # subnormal codes too
        x[0, 0] = 0.0
        yield (
            "quantize_activation_fp8",
            f"k{width}-static{static}-shift{shift}-scale{scaled}",
            {
                "x": x,
                "params": torch.tensor([0.01]) if static else None,
                "align": 32 if width == 45 else 128,
                "shift": random.normal(width) if shift else None,
                "scale": random.normal(width) if scaled else None,
                "hadamard": hadamards[width],
            },
        )
        if not (shift or scaled):
            held = {"x": x, "params": torch.tensor([0.01]) if static else None}
            yield "quantize_dequantize_fp8", f"k{width}-static{static}", held


def _dense() -> Iterator[Case]:
    for index, (bias, residual, gated) in enumerate(product(*[(False, True)] * 3)):
        random = _Random(index)
        n, k, lead = (37, 16, 33)[index % 3], (70, 128, 131)[index % 3], ((2, 3), (1,), (21,))[index % 3]
        rows = 2 * packing.ceil_to(n, 16) if gated else n
        yield (
            "linear_dense",
            f"n{n}-k{k}-bias{bias}-residual{residual}-gated{gated}",
            {
                "x": random.normal(*lead, k),
                "weight": pack_dense(random.normal(rows, k)),
                "bias": random.normal(rows) if bias else None,
                "residual": random.normal(*lead, n) if residual else None,
                "n": n,
                "k": k,
                "activation": ("none", "relu", "gelu", "gelu_tanh", "silu")[index % 5],
                "gated": gated,
            },
        )


def _sparse() -> Iterator[Case]:
    forms = [(layout, value, 0) for layout, values in HELD.items() for value in values]
    forms += [(layout, "int4", group) for layout in ("bitmask", "panels") for group in (32, 64, 128)]
    densities = (0.0, 0.2, 0.6, 1.0)
    options = product(*[(False, True)] * 3)
    for index, ((layout, value, group), (bias, residual, gated)) in enumerate(product(forms, options)):
        random, density = _Random(index), densities[index // 2 % 4]
        n, k, lead = (37, 16, 33)[index % 3], (70, 128, 331)[index % 3], ((2, 3), (1,), (21,))[index % 3]
        rows = 2 * packing.ceil_to(n, 16) if gated else n
        common = {
            "bias": random.normal(rows) if bias else None,
            "residual": random.normal(*lead, n) if residual else None,
            "n": n,
            "k": k,
            "layout": layout,
        }
        after = {"activation": ("none", "relu", "gelu", "gelu_tanh", "silu")[index % 5], "gated": gated}
        what = f"{layout}-{value}-g{group}-k{k}-bias{bias}-residual{residual}-gated{gated}-density{density}"
        keep = _patterned(random, layout, rows, k, density)
        if not value.startswith("int"):
            p = pack_sparse((random.normal(rows, k) * keep).to(getattr(torch, value)), layout)
            weights = {"places": p.places, "values": p.values, "offsets": p.offsets}
            yield "linear_sparse_float", what, {"x": random.normal(*lead, k), **weights, **common, **after}
            continue
        bits, low = int(value[3:]), -8 if value == "int4" else -127
        codes = random.integers(low, -low if bits == 8 else 8, rows, k).to(torch.int8) * keep
        groups = -(-k // group) if group else 1
        scale, _ = packing.storable_scale(random.normal(rows, groups).abs() * 0.02, group)
        dense = packing.pack_linear(codes, scale, None, bits, group)
        p = pack_sparse(codes, layout, bits)
        u = random.integers(0, 256, *lead, packing.ceil_to(k, 32)).to(torch.uint8)
        params = torch.tensor([0.02, 131.0]) if bias else random.normal(*lead, 2).abs().round()
        weights = {"places": p.places, "values": p.values, "offsets": p.offsets}
        scales = {"scale": dense.scale, "wsum": dense.wsum}
        form = {"bits": bits, "group_size": group, "scale_multiplier": dense.scale_multiplier}
        yield (
            "linear_sparse",
            what,
            {"u": u, "params": params, **weights, **scales, **common, **form, **after},
        )


def _patterned(random: _Random, layout: str, n: int, k: int, density: float) -> torch.Tensor:
    """Which entries may be other than zero."""
    if ":" in layout:
        some, of = map(int, layout.split(":"))
        order = torch.rand(n, packing.ceil_to(k, of) // of, of, generator=random.generator).argsort(-1)
        return (order < some).flatten(1)[:, :k]
    height, width = map(int, layout.split("x")) if "x" in layout else (1, 1)
    shape = packing.ceil_to(n, height) // height, packing.ceil_to(k, width) // width
    blocks = torch.rand(*shape, generator=random.generator) < density
    keep = blocks.repeat_interleave(height, 0).repeat_interleave(width, 1)[:n, :k]
    keep[:, 255 if layout == "windows" else k :: 256] = False  # a whole window is more than that layout holds
    return keep


def _codebooks() -> Iterator[Case]:
    for index, (count, bits) in enumerate(((1, 8), (2, 8), (5, 8), (1, 16))):
        random = _Random(index)
        n, k, gated = 37, (70, 96, 131)[index % 3], index == 1
        rows = 2 * packing.ceil_to(n, 16) if gated else n
        codes = random.integers(0, 2**bits, rows, -(-k // 8), count).to(torch.int32)
        matrix = CodebookMatrix(
            codes.to(torch.uint8 if bits == 8 else torch.uint16),
            random.normal(count, 2**bits, 8).half().float(),
            random.normal(rows).abs() + 0.1,
            k,
        )
        stored = pack_codebook(matrix)
        yield (
            "linear_codebook",
            stored.layout,
            {
                "x": random.normal(2, 3, k),
                "weight": stored.weight,
                "codebooks": stored.codebooks,
                "scale": stored.scale,
                "bias": random.normal(rows) if index % 2 else None,
                "residual": random.normal(2, 3, n) if index > 1 else None,
                "n": n,
                "k": k,
                "format": stored.layout,
                "activation": ("none", "silu", "relu", "gelu")[index],
                "gated": gated,
            },
        )
        kept = {"codes": matrix.codes, "codebooks": matrix.codebooks, "scale": matrix.scale, "k": k}
        yield "dequantize_codebook", stored.layout, kept


def _embeddings() -> Iterator[Case]:
    for seed, (bits, group, zero, rank) in enumerate(product((8, 4), (0, 32), (False, True), (1, 2))):
        random = _Random(seed)
        rows, dim = 19, 45
        low, high = packing.code_range(bits, False)
        codes = random.integers(low, high + 1, rows, dim).to(torch.int8)
        groups = -(-dim // group) if group else 1
        ids = random.integers(-rows, rows, *(3, 4)[:rank]).to(torch.int32 if rank == 1 else torch.int64)
        yield (
            "embedding_packed",
            f"w{bits}g{group}-zero{zero}-rank{rank}",
            {
                "ids": ids,
                "weight": packing.pack_embedding_codes(codes, bits),
                "scale": random.normal(rows, groups),
                "zero": random.integers(-5, 6, rows, groups).to(torch.int8) if zero else None,
                "dim": dim,
                "bits": bits,
                "group_size": group,
            },
        )


def _convolutions() -> Iterator[Case]:
    shapes = [
        ((3, 20), (5,), (2,), (1,), (1,)),
        ((3, 9, 11), (3, 3), (1, 2), (1, 0), (1, 1)),
        ((3, 9, 11), (1, 1), (1, 1), (0, 0), (1, 1)),
        ((3, 12, 11), (3, 2), (2, 1), (2, 1), (2, 3)),
    ]
    for seed, (((channels, *space), kernel, stride, padding, dilation), static, bias) in enumerate(
        product(shapes, (False, True), (False, True))
    ):
        random = _Random(seed)
        k = channels
        for size in kernel:
            k *= size
        matrix = packed(random, 21, k, 8, 0, False)
        yield "conv_packed", f"{'x'.join(map(str, kernel))}-static{static}-bias{bias}", {
            "x": random.normal(2, channels, *space),
            "params": torch.tensor([0.02, 120.0]) if static else None,
            "weight": matrix.weight,
            "scale": matrix.scale,
            "wsum": matrix.wsum,
            "bias": random.normal(21) if bias else None,
            "kernel": list(kernel),
            "stride": list(stride),
            "padding": list(padding),
            "dilation": list(dilation),
            "n": 21,
            "activation": "relu" if bias else "none",
        }  # fmt: skip


def _norms() -> Iterator[Case]:
    for seed, (kind, residual, weight, bias) in enumerate(product(("layer", "rms"), *[(False, True)] * 3)):
        random = _Random(seed)
        common = {
            "x": random.normal(2, 3, 44),
            "residual": random.normal(2, 3, 44) if residual else None,
            "weight": random.normal(44) if weight else None,
            "bias": random.normal(44) if bias else None,
        }
        what = f"{kind}-residual{residual}-weight{weight}-bias{bias}"
        yield "norm", what, {**common, "eps": 1e-5, "kind": kind}
        params = torch.tensor([0.02, 128.0]) if seed % 2 else None
        yield "norm_quantize", what, {
            **common,
            "params": params,
            "eps": 1e-5,
            "kind": kind,
            "align": 32,
            "shift": random.normal(44) if seed & 2 else None,
            "scale": random.normal(44) if seed & 4 else None,
            "bits": 4 if seed in (2, 5, 7) else 8,
            "hadamard": {3: [44], 6: [4], 8: [2]}.get(seed, []),
        }  # fmt: skip


def _attentions() -> Iterator[Case]:
    masks = ("none", "bool", "float")
    for seed, (mask, causal, softcap, kv_heads) in enumerate(
        product(masks, (False, True), (0.0, 2.0), (4, 2))
    ):
        random = _Random(seed)
        queries, keys, depth, width = 5, 7, 8, 12
        allowed = random.integers(0, 2, 2, 1, queries, keys).bool()
        allowed[0, 0, 2] = False  # a query that sees nothing
        hidden = {
            "none": None,
            "bool": allowed,
            "float": torch.where(allowed, random.normal(1, 1, queries, keys), -torch.inf),
        }[mask]
        offset = seed % 2  # q, k and v inside wider tensors
        yield (
            "attention",
            f"{mask}-causal{causal}-cap{softcap}-kv{kv_heads}-offset{offset}",
            {
                "q": random.normal(2, queries, 4 + 2 * offset, depth),
                "k": random.normal(2, keys, kv_heads + 2 * offset, depth),
                "v": random.normal(2, keys, kv_heads + 2 * offset, width),
                "mask": hidden,
                "heads": 4,
                "kv_heads": kv_heads,
                "q_start": offset,
                "k_start": 2 * offset,
                "v_start": offset,
                "scale": 0.3,
                "causal": causal,
                "softcap": softcap,
            },
        )


def _caches() -> Iterator[Case]:
    for index, (bits, depth) in enumerate(product((8, 4), (16, 40, 64))):
        random = _Random(700 + index)
        x = random.normal(2, 3, 5, depth)
        x[0, 0, 0] = 0.0  # an empty range
        shift, orders = random.normal(depth) if index % 2 else None, [8] if index % 3 == 0 else []
        yield (
            "quantize_cache",
            f"a{bits}-d{depth}-h{orders}",
            {"x": x, "shift": shift, "bits": bits, "hadamard": orders, "group": 0},
        )
        codes, params = torch.ops.isofold.quantize_cache(x, None, bits)
        held = {"codes": codes, "params": params, "depth": depth, "bits": bits, "group": 0}
        yield "dequantize_cache", f"a{bits}-d{depth}", held
    for index, (bits, (depth, group)) in enumerate(product((8, 4), ((64, 32), (192, 64), (128, 128)))):
        x = _Random(720 + index).normal(2, 3, 5, depth)
        x[0, 0, 0, :group] = 0.0  # an empty range
        given = {"x": x, "shift": None, "bits": bits, "hadamard": [], "group": group}
        yield "quantize_cache", f"a{bits}-d{depth}-g{group}", given
        codes, params = torch.ops.isofold.quantize_cache(x, None, bits, [], group)
        held = {"codes": codes, "params": params, "depth": depth, "bits": bits, "group": group}
        yield "dequantize_cache", f"a{bits}-d{depth}-g{group}", held
    # Heads by kernels of 4, 2 and 1; one query, a few and many; masks of both kinds; caps.
    sizes = [
        (8, 1, 1, 300),
        (6, 2, 1, 17),
        (4, 4, 2, 33),
        (5, 1, 3, 128),
        (4, 2, 37, 150),
        (7, 7, 1, 1),
        (2, 1, 4, 9),
    ]
    whole = [(size, 0) for size in sizes]
    grouped = [((8, 1, 1, 300), 64), ((6, 2, 1, 17), 32), ((4, 2, 37, 150), 32), ((7, 7, 3, 1), 64)]
    uses = product([*whole, *grouped], (8, 4))
    for index, (((heads, kv_heads, queries, keys), group), bits) in enumerate(uses):
        random = _Random(800 + index)
        depth, width = ((64, 64), (40, 24), (16, 128))[index % 3]
        if group:
            depth, width = {32: (96, 64), 64: (128, 192)}[group]
        k, k_params, v, v_params = (
            part
            for size in (depth, width)
            for part in torch.ops.isofold.quantize_cache(
                random.normal(2, kv_heads, keys, size), None, bits, [], group
            )
        )
        mask = None
        if index % 4 == 1:
            mask = random.normal(2, 1, queries, keys)
        elif index % 4 == 2:
            mask = random.integers(0, 2, 2, heads, 1, keys).bool()
            mask[0] = False  # nothing to see
        arguments = {
            "q": random.normal(2, queries, heads + 1, depth),
            "k": k,
            "k_params": k_params,
            "v": v,
            "v_params": v_params,
            "mask": mask,
            "heads": heads,
            "kv_heads": kv_heads,
            "depth": depth,
            "value_depth": width,
            "bits": bits,
            "q_start": index % 2,
            "scale": depth**-0.5,
            "causal": index % 5 == 3,
            "softcap": 20.0 if index % 3 == 1 else 0.0,
            "group": group,
        }
        yield "attention_cached", f"a{bits}-g{group}-{heads}x{kv_heads}-s{queries}-t{keys}", arguments


def _elementwise() -> Iterator[Case]:
    random = _Random(0)
    vectors = ((False, False), (True, False), (False, True), (True, True))
    hadamards = {45: [], 200: [8], 80: [20, 4]}
    for width, static, (shift, scale), bits in product(hadamards, (False, True), vectors, (8, 4)):
        x = random.normal(2, 3, width)
        x[0, 0] = 0.0  # an empty range
        x[1, 0] *= 1e-41  # one whose step has no finite reciprocal
        yield (
            "quantize_activation",
            f"k{width}-static{static}-shift{shift}-scale{scale}-a{bits}",
            {
                "x": x,
                "params": torch.tensor([3.8 / (2**bits - 1), 2 ** (bits - 1) - 1]) if static else None,
                "align": 32 if width == 45 else 128,
                "shift": random.normal(width) if shift else None,
                "scale": random.normal(width) if scale else None,
                "bits": bits,
                "hadamard": hadamards[width],
            },
        )
    for granularity, static, bits in product(("token", "sample"), (False, True), (8, 4)):
        x = random.normal(2, 3, 45)
        x[1] *= 1e-41
        yield (
            "quantize_dequantize",
            f"{granularity}-static{static}-a{bits}",
            {
                "x": x,
                "params": torch.tensor([0.015, 127.0]) if static else None,
                "granularity": granularity,
                "bits": bits,
            },
        )
    for group, zero in product((0, 32), (False, True)):
        groups = 2 if group else 1
        yield (
            "dequantize_weight",
            f"g{group}-zero{zero}",
            {
                "codes": random.integers(-8, 8, 6, 64).to(torch.int8),
                "scale": random.normal(6, groups),
                "zero": random.integers(-5, 6, 6, groups).to(torch.int8) if zero else None,
                "group_size": group,
            },
        )
    for group, zero in ((0, False), (32, True)):
        experts = {
            "codes": random.integers(-8, 8, 3, 6, 45).to(torch.int8),
            "scale": random.normal(3, 6, 2 if group else 1),
            "zero": random.integers(-5, 6, 3, 6, 2).to(torch.int8) if zero else None,
            "group_size": group,
        }
        yield "dequantize_weight", f"g{group}-zero{zero}-experts", experts
    yield (
        "dequantize_weight",
        "g32-zero-between-codes",
        {
            "codes": random.integers(-2, 2, 6, 45).to(torch.int8),
            "scale": random.normal(6, 2),
            "zero": random.integers(-128, 128, 6, 2) / 16,
            "group_size": 32,
        },
    )
    yield (
        "dequantize_weight",
        "convolution",
        {
            "codes": random.integers(-8, 8, 6, 3, 2, 2).to(torch.int8),
            "scale": random.normal(6, 1),
            "zero": None,
            "group_size": 0,
        },
    )
    for axis, width, heads, interleaved in product((1, 2), (8, 4), (-1, 2), (False, True)):
        shape = [2, 5, 5, 8]
        shape[axis] = 3
        table = [2, 1, 5, width] if axis == 1 else [1, 5, 1, width]
        yield (
            "rotary",
            f"axis{axis}-width{width}-heads{heads}-interleaved{interleaved}",
            {
                "x": random.normal(*shape),
                "cos": random.normal(*table),
                "sin": random.normal(*table),
                "head_dim_index": axis,
                "heads": heads,
                "interleaved": interleaved,
            },
        )
    sizes = {
        64: (64,),
        45: (),
        24: (12, 2),
        80: (20, 4),
        384: (12, 32),
        1344: (28, 12, 4),
        96: (32,),
        2048: (2048,),
    }
    for (width, orders), transpose in product(sizes.items(), (False, True)):
        yield (
            "hadamard",
            f"k{width}-{'x'.join(map(str, orders))}-transpose{transpose}",
            {"x": random.normal(2, 3, width), "orders": list(orders), "transpose": transpose},
        )
    for activation in ("none", "relu", "gelu", "gelu_tanh", "silu"):
        arguments = {"gate": random.normal(2, 3, 45), "up": random.normal(2, 3, 45), "activation": activation}
        yield "gated", activation, arguments
