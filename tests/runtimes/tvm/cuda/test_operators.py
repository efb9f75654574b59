"""Every operator of the dialect from its GPU kernels, as they are scheduled, against its reference: all optional
inputs, ragged sizes, widths, groups and gating, with threads in both orders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from isofold.compiler.dialect import OPERATORS
from isofold.compiler.errors import UnsupportedError
from isofold.runtimes.tvm.cuda.attention_operators import FEW_QUERIES, WIDEST
from isofold.runtimes.tvm.cuda.operators import EMITTERS
from isofold.runtimes.tvm.cuda.outliers import CHUNK, THREADS

from ...onnx.operator_cases import cases, linear, with_outliers
from .emulated import arguments_of, call_of, emulate_operator, reference_of

HALVES = {"linear_packed_float", "linear_outliers_float", "linear_coded", "linear_codebook"}
"""Operators whose float activations are rounded to float16 (2^-11 of each; sums of random signs)."""
ROWS = ("x", "u", "input", "params", "expert", "residual")


def by_operator() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, what, arguments in cases():
        found.setdefault(name, []).append((what, arguments))
    return found


CASES = by_operator()


def tolerance(name: str, arguments: dict[str, Any]) -> float:
    many_queries = name.startswith("attention") and arguments["q"].shape[1] > FEW_QUERIES
    return 2e-3 if name in HALVES or many_queries else 3e-6


def check(name: str, what: str, got: list[Any], expected: list[Tensor], limit: float) -> None:
    for position, (g, e) in enumerate(zip(got, expected, strict=True)):
        if g is None:
            continue
        assert (g.shape, g.dtype) == (e.shape, e.dtype), (what, position)
        if not e.dtype.is_floating_point:
            # Codes of a norm or a transform may differ by the last bit of what was rounded.
            assert int((g.int() - e.int()).abs().max()) <= 1, (what, position)
            continue
        if e.numel() == 0:
            continue
        scale = max(float(e.abs().max()), 1e-6)
        error = float((g.double() - e.double()).abs().max()) / scale
        assert error <= limit, f"{name} {what} result {position}: {error:.2e}"


def test_every_operator_has_kernels_and_cases() -> None:
    assert set(OPERATORS) == set(EMITTERS) == set(CASES)


def spread(items: list[Any], most: int) -> list[Any]:
    """At most so many items, evenly from all of them."""
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def chosen_cases(name: str) -> list[Any]:
    """Eight cases of an operator, or two of each layout of weights."""
    layouts: dict[Any, list[Any]] = {}
    for case in CASES[name]:
        layouts.setdefault(case[1].get("layout"), []).append(case)
    most = 8 if len(layouts) == 1 else 2
    return [case for cases_of in layouts.values() for case in spread(cases_of, most)]


def agree(name: str, chosen: list[tuple[str, dict[str, Any]]]) -> None:
    results = emulate_operator(name, [arguments for _, arguments in chosen])
    for (what, arguments), got in zip(chosen, results, strict=True):
        check(name, what, got, reference_of(name, arguments), tolerance(name, arguments))


@pytest.mark.parametrize("name", sorted(EMITTERS))
def test_scheduled_kernels_agree_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both orders of threads: a barrier that is missing gives a wrong result in one of them."""
    for order in ("forwards", "backwards"):
        monkeypatch.setenv("ISOFOLD_EMULATOR_ORDER", order)
        agree(name, chosen_cases(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EMITTERS))
def test_all_cases(name: str) -> None:
    for start in range(0, len(CASES[name]), 16):
        agree(name, CASES[name][start : start + 16])


def repeated(arguments: dict[str, Any], times: int) -> dict[str, Any]:
    """The same use with more rows."""
    static = arguments.get("params") is not None and arguments["params"].dim() == 1
    names = [n for n in ROWS if arguments.get(n) is not None and not (n == "params" and static)]
    return {**arguments, **{n: torch.cat([arguments[n]] * times) for n in names}}


