"""Threads of torch's: operators on few elements lose more at the barriers between them than they gain.

On a machine with other work a barrier waits for a thread that the system has put aside, for milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(when: bool = True) -> Iterator[None]:
    """Inside, torch computes with one thread, if `when`."""
    threads = torch.get_num_threads()
    if when:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if when:
            torch.set_num_threads(threads)
