"""TVM's tracker and servers on loopback, to tune on and to kill."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from isofold.runtimes.tuning.database import Database, Record
from isofold.runtimes.tuning.machines import Tracker

from ..processes import PATIENCE, wait_until

_PORTS = 20000 + os.getpid() % 10000, 32768
"""Where a free port is looked for: below those that the system gives to others meanwhile."""
_TRACKER = f"""
from tvm.rpc.tracker import Tracker
tracker = Tracker("127.0.0.1", *{_PORTS}, silent=True)
print(tracker.port, flush=True)
tracker.proc.join()
"""


@contextmanager
def process(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Python with a group of its own, which is killed at the end."""
    started = subprocess.Popen(
        [sys.executable, *words],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield started
    finally:
        kill(started)


def kill(started: subprocess.Popen[bytes]) -> None:
    """End a process and its children."""
    if started.poll() is None:
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


@pytest.fixture(scope="module")
def tracker() -> Iterator[int]:
    """The port of a tracker without servers."""
    pytest.importorskip("tornado", reason="TVM's tracker needs tornado: pip install 'isofold[rpc]'")
    with process("-c", _TRACKER) as started:
        assert started.stdout is not None
        assert select.select([started.stdout], [], [], PATIENCE)[0], "the tracker says nothing"
        yield int(started.stdout.readline())


@contextmanager
def server(tracker: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server that lends this machine under the key `epyc`, registered."""
    known = Tracker("127.0.0.1", tracker, "epyc")
    count = known.servers()
    words = ["--host", "127.0.0.1", "--tracker", f"127.0.0.1:{tracker}", "--key", "epyc", "--no-fork"]
    first, end = map(str, _PORTS)
    try:
        with process("-m", "tvm.exec.rpc_server", *words, "--port", first, "--port-end", end) as started:
            wait_until(lambda: known.servers() > count, started)
            yield started
    finally:
        wait_until(lambda: known.servers() <= count)  # the tracker has forgotten it


@contextmanager
def killed_at_the_first_result(tracker: int) -> Iterator[None]:
    """A server that stands still from the first result on, and is killed when another one has registered.

    It has all the work, and stands still before it can be given more, so that it certainly is killed in the middle.
    """
    stopped, whole, failed = threading.Event(), Database.add, list[BaseException]()
    with ExitStack() as stack:
        first = stack.enter_context(server(tracker))

        def add(self: Database, records: list[Record]) -> int:
            new = whole(self, records)
            if new and not stopped.is_set():
                os.killpg(first.pid, signal.SIGSTOP)
                stopped.set()
            return new

        def replace() -> None:
            stopped.wait()
            try:
                stack.enter_context(server(tracker))
            except BaseException as error:
                failed.append(error)
            finally:
                kill(first)

        killer = threading.Thread(target=replace)
        killer.start()
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Database, "add", add)
                yield
        finally:
            stopped.set()
            killer.join()
        assert not failed, failed
