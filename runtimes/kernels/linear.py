"""Packed linears on quantized activations: integer tiles, and the epilogue that turns them into float outputs.

Identity (docs/dialect.md)::

    y[m, n] = s[m] * (multiplier * sum_g scale[n, g] * (sum_{k in g} u[m, k] w[n, k] - zero[n, g] * usum[m, g])
                      - z[m] * wsum[n]) + bias[n]

Two kernels share it. A *tile* computes the sums over k for a few rows and one or two panels (a panel is 16
output features, contiguous over K) into a small scratch ``t`` that stays in the first-level cache; the
*epilogue* applies everything else and is the only one that knows about N, so that tiles never meet a ragged
edge (weights are padded to 16 rows and to Kp columns).

==================  ======================================================================================
``tile*_pc_RxC``    per channel: ``t`` is int32, the sum of u w; the epilogue applies scale and zero
``tile*_g_RxC``     groups: ``t`` is float32, the sum over groups of scale * sum
``tile*_gz_RxC``    the same with zero points; needs the sums of u over each group as float32
``gemvB_*_R``       these three on packed weights of B = 2, 3, 4 bits (`codec.py`; 2 and 3 in groups only), decoded in
                    registers: few rows, memory is the limit
``gemvB_*_wide``    these for one row and several panels at once (knob ``gemv_panels``)
``unpack_intB``     packed panel to int8 panel: many rows, paid once for all of them, then ``tile4_*``
``row_sums``        sums of u over each group, for zero points (times a factor, see `linear_driver.h`)
``epilogue_*``      all the rest; gated: panel 0 is the gate, panel 1 the factor
==================  ======================================================================================

``tile8`` takes int8 weights, ``tile4`` unpacked ones of 4 bits and fewer (they differ on v3, see dot.py).
Tiles *add* to ``t`` when ``accumulate`` is set, so that K can be cut into chunks (panels are unpacked a chunk
at a time). With zero points, ``tile4`` and ``gemvB`` subtract ``unit(4) * zero * usum``: what that unit is not right
for (other widths, zero points in sixteenths) is in the factor of ``usum``.

Tile shape. v4: 8 rows x 2 panels, 16 accumulators; a step of 4 inputs costs 2 weight loads and 8 broadcasts
for 16 ``vpdpbusd``: 10 loads for 16 cycles on a machine with one 512-bit dot and one 512-bit load a cycle
(Zen 4), 5 for 8 with two of each. Registers: 16 accumulators + 2 weights + 1 broadcast of 32. Shapes from 4x4
to 9x3 all measure 97 % of the peak on Zen 4 with everything in the second-level cache, so 8x2 was chosen for
what it divides: M = 128 without a remainder, N in steps of 32 which is also the gate/up pair. Groups need
integer and float sums, 16 + 16 would not fit: the tile is walked in 4x2 sub-tiles, 8 + 8 (one convert and one
multiply-add per vector and group: the bound is 8 / 9 of the peak at groups of 32, 32 / 33 at 128; keeping the
float sums of an 8x2 tile in memory was 10 % slower). v3: 4x1 sub-tiles of two 256-bit vectors, float sums in
``t``.

The integer sums are exact on both instruction sets while they fit int32: K <= 32768 with zero points, twice
that without.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

from tvm import tirx

from .codec import CODECS, Codec, unit
from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store, when
from .dot import (
    lanes,
    ones,
    split_activation,
    split_weight,
    vpdpbusd,
    vpmaddubsw,
    vpmaddwd,
)
from .knobs import knob
from .math import ACTIVATIONS, activate

ROWS = (8, 4, 2, 1)
"""Rows of the tiles; the driver covers M with them, largest first."""

GEMV_ROWS = (8, 4, 3, 2, 1)
"""Rows of the int4 kernels that unpack in registers; 8 rows hide the unpacking behind the dot products."""

STEPS = 8
"""Steps of 4 inputs that are unrolled: 32 inputs, the unit of Kp and the smallest group."""

_TILE = "u: const i32*, ldu: i64, w: const i8*, ldw: i64, inputs: i64"
_GROUPS = ", group: i64, scale: const f16*, lds: i64"
_ZERO = ", zero: const i8*, usum: const f32*, ldusum: i64"
_AHEAD = ", ahead: const i8*, stride: i64"


def _splat(value: float, dtype: str, count: int) -> Any:
    return T.broadcast(tirx.const(value, dtype), count)


def prefetch(buffer: Any, offset: Any, level: int) -> None:
    """Prefetch for reading; level 3 is the first-level cache, 2 the second (3.6 % slower for tiles on Zen 4), 0 the
    first for data that is used once."""
    address = T.address_of(load(buffer, offset, 1))
    arguments = (T.int32(0), T.int32(level), T.int32(1))
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", address, *arguments))


def prefetch_stream(buffer: Any, offset: Any, size: int = 1) -> None:
    """Prefetch what a kernel that streams through ``buffer`` (elements of ``size`` bytes) and stands at element
    ``offset`` needs next."""
    for distance, level in _stream_ahead():
        prefetch(buffer, offset + distance // size, level)


def _stream_ahead() -> list[tuple[int, int]]:
    """(bytes ahead, cache level as in :func:`prefetch`) of what kernels for few rows fetch as they stream weights.

    A near prefetch alone is non-temporal (level 0): weights then pass the second-level cache by, and activations and
    the code of the next nodes stay there. With 1.8 MB of weights a node and two threads on Zen 5 that is 10 % of the
    time of a node; where all weights fit the last level it changes nothing.
    """
    far = knob("stream_far")
    both = ((knob("stream_near"), 3 if far else 0), (far, knob("stream_far_level")))
    return [(distance, level) for distance, level in both if distance]


def _prefetch_scales(arrays: dict[str, Any], offset: Any) -> None:
    """Prefetch scales and zero points that lie the knob's distance behind ``offset``."""
    distance = knob("scales_ahead")
    for name in sorted(arrays.keys() & {"scale", "zero"}) if distance else ():
        prefetch(arrays[name], offset + distance, 3)


