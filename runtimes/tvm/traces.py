"""MetaSchedule as an inventor of candidates (`runtimes.tuning.search.Inventor`) for a function that TVM generates.

It works in a process of its own (`trace_worker`), which all searches of a run share: what hangs or crashes there costs
a search its inventor and nothing else. Nothing is kept between two questions.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import tvm

from ..tuning.child import Child, LostError
from ..tuning.search import InventionError
from .schedule_traces import number_of

MOST = 64
"""Default for the most traces that are measured for one function."""
PATIENCE = 120.0
"""Seconds after which an answer counts as lost; a few are usual."""
_WORKER = "isofold.runtimes.tvm.trace_worker"


class Workshop:
    """The process that invents, started when it is first needed, and again after it was lost. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: Child | None = None

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer. Raises InventionError."""
        with self._lock:
            self._child = self._child or Child(_WORKER)
            try:
                answer = self._child.ask(question, PATIENCE)
            except LostError as error:
                self._child = None
                raise InventionError(f"MetaSchedule was lost: {error}") from None
        if "error" in answer:
            raise InventionError(f"MetaSchedule cannot schedule it: {answer['error'].splitlines()[-1][:300]}")
        return answer

    def close(self) -> None:
        """End the process, also while it works."""
        if self._child is not None:
            self._child.close()


class MetaSchedule:
    """An `Inventor` of traces for one function at the given sizes. cores: of the machine that will run them."""

    def __init__(
        self,
        workshop: Workshop,
        function: Any,
        target: Any,
        sizes: Mapping[str, int],
        size: int,
        cores: int,
        most: int = MOST,
    ) -> None:
        self.workshop, self.most = workshop, most
        self._question = {
            "function": tvm.ir.save_json(function),
            "target": tvm.ir.save_json(target),
            "sizes": dict(sizes),
            "size": size,
            "cores": cores,
        }

    def __call__(self, measured: Sequence[tuple[str, float | None]], count: int) -> list[str]:
        """See `Inventor`. The seed is how much is known, so that an interrupted search goes on and does not repeat."""
        question = {**self._question, "measured": list(measured), "count": count, "seed": len(measured)}
        found: list[str] = self.workshop.ask(question)["traces"]
        return found

    def number(self, text: str) -> int:
        """See `Inventor`."""
        return number_of(text)
