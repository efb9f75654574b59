"""Runs candidates of generated kernels, on this machine or on a server that a tracker lends.

    python -m isofold.runtimes.tvm.tune_worker [TRACKER_HOST TRACKER_PORT KEY]

A function is compiled here, with the default schedule and with each candidate's; then all run on the same tensors.
What differs from the default's results is wrong and not timed; the others are timed in turns. A trace of a function
with unknown sizes is also compared at smaller ones.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from ..tuning.search import TRACE
from ..tuning.worker import LocalDevice, ServerDevice, Worker, in_turns, main
from .schedule_cpu import schedule_function
from .schedule_loops import Shape
from .schedule_nests import substitute, variables
from .schedule_traces import Traced, sizes_of

TOLERANCE = 1e-5
"""Largest difference from the default, relative to the largest result: the order of sums may differ."""
SHORT = 2e-3
"""Seconds that one timing should take at least; a faster function is called several times."""
HOPELESS = 4.0
"""A candidate whose first run takes this many times the default's is not timed: traces may take a hundred times."""
NAME = "isofold_main"

Arrays = list[np.ndarray[Any, Any] | int]


def compiled(function: tirx.PrimFunc, target: Any, found: Shape | Traced) -> Any:
    """The function with a schedule of this shape, or by this trace, as an executable."""
    scheduled = schedule_function(function, target, found).with_attr("global_symbol", NAME)
    with target:
        return tvm.compile(tvm.IRModule({NAME: scheduled}), target=target)


def arguments_of(function: tirx.PrimFunc, sizes: dict[str, int], size: int) -> Arrays:
    """Random arrays (and sizes) for the function's parameters; integers are small, so that they are valid indices."""
    rng = np.random.default_rng(0)
    made: Arrays = []
    for parameter in function.params:
        shape = getattr(parameter, "shape", None)
        if shape is None:
            made.append(sizes.get(str(parameter.name), size))
            continue
        extents = []
        for extent in shape:
            values = {v: tirx.IntImm("int64", sizes.get(str(v.name), size)) for v in variables(extent)}
            extents.append(int(tvm.sym.Analyzer().simplify(substitute(extent, values))))
        dtype = str(parameter.dtype)
        if dtype.startswith("float"):
            array = rng.standard_normal(extents).astype(dtype)
        else:
            array = rng.integers(0, 2, extents).astype(dtype)
        made.append(array)
    return made


def differences(
    runs: Sequence[Callable[..., Any]], arrays: Arrays, tensors: Sequence[Any], tolerance: float
) -> list[str | None]:
    """What is wrong with the results of each but the first; all tensors have their first content before a run."""
    found: list[str | None] = []
    expected: list[Any] = []
    for run in runs:
        for array, tensor in zip(arrays, tensors, strict=True):
            if not isinstance(array, int):
                tensor.copyfrom(array)
        run(*tensors)
        got = [None if isinstance(t, int) else t.numpy().astype(np.float64) for t in tensors]
        expected = expected or got
        worst = max(_difference(one, other) for one, other in zip(expected, got, strict=True))
        text = f"wrong: differs from the default by {worst:.1e} of the largest result"
        found.append(None if worst <= tolerance else text)
    return found


def _difference(expected: Any, got: Any) -> float:
    if expected is None:
        return 0.0
    scale = max(float(np.abs(expected).max(initial=0)), 1e-30)
    error = float(np.abs(got - expected).max(initial=0)) / scale
    return error if np.isfinite(error) else float("inf")


class FunctionWorker(Worker):
    """A `Worker` for functions that TVM generated: answers the questions `machine` and `function`."""

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        if question["do"] == "machine":
            facts = super().answer(question)
            if isinstance(self.device, ServerDevice):
                # TVM counts half of the processors unless it is told.
                self.device.session.get_function("runtime.config_threadpool")(1, int(facts["cores"]))
            return facts
        return self.function(question)

    def function(self, question: dict[str, Any]) -> dict[str, Any]:
        """{wrong, failed, seconds}: of two copies of the default, then of the candidates."""
        function, target = tvm.ir.load_json(question["function"]), tvm.ir.load_json(question["target"])
        default = Shape.of(target)
        built = [compiled(function, target, default)]
        failed: dict[int, str] = {}
        for i, change in enumerate(question["changes"]):
            try:
                found = Traced(change[TRACE]) if TRACE in change else replace(default, **change)
                built.append(compiled(function, target, found))
            except Exception as error:
                failed[i] = f"{type(error).__name__}: {str(error).strip()[:1000]}"
        modules = [self._module(executable) for executable in built]
        sizes, size = question["sizes"], question["size"]
        wrong: list[str | None] = [None] * len(modules)
        smaller = question.get("smaller", {})
        if smaller.keys() == sizes_of(function).keys() and any(TRACE in c for c in question["changes"]):
            fewer = arguments_of(function, smaller, size)
            if all(isinstance(a, int) or a.size for a in fewer):
                wrong = self._wrong(modules, fewer)[0]
        arrays = arguments_of(function, sizes, size)
        also, tensors = self._wrong(modules, arrays)
        wrong = [one or other for one, other in zip(wrong, also, strict=True)]
        device = self._cpu()
        first = [float(m.time_evaluator(NAME, device, number=1)(*tensors).mean) for m in modules]
        calls = max(1, int(SHORT / max(first[0], 1e-7)))
        evaluators = [m.time_evaluator(NAME, device, number=calls) for m in modules]
        timers = [
            (lambda e=e: float(e(*tensors).mean)) if once < HOPELESS * first[0] else (lambda once=once: once)
            for e, once in zip(evaluators, first, strict=True)
        ]
        seconds = in_turns([timers[0], *timers], [None, *wrong], question["rounds"])
        return {"wrong": [None, *wrong], "seconds": seconds, "failed": failed}

    def _wrong(self, modules: Sequence[Any], arrays: Arrays) -> tuple[list[str | None], list[Any]]:
        """What is wrong with each module's results, and the tensors they were asked with."""
        tensors = [a if isinstance(a, int) else self.device.put(a) for a in arrays]
        return differences([m[NAME] for m in modules], arrays, tensors, TOLERANCE), tensors

    def _module(self, executable: Any) -> Any:
        if not isinstance(self.device, ServerDevice):
            return executable.jit()
        with tempfile.TemporaryDirectory(prefix="isofold-") as folder:
            path = Path(folder, "candidate.so")
            executable.export_library(str(path))
            return self.device.module(path)

    def _cpu(self) -> Any:
        return self.device.session.cpu(0) if isinstance(self.device, ServerDevice) else tvm.cpu()


class LocalTensors(LocalDevice):
    """This process, with tensors that TVM can be given new content for."""

    def put(self, array: np.ndarray[Any, Any]) -> Any:
        return tvm.runtime.tensor(array)


def make(device: LocalDevice | ServerDevice) -> FunctionWorker:
    """The worker on a device."""
    return FunctionWorker(device if isinstance(device, ServerDevice) else LocalTensors())


if __name__ == "__main__":
    # TVM counts half of the processors unless it is told; it looks when it first starts threads.
    os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    main(sys.argv[1:], make)
