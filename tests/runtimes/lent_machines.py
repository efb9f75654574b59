"""TVM's tracker and servers on loopback, to tune on and to kill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from isofold.runtimes.tuning.machines import Tracker


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def process(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a group of its own, which is killed at the end."""
    started = subprocess.Popen(
        [sys.executable, "-m", *words],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
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
    port = free_port()
    words = ["--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1)]
    with process("tvm.exec.rpc_tracker", *words):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port


@contextmanager
def server(tracker: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server that lends this machine under the key `epyc`."""
    port = free_port()
    words = ["--host", "127.0.0.1", "--tracker", f"127.0.0.1:{tracker}", "--key", "epyc", "--no-fork"]
    with process("tvm.exec.rpc_server", *words, "--port", str(port), "--port-end", str(port + 20)) as started:
        yield started


def wait_for_servers(tracker: int, count: int) -> None:
    """Until so many servers have registered."""
    deadline = time.monotonic() + 60
    while Tracker("127.0.0.1", tracker, "epyc").servers() < count and time.monotonic() < deadline:
        time.sleep(0.2)


@contextmanager
def killed_at_the_first_result(tracker: int, database: Path) -> Iterator[None]:
    """A server that stands still as soon as the database has a result, and is killed when another one has registered.

    It has all the work until then, so that it certainly is killed in the middle of some.
    """
    with ExitStack() as stack:
        first = stack.enter_context(server(tracker))
        wait_for_servers(tracker, 1)

        def replace() -> None:
            deadline = time.monotonic() + 100
            while not (database.exists() and database.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.killpg(first.pid, signal.SIGSTOP)
            stack.enter_context(server(tracker))
            wait_for_servers(tracker, 2)
            kill(first)

        killer = threading.Thread(target=replace)
        killer.start()
        yield
        killer.join()
