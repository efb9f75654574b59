"""The few large weights beside packed ones (``compiler/dialect/outlier_packing.py``): products of a sliced ELLPACK.

Identity: ``t[m, r] += factor * sum_j values[j, r] x[m, places[j, r]]`` for the 16 rows r of one panel, where ``t``
holds the sums of the dense part in front of its epilogue (linear.py) and ``factor`` brings both to one unit.

* Few rows of activations (``outlier_gemv_R``, ``outlier_gemv8_R`` on 8 bits): lane r is row r of the panel, so a step
  is one vector of values times 16 activations that are fetched one by one (2.7 ns a step on Zen 5; ``vgatherdps``
  takes 4.7). A step needs nothing but the first-level cache, so memory would idle meanwhile: it asks for a line of
  the dense weights that follow, for their scales, and for the outliers of panels ahead.
* Many rows of 8-bit activations (``outlier_block_V``): activations lie transposed (``outlier_transpose``, ``[kp,
  64]``), and one outlier meets 16 V rows of them in V multiply-adds.
* Many rows of float activations: dense weights are floats in the first-level cache at that point, a chunk of inputs at
  a time, and ``outlier_merge`` adds the outliers of the chunk to them: no products at all.
* ``outlier_rescale`` turns integer sums of a format with one scale a row into floats, so that outliers can be added.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store, when
from .linear import prefetch
from .math import transpose16

GEMV_ROWS = (4, 2, 1)
"""Rows of activations of the kernels that fetch them one by one."""

BLOCK_VECTORS = (4, 2, 1)
"""Vectors of 16 rows of activations of the kernels for many rows."""

BLOCK = 64
"""Rows of activations that lie transposed side by side."""

AHEAD = 4096
"""Bytes of places, and of values, that are fetched ahead: about three panels with 1 % of 4096 inputs."""


def _splat(value: float) -> Any:
    return T.broadcast(T.float32(value), 16)


def _join(scalars: list[Any]) -> Any:
    """One vector of 16 scalars."""
    return bind(tirx.Shuffle(scalars, [tirx.const(i, "int32") for i in range(16)]))


def _fetch_entries(places: Any, values: Any, step: Any) -> None:
    """Ask for what a kernel at ``step`` needs a while later (a step is half a line of each)."""
    for buffer in (places, values):
        prefetch(buffer, step * 16 + AHEAD // 2, 3)


def _gemv(rows: int, isa: Isa, *arguments: Any) -> None:
    """t[r, 0:16] += factor times the panel's outliers on row r of x.

    A step fetches 64 bytes at ``ahead`` and those at ``scales``, which it moves on by ``stride`` bytes.
    """
    del isa
    x, ldx, places, values, steps, factor, ahead, scales, stride, t, ldt = arguments
    sums = registers(rows, "float32")
    for r in range(rows):
        store(sums, r * 16, _splat(0.0))
    with for_range(0, steps) as step:
        weights = bind(T.cast(load(values, step * 16), "float32x16"))
        at = [bind(T.cast(load(places, step * 16 + lane, 1), "int64")) for lane in range(16)]
        for r in range(rows):
            fetched = T.cast(_join([load(x, place + ldx * r, 1) for place in at]), "float32x16")
            store(sums, r * 16, T.fma(fetched, weights, load(sums, r * 16)))
        prefetch(ahead, step * 64, 2)
        prefetch(scales, step * stride, 3)
        _fetch_entries(places, values, step)
    for r in range(rows):
        store(t, ldt * r, T.fma(load(sums, r * 16), T.broadcast(factor, 16), load(t, ldt * r)))


def _transpose(isa: Isa, u: Any, ldu: Any, rows: Any, kp: Any, out: Any) -> None:
    """out[k, m] = u[m, k] for up to 64 rows, 16 at a time; what is behind the last row repeats it."""
    del isa
    with for_range(0, (rows + 15) // 16) as block, for_range(0, kp // 16) as i:
        at = [bind(tirx.min(block * 16 + lane, rows - 1) * ldu + i * 16) for lane in range(16)]
        columns = transpose16([bind(T.cast(load(u, offset), "float32x16")) for offset in at])
        for lane, column in enumerate(columns):
            store(out, (i * 16 + lane) * BLOCK + block * 16, T.cast(column, "uint8x16"))


def _block(vectors: int, isa: Isa, *arguments: Any) -> None:
    """t[m, 0:16] += factor times the panel's outliers on row m of 16 ``vectors`` rows; ``sums`` is scratch [16, 64]."""
    del isa
    ut, places, values, steps, factor, sums, t, ldt = arguments
    acc = registers(vectors, "float32")
    with for_range(0, 16) as row:
        for v in range(vectors):
            store(acc, v * 16, _splat(0.0))
        with for_range(0, steps) as step:
            place = bind(T.cast(load(places, step * 16 + row, 1), "int64") * BLOCK)
            value = bind(T.broadcast(T.cast(load(values, step * 16 + row, 1), "float32"), 16))
            for v in range(vectors):
                codes = T.cast(load(ut, place + v * 16), "float32x16")
                store(acc, v * 16, T.fma(codes, value, load(acc, v * 16)))
        for v in range(vectors):
            store(sums, row * BLOCK + v * 16, load(acc, v * 16) * T.broadcast(factor, 16))
    for v in range(vectors):
        turned = transpose16([bind(load(sums, row * BLOCK + v * 16)) for row in range(16)])
        for lane, column in enumerate(turned):
            at = ldt * (v * 16 + lane)
            store(t, at, load(t, at) + column)


