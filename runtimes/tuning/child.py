"""A helper process that answers one JSON line with one JSON line, so that what it runs may crash or hang."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Child", "LostError", "serve"]


class LostError(RuntimeError):
    """The process (or the machine behind it) is gone, or did not answer in time."""


class Child:
    """`python -m MODULE ARGUMENTS` in a process of its own."""

    def __init__(self, module: str, arguments: Sequence[str] = ()) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 # lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends its children itself
        )
        self._rest = b""

    def ask(self, question: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer. Raises LostError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._lost("its process has ended") from None
        line = self._line(time.monotonic() + timeout)
        answer: dict[str, Any] = json.loads(line)
        if "lost" in answer:
            raise self._lost(answer["lost"])
        return answer

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise self._lost("no answer in time")
            block = os.read(descriptor, 1 << 20)
            if not block:
                raise self._lost(f"its process ended with code {self._process.wait()}")
            self._rest += block
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _lost(self, why: str) -> LostError:
        self.close()
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        return LostError(": ".join([why, *last]))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side: answer until the input ends. Exceptions become `{"error": text}`."""
    # What libraries print must not mix with the answers.
    with os.fdopen(os.dup(1), "wb", buffering=0) as out:
        os.dup2(2, 1)
        for line in sys.stdin.buffer:
            try:
                reply = answer(json.loads(line))
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            out.write(json.dumps(reply).encode() + b"\n")
