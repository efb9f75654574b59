"""Processes that tests start, wait for and interrupt, on machines however busy."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 600.0
"""Seconds after which something counts as hanging; nothing here takes a tenth of it on an idle machine."""


def wait_until(there: Callable[[], bool], *running: subprocess.Popen) -> None:
    """Wait; fails where one of the processes has ended before, or nothing happens for minutes."""
    deadline = time.monotonic() + PATIENCE
    while not there():
        codes = [process.poll() for process in running]
        assert codes == [None] * len(codes) or there(), f"a process has ended before: {codes}"
        assert time.monotonic() < deadline, f"nothing for {PATIENCE:.0f} s"
        time.sleep(0.01)


@contextmanager
def interruptible() -> Iterator[None]:
    """What is started inside ends at Ctrl-C, also where this run ignores it (nohup, a shell's background job)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a handler is not inherited
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """The process, which is no more at the end, whatever happens."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def silent_port() -> Iterator[int]:
    """A port of this machine that nobody listens on, and nobody can take meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])
