"""Files written in large pages: the bytes are those that were written, whatever the pieces, and so are the writes."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import pytest

from isofold.compiler.artefact import replacing
from isofold.compiler.whole_pages import LARGE_PAGE, WholePagesWriter

SIZES = (1, 63, 4096, 65537, LARGE_PAGE - 1, LARGE_PAGE, 5 * LARGE_PAGE + 17)


class Recorded(io.FileIO):
    """A file that remembers where each write began and what it brought."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.writes: list[tuple[int, int]] = []

    def write(self, data: bytes) -> int:  # type: ignore[override]  # FileIO takes any buffer
        at = self.tell()
        written = super().write(data)
        self.writes.append((at, written))
        return written


@pytest.mark.parametrize("seed", range(4))
def test_every_write_is_whole_pages_and_the_bytes_are_the_same(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    sizes = [choose.choice(SIZES) for _ in range(24)]
    chunks = [os.urandom(size) for size in sizes]
    file = Recorded(tmp_path / "weights")
    with WholePagesWriter(file) as writer:
        for chunk in chunks:
            assert writer.write(memoryview(chunk)) == len(chunk)
    assert (tmp_path / "weights").read_bytes() == b"".join(chunks)
    *whole, last = file.writes
    assert all(at % LARGE_PAGE == 0 and size % LARGE_PAGE == 0 for at, size in whole), file.writes
    assert last[0] % LARGE_PAGE == 0


def test_a_file_can_be_rewritten_in_the_middle_and_read_positions_are_right(tmp_path: Path) -> None:
    with WholePagesWriter(io.FileIO(tmp_path / "archive", "wb")) as writer:
        writer.write(bytes(3 * LARGE_PAGE))
        writer.seek(100)
        writer.write(b"header")
        assert writer.tell() == 106
        writer.seek(0, io.SEEK_END)
        writer.write(b"end")
    found = (tmp_path / "archive").read_bytes()
    assert len(found) == 3 * LARGE_PAGE + 3
    assert (found[100:106], found[-3:]) == (b"header", b"end")


def test_multi_byte_elements_count_in_bytes(tmp_path: Path) -> None:
    import numpy as np

    with replacing(tmp_path / "floats") as file:
        assert file.write(memoryview(np.arange(6, dtype=np.float32).reshape(2, 3))) == 24
    assert np.fromfile(tmp_path / "floats", np.float32).tolist() == [0, 1, 2, 3, 4, 5]
