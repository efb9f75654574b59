"""How eight lanes read a token's codes (`cache_packing`) and hold its dimensions: wide loads, one token ahead.

A row of codes is cut into chunks of 32 `run` dimensions, of which a lane takes consecutive bytes with one load: 16 of
8-bit codes or 8 of 4-bit ones where the depth is a multiple of 128. Its dimensions come in pieces of four,

    8 bits  piece i of a chunk: dimensions 4 run part + 4 i ..
    4 bits  a lane's bytes hold two runs of dimensions, 16 apart: low nibbles, then high ones

and queries and sums are held in the same order (:func:`piece_start`). What a lane takes of a chunk lies within one
block of 32 dimensions, so where groups inside a head have pairs of their own, a lane needs one of them for each chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....compiler.dialect.cache_packing import ALIGN, pair_count, row_bytes
from ....compiler.dialect.packing import ceil_to
from .builder import at, call, div, get, local, mod, put, wide

LANES = 8
"""Lanes that share a token."""


def pieces_of(size: int) -> int:
    """Pieces of four dimensions that a lane holds."""
    return ceil_to(size, ALIGN) // ALIGN


def _run(size: int) -> int:
    """Pieces that one load brings of 8-bit codes."""
    return next(run for run in (4, 2, 1) if pieces_of(size) % run == 0)


def piece_start(size: int, bits: int, part: Any, piece: int) -> Any:
    """First dimension of a piece that lane `part` holds; bits 0: floats, neighbours' pieces beside each other."""
    run = _run(size) if bits else 1
    chunk, i = divmod(piece, run)
    if bits == 0 or run == 1:
        return piece * ALIGN + part * 4
    first = chunk * ALIGN * run
    if bits == 8:
        return first + part * (4 * run) + 4 * i
    share, half = LANES // run, run // 2
    return first + div(part, share) * ALIGN + mod(part, share) * (2 * run) + i // half * 16 + i % half * 4


@dataclass(frozen=True)
class CacheRow:
    """A lane's share of a token's codes in registers: words as they are stored, and pairs, of the head or by chunk."""

    size: int
    bits: int
    group: int
    words: Any
    pairs: Any

    @classmethod
    def empty(cls, size: int, bits: int, group: int) -> CacheRow:
        """Registers for a token; zeros until one is read, so that what is decoded is finite."""
        chunks = pieces_of(size) // _run(size)
        words = local(chunks * _per_load(size, bits), "uint32")
        row = cls(size, bits, group, words, local(2 * (chunks if pair_count(size, group) > 1 else 1)))
        call("iso_zero", at(row.words, 0), int(row.words.shape[0]))
        call("iso_zero_floats", at(row.pairs, 0), int(row.pairs.shape[0]))
        return row

    def fetch(self, codes: Any, params: Any, token: Any, part: Any) -> None:
        """Start the loads of token number `token` of all heads and samples."""
        run, count = _run(self.size), _per_load(self.size, self.bits)
        stride = row_bytes(self.size, self.bits)
        for chunk in range(pieces_of(self.size) // run):
            if self.bits == 4 and run == 1:  # two lanes read a word's low and high nibbles
                place = chunk * 16 + mod(part, 4) * 4
            else:
                place = chunk * (4 * self.bits * run) + part * (4 * count)
            source = at(codes, token * stride + wide(place))
            call(f"iso_load{4 * count}", at(self.words, chunk * count), source)
        groups = pair_count(self.size, self.group)
        for chunk in range(int(self.pairs.shape[0]) // 2):
            place = token * (2 * groups)
            if groups > 1:
                block = chunk * run + div(part, LANES // run)
                place = place + wide(div(block, self.group // ALIGN) * 2)
            for i in range(2):
                put(self.pairs, 2 * chunk + i, get(params, place + i))

    def decode(self, target: Any, part: Any) -> None:
        """The lane's dimensions, `s (u - z)`."""
        run, count = _run(self.size), _per_load(self.size, self.bits)
        for piece in range(pieces_of(self.size)):
            chunk, i = divmod(piece, run)
            shift: Any = 0
            if self.bits == 4:
                shift = div(part, 4) * 4 if run == 1 else 4 * (i // (run // 2))
            word = get(self.words, chunk * count + i % count)
            pair = [get(self.pairs, 2 * chunk % int(self.pairs.shape[0]) + i) for i in range(2)]
            call("iso_cache_decode", at(target, 4 * piece), word, shift, self.bits, *pair)


def _per_load(size: int, bits: int) -> int:
    """Words of one load."""
    run = _run(size)
    return run if bits == 8 else max(1, run // 2)
