"""Gather the patches of a quantized sample into rows of a packed linear's input (im2col), 16 positions at a time.

Patch element j of the position whose first byte is at `base` is `sample[base + offsets[j]]`. Positions that
follow each other in an output row are `step` bytes apart (the stride), so one vector load fetches element j of 16
of them. Four elements make the 32-bit word that the linear's dot product reads; sixteen such words of sixteen
positions are a 16 x 16 transpose away from 64 consecutive bytes of every row.

Bytes past the last position of an output row are read and dropped: the sample needs 32 bytes of slack at its end.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, store, when
from .math import transpose16


def _bytes(sample: Any, at: Any, step: int) -> Any:
    """16 bytes `step` apart as int32 lanes."""
    if step == 1:
        return T.cast(load(sample, at), "int32x16")
    pairs = load(sample, at, 32)
    return T.cast(tirx.Shuffle([pairs], [tirx.const(2 * i, "int32") for i in range(16)]), "int32x16")


def _word(sample: Any, offsets: Any, base: Any, j: Any, step: int) -> Any:
    """Elements j .. j + 3 of 16 patches, as one int32 each."""
    word = _bytes(sample, base + load(offsets, j, 1), step)
    for i in range(1, 4):
        shift = T.broadcast(T.int32(8 * i), 16)
        word = T.bitwise_or(word, T.shift_left(_bytes(sample, base + load(offsets, j + i, 1), step), shift))
    return bind(word)


def _gather(
    isa: Isa,
    sample: Any,
    offsets: Any,
    rows: Any,
    base: Any,
    count: Any,
    words: Any,
    row_words: Any,
    *,
    step: int,
) -> None:
    del isa
    with for_range(0, words // 16) as block:
        found = [_word(sample, offsets, base, block * 64 + 4 * w, step) for w in range(16)]
        # Lanes are only moved: as floats they are never computed with.
        columns = transpose16([bind(T.reinterpret("float32x16", word)) for word in found])
        for position, column in enumerate(columns):
            with when(count > position):
                store(rows, position * row_words + block * 16, T.reinterpret("int32x16", column))
    with for_range(words // 16 * 16, words) as w:
        word = _word(sample, offsets, base, w * 4, step)
        for position in range(16):
            with when(count > position):
                lane = tirx.Shuffle([word], [tirx.const(position, "int32")])
                store(rows, position * row_words + w, lane, 1)


KERNELS = [
    # up to 16 positions; whole words only (elements past 4 * words are the caller's)
    Kernel(
        f"gather_patches_{step}",
        "sample: const u8*, offsets: const i64*, rows: i32*, base: i64, count: i64, words: i64, row_words: i64",
        partial(_gather, step=step),
        "conv",
    )
    for step in (1, 2)
]