class _Tile:
    """Accumulators of one sub-tile and how they are advanced by one step of 4 inputs.

    Vector v of row r is the sum of ``acc[((chain * rows + r) * vectors + v) * lanes]`` over the chains, which steps
    take in turn; ``end`` moves 16-bit sums (v3, small weights) to int32.
    """

    def __init__(self, isa: Isa, rows: int, vectors: int, small: bool, chains: int = 1) -> None:
        self.isa, self.rows, self.vectors, self.lanes = isa, rows, vectors, lanes(isa)
        self.small = small and not isa.vnni
        self.chains = chains if isa.vnni else 1
        self.acc = registers(self.chains * rows * vectors, "int32", self.lanes)
        self.partial = registers(rows * vectors, "int16", 16) if self.small else None

    def clear(self) -> None:
        for i in range(self.chains * self.rows * self.vectors):
            store(self.acc, i * self.lanes, _splat(0, "int32", self.lanes), self.lanes)

    def begin(self) -> None:
        """Start a run of at most STEPS steps."""
        if self.partial is not None:
            for i in range(self.rows * self.vectors):
                store(self.partial, i * 16, _splat(0, "int16", 16), 16)

    def step(self, words: list[Any], weights: list[Any], chain: int = 0) -> None:
        """Add the products of one 32-bit word of activations per row with every weight vector."""
        n = self.lanes
        split = not self.isa.vnni and not self.small
        pairs = [split_weight(w) for w in weights] if split else []
        for r, word in enumerate(words):
            u = bind(T.broadcast(word, n))
            odd_even = split_activation(u) if split else None
            for v, weight in enumerate(weights):
                i = ((chain * self.rows + r) * self.vectors + v) * n
                if self.isa.vnni:
                    store(self.acc, i, vpdpbusd(load(self.acc, i, n), u, weight), n)
                elif self.partial is not None:
                    i *= 2
                    store(self.partial, i, load(self.partial, i, 16) + vpmaddubsw(u, weight), 16)
                else:
                    assert odd_even is not None
                    products = [vpmaddwd(a, b) for a, b in zip(odd_even, pairs[v], strict=True)]
                    store(self.acc, i, load(self.acc, i, n) + products[0] + products[1], n)

    def end(self) -> None:
        """Finish a run."""
        if self.partial is not None:
            for i in range(self.rows * self.vectors):
                widened = vpmaddwd(load(self.partial, i * 16, 16), ones())
                store(self.acc, i * 8, load(self.acc, i * 8, 8) + widened, 8)

    def value(self, row: int, vector: int) -> Any:
        at = range(
            row * self.vectors + vector, self.chains * self.rows * self.vectors, self.rows * self.vectors
        )
        first, *others = (load(self.acc, i * self.lanes, self.lanes) for i in at)
        return sum(others, first)


