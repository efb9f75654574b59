"""Files of weights that the page cache holds in large pages, so that kernels stream them faster.

A file system with large folios (ext4, xfs, btrfs of a current Linux) keeps what one `write` brings to a multiple of
2 MiB as one physically contiguous page of 2 MiB, and a mapping of it is one entry of the page table. Smaller or
straddling writes leave pages of 4 KiB, scattered over memory, where prefetchers stop at every end. One core of Zen 5
streamed int4 weights at 36 GB/s from those, at 47 from large ones (docs/artefacts.md). Elsewhere nothing changes.
"""

from __future__ import annotations

import io
import mmap
from contextlib import suppress
from typing import Any

LARGE_PAGE = 2 << 20
"""Bytes: a page of the page directory on x86-64 and aarch64."""


class WholePagesWriter(io.BufferedWriter):
    """A binary file that is written in multiples of LARGE_PAGE, each at a multiple of it, and a rest at the end."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw, LARGE_PAGE)

    def write(self, data: Any, /) -> int:
        """Write all of it; pieces never straddle a large page, so that the buffer fills up exactly at its end."""
        view = memoryview(data).cast("B")
        start, position = 0, self.tell()
        while start < len(view):
            end = start + LARGE_PAGE - (position + start) % LARGE_PAGE
            super().write(view[start:end])
            start = min(end, len(view))
        return len(view)


def ask_for_large_pages(mapped: mmap.mmap) -> None:
    """What of this mapping is not in memory yet is read in large pages, where the system has them."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        with suppress(OSError):  # a kernel built without them
            mapped.madvise(advice)