def _merge(isa: Isa, *arguments: Any) -> None:
    """out[k - begin, r] += factor * value for the outliers at begin <= k < end; rows of out are 32 floats apart.

    ``cursor[r]`` counts the entries of row r that are done: chunks come in order, from 0 on.
    """
    del isa
    places, values, steps, factor, cursor, begin, end, out = arguments
    position = registers(1, "int64", 1)
    with for_range(0, 16) as row:
        store(position, 0, load(cursor, row, 1), 1)

        def at(row: Any = row) -> Any:
            return load(position, 0, 1) * 16 + row

        def place(row: Any = row) -> Any:
            # Of a row that is done, its last entry: the buffer may end behind it.
            last = tirx.min(load(position, 0, 1), steps - 1)
            return T.cast(load(places, last * 16 + row, 1), "int64")

        with T.While(tirx.all(load(position, 0, 1) < steps, place() < end)):
            where = bind((place() - begin) * 32 + row)
            value = T.cast(load(values, at(), 1), "float32") * factor
            store(out, where, load(out, where, 1) + value, 1)
            store(position, 0, load(position, 0, 1) + 1, 1)
        store(cursor, row, load(position, 0, 1), 1)


def _rescale(isa: Isa, *arguments: Any) -> None:
    """t = scale * (t - unit * zero * usum) for int32 sums t, which become float32; ``flags`` 1: with zero points."""
    del isa
    t, ldt, scale, zero, usum, unit, rows, panels, flags = arguments
    total = registers(1, "int32", 16)
    with for_range(0, rows) as m, for_range(0, panels) as p:
        at = bind(ldt * m + p * 16)
        store(total, 0, T.reinterpret("int32x16", load(t, at)))
        with when(flags != T.int32(0)):
            points = T.cast(load(zero, p * 16), "int32x16")
            store(total, 0, load(total, 0) - points * T.broadcast(load(usum, m, 1) * unit, 16))
        store(t, at, T.cast(load(total, 0), "float32x16") * load(scale, p * 16))


def _kernels() -> list[Kernel]:
    entries = "places: const u16*, values: const f16*, steps: i64, factor: f32"
    fetched = "ahead: const u8*, scales: const u8*, stride: i64"
    kernels = []
    for rows in GEMV_ROWS:
        for name, dtype in (("outlier_gemv", "f32"), ("outlier_gemv8", "u8")):
            signature = f"x: const {dtype}*, ldx: i64, {entries}, {fetched}, t: f32*, ldt: i64"
            kernels.append(Kernel(f"{name}_{rows}", signature, partial(_gemv, rows), "outliers"))
    for vectors in BLOCK_VECTORS:
        signature = f"ut: const u8*, {entries}, sums: f32*, t: f32*, ldt: i64"
        kernels.append(Kernel(f"outlier_block_{vectors}", signature, partial(_block, vectors), "outliers"))
    rescale = "t: f32*, ldt: i64, scale: const f32*, zero: const i8*, usum: const i32*, unit: i32"
    others = {
        "outlier_transpose": ("u: const u8*, ldu: i64, rows: i64, kp: i64, out: u8*", _transpose),
        "outlier_merge": (f"{entries}, cursor: i64*, begin: i64, end: i64, out: f32*", _merge),
        "outlier_rescale": (f"{rescale}, rows: i64, panels: i64, flags: i32", _rescale),
    }
    kernels += [Kernel(name, signature, emit, "outliers") for name, (signature, emit) in others.items()]
    return kernels


KERNELS = _kernels()