def _sub_tiles(isa: Isa, rows: int, panels: int) -> list[tuple[int, int, int, int]]:
    """(first row, rows, first vector, vectors) of the sub-tiles that fit the registers."""
    vectors = panels * 16 // lanes(isa)
    wide = min(vectors, 2)
    high = min(rows, knob("tile_rows"))
    return [(r, min(high, rows - r), v, wide) for v in range(0, vectors, wide) for r in range(0, rows, high)]


def _scale_vector(scale: Any, offset: Any, n: int) -> Any:
    return T.cast(load(scale, offset, n), f"float32x{n}")


def _add_group(
    isa: Isa, tile: _Tile, where: Any, vectors: int, sums: Any, at: Any, group: Any, arrays: dict[str, Any]
) -> None:
    """sums[at(r, v)] += scale * (sum - zero * usum) for the accumulators of a sub-tile and one group."""
    row0, vector0 = where
    n = tile.lanes
    unit = float(arrays.get("unit", 1))
    for v in range(vectors):
        column = (vector0 + v) * n
        panel, inside = divmod(column, 16)
        offset = bind(arrays["lds"] * panel + group * 16 + inside)
        scale = bind(_scale_vector(arrays["scale"], offset, n))
        zero = None
        if "zero" in arrays:
            zero = T.cast(load(arrays["zero"], offset, n), f"float32x{n}") * _splat(-unit, "float32", n)
            zero = bind(zero)
        for r in range(tile.rows):
            value = T.cast(tile.value(r, v), f"float32x{n}")
            if zero is not None:
                usum = load(arrays["usum"], arrays["ldusum"] * (row0 + r) + group, 1)
                value = T.fma(zero, T.broadcast(usum, n), value)
            store(sums, at(r, v), T.fma(value, scale, load(sums, at(r, v), n)), n)


def _clear(t: Any, ldt: Any, rows: int, panels: int, dtype: str) -> None:
    for r in range(rows):
        for p in range(panels):
            store(t, ldt * r + p * 16, _splat(0, dtype, 16))


class _Window:
    """Where a sub-tile lies in ``t``, and how sums move between registers and there."""

    def __init__(self, t: Any, ldt: Any, row0: int, rows: int, vector0: int, vectors: int, n: int) -> None:
        self.t, self.ldt, self.row0, self.vector0, self.vectors, self.n = t, ldt, row0, vector0, vectors, n
        self.every = [(r, v) for r in range(rows) for v in range(vectors)]

    def at(self, r: int, v: int) -> Any:
        """Offset in ``t``."""
        return self.ldt * (self.row0 + r) + (self.vector0 + v) * self.n

    def local(self, r: int, v: int) -> int:
        """Offset in registers."""
        return (r * self.vectors + v) * self.n

    def start(self, sums: Any, dtype: str, accumulate: Any) -> None:
        """Registers from ``t``, or zero."""
        with T.If(accumulate != T.int32(0)):
            with T.Then():
                for r, v in self.every:
                    store(sums, self.local(r, v), load(self.t, self.at(r, v), self.n), self.n)
            with T.Else():
                for r, v in self.every:
                    store(sums, self.local(r, v), _splat(0, dtype, self.n), self.n)

    def finish(self, sums: Any) -> None:
        """Registers to ``t``."""
        for r, v in self.every:
            store(self.t, self.at(r, v), load(sums, self.local(r, v), self.n), self.n)