def rows_of(arguments: dict[str, Any]) -> int:
    """Rows of a linear's activations."""
    x = next(arguments[name] for name in ("u", "x", "input") if name in arguments)
    return int(x.numel() // x.shape[-1])


LINEARS = [name for name in sorted(EMITTERS) if "linear" in name]


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("name", LINEARS)
def test_products_of_many_rows(name: str, symbolic: bool) -> None:
    """Rows beyond a tile, and fewer than one, through the products in shared memory."""
    rows = 72 if symbolic else 54
    uses = spread([case for case in CASES[name] if rows_of(case[1])], 10)[symbolic::2]
    chosen = [(what, repeated(a, -(-rows // rows_of(a)))) for what, a in uses]
    axes = dict.fromkeys(ROWS, (0,)) if symbolic else None
    static = {what for what, a in chosen if a.get("params") is not None and a["params"].dim() == 1}
    chosen = [(what, a) for what, a in chosen if not (symbolic and what in static)]
    results = emulate_operator(name, [a for _, a in chosen], axes)
    for (what, arguments), got in zip(chosen, results, strict=True):
        limit = 2e-3 if name in HALVES or name == "linear_sparse_float" else 3e-6
        check(name, what, got, reference_of(name, arguments), limit)


@pytest.mark.parametrize("arch", ["800", "900"])
def test_fp8_products_of_chips_without_them(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves in registers, by bits and by the chip's conversion; elsewhere tests take sm_89's own products."""
    monkeypatch.setenv("ISOFOLD_EMULATOR_ARCH", arch)
    chosen = [(what, repeated(a, times)) for what, a in spread(CASES["linear_fp8"], 6) for times in (1, 9)]
    agree("linear_fp8", chosen)


def test_fp8_tokens_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    what, arguments = next(c for c in CASES["linear_fp8"] if "e4m3-g0-staticFalse" in c[0])
    x = torch.ones(4, arguments["k"])
    x[1, 2], x[2, 0] = torch.nan, torch.inf
    given = {"x": x, "params": None, "align": 32, "shift": None, "scale": None, "hadamard": []}
    ((u, s),) = emulate_operator("quantize_activation_fp8", [given])
    for arch in ("800", "890", "900"):
        monkeypatch.setenv("ISOFOLD_EMULATOR_ARCH", arch)
        ((y,),) = emulate_operator("linear_fp8", [{**arguments, "u": u, "params": s, "residual": None}])
        assert [bool(row.isfinite().all()) for row in y] == [True, False, False, True], (what, arch)


CACHED_AXES = {"q": (0, 1), "k": (0, 2), "k_params": (0, 2), "v": (0, 2), "v_params": (0, 2)}
"""Sizes of a cache that are not known when compiling: samples, queries and tokens."""


@pytest.mark.parametrize("queries", [1, 37], ids=["decode", "prompt"])
def test_cache_of_unknown_length(queries: int) -> None:
    """One set of kernels for a step and for a prompt, keys split over blocks, tokens that fill no range."""
    chosen = [(what, a) for what, a in CASES["attention_cached"] if f"-s{queries}-" in what]
    assert len({a["bits"] for _, a in chosen}) == 2
    results = emulate_operator("attention_cached", [a for _, a in chosen], CACHED_AXES)
    for (what, arguments), got in zip(chosen, results, strict=True):
        expected = reference_of("attention_cached", arguments)
        check("attention_cached", what, got, expected, tolerance("attention_cached", arguments))


@pytest.mark.parametrize(
    ("bits", "depth", "group"), [(8, 128, 0), (4, 128, 0), (8, 256, 0), (4, 128, 32), (8, 256, 64)]
)
def test_cache_with_usual_heads(bits: int, depth: int, group: int) -> None:
    """The widest loads, keys split over blocks, queries that share a key head; few queries and many; groups."""
    quantize = OPERATORS["quantize_cache"].reference
    uneven = torch.exp(torch.randn(depth))  # pairs of groups differ
    k, v = (quantize(torch.randn(1, 2, 300, depth) * uneven, None, bits, [], group) for _ in range(2))
    shared = {
        "k": k[0],
        "k_params": k[1],
        "v": v[0],
        "v_params": v[1],
        "mask": None,
        "heads": 6,
        "kv_heads": 2,
    }
    shared |= {"depth": depth, "value_depth": depth, "bits": bits, "q_start": 0, "scale": depth**-0.5}
    shared |= {"causal": False, "softcap": 0.0, "group": group}
    uses = [{**shared, "q": torch.randn(1, s, 6, depth)} for s in (1, 20)]
    for arguments, got in zip(uses, emulate_operator("attention_cached", uses), strict=True):
        limit = tolerance("attention_cached", arguments)
        check("attention_cached", f"{bits}-g{group}", got, reference_of("attention_cached", arguments), limit)


def test_outliers_beyond_a_chunk_and_a_round_of_rows() -> None:
    """More inputs than lie in shared memory at once, more rows than threads of a block; few tokens and many."""
    case = linear(1, THREADS + 24, CHUNK + 76, 4, 32, True, True, False, "none", False, static=False)
    floats = {k: v for k, v in case[2].items() if k not in ("u", "params", "wsum")}
    floats["x"] = torch.randn(2, 3, CHUNK + 76)
    for name, arguments in (("linear_packed", case[2]), ("linear_packed_float", floats)):
        target, what, full = with_outliers((name, case[1], arguments), 11)
        uses = [repeated(full, times) for times in (1, 6)]
        for use, got in zip(uses, emulate_operator(target, uses), strict=True):
            check(target, what, got, reference_of(target, use), tolerance(target, use))


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
def test_sparse_tensor_cores(symbolic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """2:4 from 16 rows on: rows, tokens and inputs that fill no tile, all epilogues, gating."""
    chosen = [(what, a) for what, a in CASES["linear_sparse"] if what.startswith("2:4")]
    chosen = [(what, repeated(a, times)) for times in (1, 20) for what, a in chosen]
    if symbolic:
        chosen = [(what, a) for what, a in chosen if a["params"].dim() > 1][::2]
    axes = dict.fromkeys(ROWS, (0,)) if symbolic else None
    for order in ("forwards", "backwards"):
        monkeypatch.setenv("ISOFOLD_EMULATOR_ORDER", order)
        results = emulate_operator("linear_sparse", [a for _, a in chosen], axes)
        for (what, arguments), got in zip(chosen, results, strict=True):
            check("linear_sparse", what, got, reference_of("linear_sparse", arguments), 3e-6)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17, 32])
def test_few_rows_at_the_edges_of_tiles(rows: int) -> None:
    what, arguments = next(c for c in CASES["linear_packed"] if "w4g64-zero" in c[0] and "gated" in c[0])
    more = repeated(arguments, rows)
    lead = {
        n: more[n].reshape(-1, more[n].shape[-1])[:rows]
        for n in ROWS
        if more.get(n) is not None and n in more
    }
    arguments = {**more, **{n: v for n, v in lead.items() if not (n == "params" and more[n].dim() == 1)}}
    (got,) = emulate_operator("linear_packed", [arguments])
    check("linear_packed", f"{what} rows {rows}", got, reference_of("linear_packed", arguments), 3e-6)


def test_activations_that_are_no_halves() -> None:
    """Beyond float16's range they are its largest number; NaN reaches the outputs of its token, and no other."""
    what, arguments = next(c for c in CASES["linear_packed_float"] if "w4g32" in c[0])
    x = arguments["x"].clone()
    x[0, 0, 0], x[0, 1, 3] = 1e6, torch.nan
    (got,) = emulate_operator("linear_packed_float", [{**arguments, "x": x}])
    (expected,) = reference_of("linear_packed_float", {**arguments, "x": x.clamp(-65504, 65504)})
    assert got[0][0, 1].isnan().all()
    assert not got[0].isnan().any(-1).flatten()[[0, 2, 3, 4, 5]].any()
    finite = torch.where(expected.isnan(), 0, expected)
    check("linear_packed_float", what, [torch.where(got[0].isnan(), 0, got[0])], [finite], 2e-3)


def test_heads_that_do_not_fit_a_block_are_refused() -> None:
    _, arguments = CASES["attention"][0]
    full = arguments_of("attention", {**arguments, "v": torch.zeros(2, 7, 4, WIDEST + 1)})
    with pytest.raises(UnsupportedError, match="too wide for one block") as error:
        EMITTERS["attention"](call_of("attention", full)[0])
    assert f"at most {WIDEST}" in str(error.value)


def test_nothing_behind_a_row_is_read() -> None:
    """96 inputs in a group of 128 with zero points, whose padding decodes to other numbers than zero."""
    _, what, arguments = linear(5, 20, 96, 4, 128, True, False, False, "none", False, static=False)
    kept = {k: v for k, v in arguments.items() if k not in ("u", "params", "wsum")}
    x = torch.randn(2, 96)
    x[1] = torch.nan
    (got,) = emulate_operator("linear_packed_float", [{**kept, "x": x}])
    (expected,) = reference_of("linear_packed_float", {**kept, "x": x[:1]})
    check("linear_packed_float", what, [got[0][:1]], [expected], 2e-3)
