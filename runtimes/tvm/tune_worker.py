"""Compiles one function with the default schedule and with another one, compares results, and times both in turns."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from ..tuning.child import serve
from .schedule_cpu import schedule_function
from .schedule_nests import substitute, variables
from .schedule_rules import Shape

TOLERANCE = 1e-5
"""Of the largest result: the order of sums differs."""

SHORT = 2e-3
"""Seconds that one timing should take at least; a faster function is called several times."""


def _compiled(function: tirx.PrimFunc, target: Any, shape: Shape) -> Any:
    scheduled = schedule_function(function, target, shape).with_attr("global_symbol", "main")
    with target:
        return tvm.compile(tvm.IRModule({"main": scheduled}), target=target)["main"]


def _arguments(function: tirx.PrimFunc, sizes: dict[str, int], size: int) -> list[Any]:
    """Tensors (and sizes) for the parameters; indices are small."""
    rng = np.random.default_rng(0)
    made: list[Any] = []
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
        made.append(tvm.runtime.tensor(array))
    return made


def _times(functions: list[Any], arguments: list[list[Any]], rounds: int) -> list[list[float]]:
    started = time.perf_counter()
    functions[0](*arguments[0])
    calls = max(1, int(SHORT / max(time.perf_counter() - started, 1e-7)))
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds):
        for i in sorted(range(len(functions)), key=lambda i: (i + turn) % len(functions)):
            started = time.perf_counter()
            for _ in range(calls):
                functions[i](*arguments[i])
            seconds[i].append((time.perf_counter() - started) / calls)
    return seconds


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    function, target = tvm.ir.load_json(question["function"]), tvm.ir.load_json(question["target"])
    default = Shape.of(target)
    built = [
        _compiled(function, target, default),
        _compiled(function, target, replace(default, **question["change"])),
    ]
    arguments = [_arguments(function, question["sizes"], question["size"]) for _ in built]
    for run, given in zip(built, arguments, strict=True):
        run(*given)
    wrong = None
    for one, two in zip(*arguments, strict=True):
        if isinstance(one, int):
            continue
        expected, got = one.numpy().astype(np.float64), two.numpy().astype(np.float64)
        error = np.abs(got - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-30)
        if not error <= TOLERANCE:
            wrong = f"wrong: differs from the default by {error:.1e} of the largest result"
    runs, given = [built[0], built[0], built[1]], [arguments[0], arguments[0], arguments[1]]
    seconds = _times(runs, given, question["rounds"]) if wrong is None else [[1.0]] * 3
    return {"wrong": [None, None, wrong], "seconds": seconds}


if __name__ == "__main__":
    # TVM counts half of the processors unless it is told; it looks when it first starts threads.
    os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    serve(_answer)
