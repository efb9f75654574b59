"""Linears on int8 weights with few non-zeros: a byte for each says where in 256 inputs it stands (layout `windows`).

Identity: ``t[n] = sum_i values[i] u[256 w + places[i]]``. The 256 activations of a window are four registers, which
two ``vpermi2b`` and a choice by the place's highest bit look 64 places up in; ``vpdpbusd`` with the values (those
behind the row's last masked away) does the rest. A row and a window cost the same however few values there are: on
Zen 5 3.4 cycles where at most 32 values are there (loads of 32 bytes, which seldom cross a line), 5.5 with 64. Needs
AVX512-VBMI; elsewhere, and with many rows of activations, the list of places that all encodings share
(`sparse_many.py`).
"""

from __future__ import annotations

from typing import Any

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store
from .dot import vpdpbusd
from .linear import prefetch
from .math import reduce_lanes, shuffle
from .sparse_many import STEP, VBMI2, counter, splat

WINDOW = 256

AHEAD = 6144
"""Bytes ahead of what is fetched of places and of values."""


def _gemv(isa: Isa, *arguments: Any) -> None:
    """Sums ``t[0..15]`` of one panel of 16 rows of weights and a row of activations of ``256 windows``."""
    x, windows, counts, places, values, live, t = arguments
    if not isa.vnni:
        return  # never called: the driver takes lists
    sums = registers(16, "int32", 16)
    for r in range(16):
        store(sums, r * 16, splat(0, "int32", 16))
    at = counter()
    store(at, 0, T.int64(0), 1)
    with for_range(0, windows) as w:
        tables = [bind(load(x, w * WINDOW + 64 * i, 64)) for i in range(4)]
        for r in range(16):
            begin = bind(load(at, 0, 1))
            count = bind(T.cast(load(counts, w * 16 + r, 1), "int64"))
            if r % 2 == 0:
                prefetch(places, begin + AHEAD, 0)
                prefetch(values, begin + AHEAD, 0)

            def add(start: Any, left: Any, lanes: int, r: int = r) -> None:
                """Values from ``start`` on, ``left`` of them."""
                index = load(places, start, lanes)
                bits = T.reinterpret("uint1x64", load(live, left, 1)) != splat(0, "uint1", 64)
                found = load(values, start, lanes)
                if lanes == 32:
                    index = shuffle(index, splat(0, "uint8", 32), range(64))
                    found = shuffle(found, splat(0, "int8", 32), range(64))
                index = bind(T.reinterpret("int8x64", index))
                name = "llvm.x86.avx512.vpermi2var.qi.512"
                low, high = (
                    T.call_llvm_pure_intrin("int8x64", name, *_pair(tables, i, index)) for i in (0, 2)
                )
                picked = bind(T.Select(index < splat(0, "int8", 64), high, low))
                weights = T.Select(bits, found, splat(0, "int8", 64))
                total = vpdpbusd(load(sums, r * 16), T.reinterpret("int32x16", picked), weights)
                store(sums, r * 16, total)

            with T.If(count <= T.int64(32)):
                with T.Then():
                    add(begin, count, 32)
                with T.Else(), for_range(0, (count + T.int64(63)) // 64) as i:
                    add(begin + i * 64, T.min(count - i * 64, T.int64(64)), 64)
            store(at, 0, begin + count, 1)
    for r in range(16):
        store(t, r, reduce_lanes(load(sums, r * 16), lambda a, b: a + b), 1)


def _pair(tables: list[Any], i: int, index: Any) -> tuple[Any, Any, Any]:
    low, high = (T.reinterpret("int8x64", tables[j]) for j in (i, i + 1))
    return low, index, high


def _list(isa: Isa, *arguments: Any) -> None:
    """The list of sparse_many.py of one panel and ``windows`` windows (at most 3), in front of which stand ``at[0]``
    values of the panel; it moves on. ``found`` are the windows' counts."""
    found, places, values, windows, at, out, copy, ldout, counts = arguments
    for r in range(16):
        store(counts, r, T.int64(0), 1)
    with for_range(0, windows) as w, for_range(0, 16) as r:
        count = bind(T.cast(load(found, w * 16 + r, 1), "int64"))
        begin, filled = bind(load(at, 0, 1)), bind(load(counts, r, 1))
        with for_range(0, (count + T.int64(31)) // 32) as i:
            index = T.cast(load(places, begin + i * 32, 32), "uint16x32")
            first = T.broadcast(T.cast(w * WINDOW, "uint16"), 32)
            store(out, r * ldout + filled + i * 32, (index + first) << splat(6, "uint16", 32), 32)
            store(copy, r * ldout + filled + i * 32, load(values, begin + i * 32, 32), 32)
        store(at, 0, begin + count, 1)
        store(counts, r, filled + count, 1)
    with for_range(0, 16) as r:
        end = bind(load(counts, r, 1))
        store(copy, r * ldout + end, splat(0, "int8", STEP), STEP)
        store(out, r * ldout + end, splat(0, "uint16", STEP), STEP)
        store(counts, r, (end + T.int64(STEP - 1)) // STEP * STEP, 1)


_GEMV = "x: const u8*, windows: i64, counts: const u8*, places: const u8*, values: const i8*, live: const i64*, t: i32*"
_LIST = (
    "found: const u8*, places: const u8*, values: const i8*, windows: i64, at: i64*, out: u16*, copy: i8*, ldout: i64"
    ", counts: i64*"
)

KERNELS = [
    Kernel("sparse_windows_gemv", _GEMV, _gemv, "sparse_vbmi2", attributes=VBMI2),
    Kernel("sparse_windows_list", _LIST, _list, "sparse_many"),
]