def _tile(mode: str, rows: int, panels: int, small: bool, isa: Isa, *arguments: Any) -> None:
    """Emit one tile kernel: int8 panels against ``rows`` rows of activations."""
    u, ldu, w, ldw, inputs, *rest = arguments
    arrays: dict[str, Any] = {"unit": unit(isa, 4) if small else 1}
    group: Any = None
    if mode != "pc":
        group, arrays["scale"], arrays["lds"], *rest = rest
    if mode == "gz":
        arrays["zero"], arrays["usum"], arrays["ldusum"], *rest = rest
    ahead, stride, accumulate, t, ldt = rest
    n = lanes(isa)
    in_memory = mode != "pc" and not isa.vnni
    if in_memory:
        with when(accumulate == T.int32(0)):
            _clear(t, ldt, rows, panels, "float32")
    for row0, r_count, vector0, v_count in _sub_tiles(isa, rows, panels):
        tile = _Tile(isa, r_count, v_count, small, 1 if mode == "pc" else knob("tile_chains"))
        window = _Window(t, ldt, row0, r_count, vector0, v_count, n)

        def run(block: Any, row0: int = row0, vector0: int = vector0, tile: _Tile = tile) -> None:
            """STEPS steps from step ``block * STEPS``."""
            tile.begin()
            for k in range(STEPS):
                step = block * STEPS + k
                weights = []
                for v in range(tile.vectors):
                    panel, inside = divmod((vector0 + v) * n, 16)
                    at = bind(ldw * panel + step * 64)
                    weights.append(bind(load(w, at + inside * 4, 4 * n)))
                    if rows <= 2 and inside == 0:  # nothing but streaming: fetch this panel's own future
                        prefetch_stream(w, at)
                words = [load(u, ldu * (row0 + r) + step, 1) for r in range(tile.rows)]
                tile.step(words, weights, k % tile.chains)
                if rows > 2 and row0 == 0 and vector0 == 0 and k in (2, 6):
                    prefetch(ahead, block * stride + (64 if k == 6 else 0), knob("tile_ahead_level"))
            tile.end()

        if mode == "pc":
            window.start(tile.acc, "int32", accumulate)
            with for_range(0, inputs // (4 * STEPS)) as block:
                run(block)
            window.finish(tile.acc)
            continue
        sums = t
        if not in_memory:
            sums = registers(r_count * v_count, "float32", n)
            window.start(sums, "float32", accumulate)
        blocks = bind(group // (4 * STEPS))
        with for_range(0, inputs // group) as g:
            tile.clear()
            with for_range(0, blocks) as b:
                run(g * blocks + b)
            place = window.at if in_memory else window.local
            _add_group(isa, tile, (row0, vector0), v_count, sums, place, g, arrays)
        if not in_memory:
            window.finish(sums)


def _gemv(codec: Codec, mode: str, rows: int, isa: Isa, *arguments: Any) -> None:
    """Emit one kernel for few rows: one panel of packed weights, decoded in registers.

    Up to 4 rows have two accumulators each (even and odd steps): fewer chains than that would wait for themselves.
    """
    u, ldu, w, inputs, *rest = arguments
    arrays: dict[str, Any] = {"unit": unit(isa, 4), "lds": 0}
    group: Any = None
    if mode != "pc":
        group, arrays["scale"], *rest = rest
    if mode == "gz":
        arrays["zero"], arrays["usum"], arrays["ldusum"], *rest = rest
    t, ldt = rest
    n = lanes(isa)
    columns = 2 if rows <= 4 else 1
    high = rows if isa.vnni else min(rows, 4)
    for vector, row0 in [(v, r) for v in range(16 // n) for r in range(0, rows, high)]:
        tile = _Tile(isa, high, columns, True)
        window = _Window(t, ldt, row0, high, vector, 1, n)

        def run(block: Any, vector: int = vector, row0: int = row0, tile: _Tile = tile) -> None:
            fetched: list[Any] = []

            def fetch(i: int) -> Any:
                at = (block * codec.bits + i) * 64
                fetched.append(at)
                return bind(load(w, at + vector * n * 4, 4 * n))

            tile.begin()
            for step, weight in codec.decode(isa, fetch):
                while fetched:
                    at = fetched.pop()
                    if vector == 0 and row0 == 0:
                        prefetch_stream(w, at)
                words = [load(u, ldu * (row0 + r) + block * STEPS + step, 1) for r in range(high)]
                _step_column(tile, words, weight, step % columns)
            tile.end()

        def merge(tile: _Tile = tile) -> None:
            """Even and odd sums into column 0."""
            for r in range(high if columns == 2 else 0):
                store(tile.acc, r * 2 * n, tile.value(r, 0) + tile.value(r, 1), n)

        tile.clear()
        if mode == "pc":
            with for_range(0, inputs // (4 * STEPS)) as block:
                run(block)
            merge()
            for r in range(high):
                store(t, window.at(r, 0), tile.value(r, 0), n)
            continue
        sums = registers(high, "float32", n)
        for r in range(high):
            store(sums, r * n, _splat(0, "float32", n), n)
        blocks = bind(group // (4 * STEPS))
        with for_range(0, inputs // group) as g:
            tile.clear()
            if vector == 0 and row0 == 0:
                _prefetch_scales(arrays, g * 16)
            with for_range(0, blocks) as b:
                run(g * blocks + b)
            merge()
            _add_group(isa, tile, (row0, vector), 1, sums, window.local, g, arrays)
        window.finish(sums)


def _gemv_wide(codec: Codec, mode: str, isa: Isa, *arguments: Any) -> None:
    """Emit the kernel for one row and `gemv_panels` panels at once, ``ldw`` bytes apart.

    Panel p's sums go to ``t[p // 2 * 32 + p % 2 * 16]``, as tasks of two panels have them. Each output's sums are made
    in the order of `_gemv`.
    """
    u, w, ldw, inputs, *rest = arguments
    panels = knob("gemv_panels")
    arrays: dict[str, Any] = {"unit": unit(isa, 4)}
    group: Any = None
    if mode != "pc":
        group, arrays["scale"], arrays["lds"], *rest = rest
    if mode == "gz":
        arrays["zero"], arrays["usum"], *rest = rest
        arrays["ldusum"] = 0
    (t,) = rest
    n = lanes(isa)
    columns = 2 if panels < 4 else 1  # chains of sums of a panel: as many as wait for each other
    for vector in range(16 // n):
        tiles = [_Tile(isa, 1, columns, True) for _ in range(panels)]

        def run(block: Any, vector: int = vector, tiles: list[_Tile] = tiles) -> None:
            def fetch(i: int, panel: int) -> Any:
                inside = bind((block * codec.bits + i) * 64)
                at = bind(ldw * panel + inside)
                packed = bind(load(w, at + vector * n * 4, 4 * n))
                for distance, level in _stream_ahead() if vector == 0 else ():
                    # Behind a panel's end lies one that is being read: go on where these panels' next ones are.
                    skipped = T.Select(inside + distance >= ldw, ldw * (panels - 1), T.int64(0))
                    prefetch(w, at + distance + skipped, level)
                return packed

            for tile in tiles:
                tile.begin()
            decoded = [codec.decode(isa, partial(fetch, panel=p)) for p in range(panels)]
            for steps in zip(*decoded, strict=True):
                for tile, (step, weight) in zip(tiles, steps, strict=True):
                    words = [load(u, block * STEPS + step, 1)]
                    _step_column(tile, words, weight, step % columns)
            for tile in tiles:
                tile.end()

        def merge(tiles: list[_Tile] = tiles) -> None:
            for tile in tiles if columns == 2 else ():
                store(tile.acc, 0, tile.value(0, 0) + tile.value(0, 1), n)

        def clear(tiles: list[_Tile] = tiles) -> None:
            for tile in tiles:
                tile.clear()

        place = [p // 2 * 32 + p % 2 * 16 + vector * n for p in range(panels)]
        clear()
        if mode == "pc":
            with for_range(0, inputs // (4 * STEPS)) as block:
                run(block)
            merge()
            for p, tile in enumerate(tiles):
                store(t, place[p], tile.value(0, 0), n)
            continue
        sums = registers(panels, "float32", n)
        for p in range(panels):
            store(sums, p * n, _splat(0, "float32", n), n)
        blocks = bind(group // (4 * STEPS))
        with for_range(0, inputs // group) as g:
            clear()
            for p in range(panels if vector == 0 else 0):
                _prefetch_scales(arrays, arrays["lds"] * p + g * 16)
            with for_range(0, blocks) as b:
                run(g * blocks + b)
            merge()
            for p, tile in enumerate(tiles):
                _add_group(
                    isa, tile, (0, p * (16 // n) + vector), 1, sums, lambda r, v, p=p: p * n, g, arrays
                )
        for p in range(panels):
            store(t, place[p], load(sums, p * n, n), n)


def _step_column(tile: _Tile, words: list[Any], weight: Any, column: int) -> None:
    """One step into one column of accumulators."""
    n = tile.lanes
    for r, word in enumerate(words):
        i = (r * tile.vectors + column) * n
        u = bind(T.broadcast(word, n))
        if tile.partial is not None:
            store(tile.partial, 2 * i, load(tile.partial, 2 * i, 16) + vpmaddubsw(u, weight), 16)
        else:
            store(tile.acc, i, vpdpbusd(load(tile.acc, i, n), u, weight), n)


def _unpack(codec: Codec, isa: Isa, packed: Any, blocks: Any, out: Any) -> None:
    """Panel bytes of ``blocks`` times 32 inputs to the int8 layout, codes times :func:`codec.unit`."""
    n = lanes(isa)
    with for_range(0, blocks) as block:
        for part in range(16 // n):

            def fetch(i: int, part: int = part) -> Any:
                return bind(load(packed, (block * codec.bits + i) * 64 + part * n * 4, 4 * n))

            for step, weight in codec.decode(isa, fetch):
                store(out, (block * STEPS + step) * 64 + part * n * 4, weight, 4 * n)


def _row_sums(
    isa: Isa, u: Any, ldu: Any, rows: Any, groups: Any, group: Any, factor: Any, as_int: Any, as_float: Any
) -> None:
    """Sums of u over groups of ``group`` inputs: as int32, and times ``factor``, a power of two, as float32 (both
    exact below 2**24)."""
    with for_range(0, rows) as m, for_range(0, groups) as g:
        acc = registers(1, "int32", 16)
        store(acc, 0, _splat(0, "int32", 16))
        with for_range(0, group // 16) as i:
            store(acc, 0, load(acc, 0) + T.cast(load(u, ldu * m + g * group + i * 16), "int32x16"))
        total = registers(1, "int32", 1)
        store(total, 0, T.int32(0), 1)
        for i in range(16):
            store(total, 0, load(total, 0, 1) + load(acc, i, 1), 1)
        store(as_int, m * groups + g, load(total, 0, 1), 1)
        store(as_float, m * groups + g, T.cast(load(total, 0, 1), "float32") * factor, 1)


HAS_BIAS, HAS_RESIDUAL, HAS_ZERO = 1, 2, 4


def _epilogue(activation: str, mode: str, gated: bool, isa: Isa, *arguments: Any) -> None:
    """Emit one epilogue over ``rows`` rows and ``columns`` valid columns (at most 32; gated: at most 16)."""
    t, ldt, *rest = arguments
    scale = zero = usum = unit = None
    if mode == "pc":
        scale, zero, usum, unit, *rest = rest
    params, ldparams, wsum, bias, residual, y, ldy, rows, columns, multiplier, flags = rest
    outputs = 1 if gated else 2
    panels = 2
    padded = registers(panels, "float32", 16)
    spill = registers(1, "float32", 16)

    def flag(bit: int) -> Any:
        return (flags & T.int32(bit)) != T.int32(0)

    for p in range(panels):
        store(padded, p * 16, _splat(0, "float32", 16))
    with when(flag(HAS_BIAS)):
        if gated:
            for p in range(panels):
                store(padded, p * 16, load(bias, p * 16))
        else:
            with T.If(columns == T.int64(32)):
                with T.Then():
                    for p in range(panels):
                        store(padded, p * 16, load(bias, p * 16))
                with T.Else(), for_range(0, columns) as j:
                    store(padded, j, load(bias, j, 1), 1)

    def linear(m: Any, p: int, s: Any, sz: Any) -> Any:
        at = ldt * m + p * 16
        if mode == "pc":
            total = registers(1, "int32", 16)
            store(total, 0, load(t, at))
            with when(flag(HAS_ZERO)):
                points = T.cast(load(zero, p * 16), "int32x16")
                store(total, 0, load(total, 0) - points * T.broadcast(load(usum, m, 1) * unit, 16))
            value = T.cast(load(total, 0), "float32x16") * load(scale, p * 16)
        else:
            value = load(t, at)
        shift = T.fma(sz, load(wsum, p * 16), load(padded, p * 16))
        return bind(T.fma(s, value, shift))

    def output(m: Any, p: int, s: Any, sz: Any) -> Any:
        value = activate(linear(m, p, s, sz), activation)
        return bind(value * linear(m, 1, s, sz) if gated else value)

    def factors(m: Any) -> tuple[Any, Any]:
        """s * multiplier and -s * z of a row."""
        s = bind(load(params, ldparams * m, 1))
        z = load(params, ldparams * m + 1, 1)
        return bind(T.broadcast(s * multiplier, 16)), bind(T.broadcast(T.float32(0.0) - s * z, 16))

    def whole(m: Any, p: int, s: Any, sz: Any) -> None:
        value = output(m, p, s, sz)
        at = bind(ldy * m + p * 16)
        with T.If(flag(HAS_RESIDUAL)):
            with T.Then():
                store(y, at, value + load(residual, at))
            with T.Else():
                store(y, at, value)

    def ragged(m: Any, p: int) -> None:
        value = output(m, p, *factors(m))
        at = bind(ldy * m + p * 16)
        store(spill, 0, value)
        with for_range(0, tirx.min(columns - T.int64(16 * p), T.int64(16))) as j, T.If(flag(HAS_RESIDUAL)):
            with T.Then():
                store(y, at + j, load(spill, j, 1) + load(residual, at + j, 1), 1)
            with T.Else():
                store(y, at + j, load(spill, j, 1), 1)

    with T.If(columns == T.int64(16 * outputs)):
        with T.Then(), for_range(0, rows) as m:
            both = factors(m)
            for p in range(outputs):
                whole(m, p, *both)
        with T.Else():
            for p in range(outputs):
                with when(columns > T.int64(16 * p)), for_range(0, rows) as m:
                    ragged(m, p)


def _kernels() -> list[Kernel]:
    kernels = []
    tails = {"pc": "", "g": _GROUPS, "gz": _GROUPS + _ZERO}
    for mode, extra in tails.items():
        t = "t: i32*" if mode == "pc" else "t: f32*"
        for rows in ROWS:
            for panels in (1, 2):
                for small in (False, True):
                    name = f"tile{4 if small else 8}_{mode}_{rows}x{panels}"
                    signature = f"{_TILE}{extra}{_AHEAD}, accumulate: i32, {t}, ldt: i64"
                    emit = partial(_tile, mode, rows, panels, small)
                    kernels.append(Kernel(name, signature, emit, f"linear_{mode}"))
        for codec, rows in product(CODECS.values(), GEMV_ROWS):
            if mode == "pc" and codec.bits < 4:
                continue
            signature = f"u: const i32*, ldu: i64, w: const u8*, inputs: i64{extra.replace(', lds: i64', '')}"
            signature += f", {t}, ldt: i64"
            emit = partial(_gemv, codec, mode, rows)
            kernels.append(
                Kernel(f"gemv{codec.bits}_{mode}_{rows}", signature, emit, f"linear_gemv{codec.bits}")
            )
        for codec in CODECS.values():
            if mode == "pc" and codec.bits < 4:
                continue
            signature = (
                f"u: const i32*, w: const u8*, ldw: i64, inputs: i64{extra.replace(', ldusum: i64', '')}, {t}"
            )
            emit = partial(_gemv_wide, codec, mode)
            kernels.append(
                Kernel(f"gemv{codec.bits}_{mode}_wide", signature, emit, f"linear_gemv{codec.bits}")
            )
    unpack = "packed: const u8*, blocks: i64, out: i8*"
    kernels += [
        Kernel(f"unpack_int{codec.bits}", unpack, partial(_unpack, codec), f"linear_gemv{codec.bits}")
        for codec in CODECS.values()
    ]
    sums = "u: const u8*, ldu: i64, rows: i64, groups: i64, group: i64, factor: f32, as_int: i32*, as_float: f32*"
    kernels.append(Kernel("row_sums", sums, _row_sums, "linear_gemv4"))
    tail = ", params: const f32*, ldparams: i64, wsum: const f32*, bias: const f32*, residual: const f32*"
    tail += ", y: f32*, ldy: i64, rows: i64, columns: i64, multiplier: f32, flags: i32"
    heads = {
        "pc": "t: const i32*, ldt: i64, scale: const f32*, zero: const i8*, usum: const i32*, unit: i32",
        "g": "t: const f32*, ldt: i64",
    }
    for mode, head in heads.items():
        for gated in (False, True):
            for activation in ACTIVATIONS:
                name = f"epilogue_{mode}_{activation}{'_gated' if gated else ''}"
                kernels.append(
                    Kernel(name, head + tail, partial(_epilogue, activation, mode, gated), "linear_end")
                )
    return kernels


KERNELS = _kernels()
