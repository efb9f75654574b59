"""Runs candidates of the GPU's kernels, on this machine's GPU or on that of a server that a tracker lends.

    python -m isofold.runtimes.tvm.cuda.tune_worker [TRACKER_HOST TRACKER_PORT KEY]

A candidate is a library (host functions and a cubin) with the kernels of one stage or more, and the tensors between
them. All get the same inputs; what differs from the default's results is wrong and not timed. Inputs are there several
times, together more than the second-level cache holds, and a timing goes once through all of them: here as one CUDA
graph between two events, over RPC call by call (there, launching a short kernel is a part of its time).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...tuning.child import serve
from ...tuning.worker import ServerDevice, in_turns

COLD = 4
"""All copies of the inputs together are this many times the second-level cache."""
COPIES = 48
"""Most copies."""
SPARE = 0.5
"""The part of the free memory that copies may take."""
NO_MEMORY = ("out of memory", "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY")

Spec = Mapping[str, Any]
"""Tensors `{name: [shape, dtype]}`, stages `[[function, [tensors]]]`, results `[name]`, library: path."""
Values = dict[str, Any]


class Device(Protocol):
    """A GPU as the comparison needs it."""

    def facts(self) -> dict[str, Any]:
        """{processor, host, isa, cores, cache, free}; nothing where there is no GPU."""

    def load(self, path: Path) -> Any:
        """The module of a library."""

    def place(self, array: NDArray[Any]) -> Any:
        """A copy of an array."""

    def fetch(self, tensor: Any) -> NDArray[Any]:
        """A tensor's content."""

    def timer(self, module: Any, runs: Sequence[Sequence[tuple[str, list[Any]]]]) -> Callable[[], float]:
        """What gives the seconds of one run of many: each is calls of a module's functions."""


class LocalGpu:
    """This machine's GPU."""

    def __init__(self) -> None:
        from .gpu import Gpu

        self.gpu = Gpu()

    def facts(self) -> dict[str, Any]:
        from platform import node

        name, arch = self.gpu.describe()
        free, cache = self.gpu.free_bytes(), self.gpu.cache_bytes()
        return {"processor": name, "host": node(), "isa": arch, "cores": 0, "cache": cache, "free": free}

    def load(self, path: Path) -> Any:
        return self.gpu.load(path)

    def place(self, array: NDArray[Any]) -> Any:
        return self.gpu.place(array)

    def fetch(self, tensor: Any) -> NDArray[Any]:
        return self.gpu.fetch(tensor)

    def timer(self, module: Any, runs: Sequence[Sequence[tuple[str, list[Any]]]]) -> Callable[[], float]:
        def launch() -> None:
            for calls in runs:
                for function, given in calls:
                    module[function](*given)

        graph = self.gpu.graph(launch)
        return lambda: self.gpu.seconds(graph, 1)[0] / len(runs)


class LentGpu:
    """The GPU of a server."""

    def __init__(self, server: ServerDevice) -> None:
        self.server, self.device = server, server.session.cuda(0)

    def facts(self) -> dict[str, Any]:
        device = self.device
        if not device.exist:
            return {}
        major, minor = str(device.compute_version).split(".")
        arch = f"sm_{major}{minor}" + ("a" if major == "9" else "")
        cache = int(device.l2_cache_size_bytes or 0) or 64 << 20
        facts = {"processor": str(device.device_name), "host": "", "isa": arch, "cores": 0, "cache": cache}
        return {**facts, "free": int(device.available_global_memory or 0) or 1 << 30}

    def load(self, path: Path) -> Any:
        return self.server.module(path)

    def place(self, array: NDArray[Any]) -> Any:
        import tvm.runtime

        return tvm.runtime.tensor(array, device=self.device)

    def fetch(self, tensor: Any) -> NDArray[Any]:
        found: NDArray[Any] = tensor.numpy()
        return found

    def timer(self, module: Any, runs: Sequence[Sequence[tuple[str, list[Any]]]]) -> Callable[[], float]:
        evaluators = {f: module.time_evaluator(f, self.device, number=1) for f, _ in runs[0]}
        return lambda: (
            sum(float(evaluators[f](*given).mean) for calls in runs for f, given in calls) / len(runs)
        )


def arrays_of(spec: Spec) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Inputs of a candidate's stages, and what they write, filled with what shows."""
    written = {name for function, names in spec["stages"] for name in names[spec["reads"][function] :]}
    inputs: dict[str, NDArray[Any]] = {}
    outputs: dict[str, NDArray[Any]] = {}
    for name, (shape, dtype) in spec["tensors"].items():
        if name in written:
            outputs[name] = np.full(shape, np.nan if dtype.startswith("float") else 99, dtype)
        else:
            inputs[name] = invented(name, shape, dtype)
    return inputs, outputs


def invented(name: str, shape: Sequence[int], dtype: str) -> NDArray[Any]:
    """Content that every kernel can take: codes that are no NaN, masks that hide little, small scales."""
    rng = np.random.default_rng(list(name.encode()))
    if dtype == "bool":
        return rng.random(shape) < 0.9
    if dtype == "uint8":
        return rng.integers(0, 112, shape, np.uint8)
    if dtype == "int8":
        return rng.integers(-100, 100, shape, np.int8)
    if dtype == "uint16" and name == "xh":  # halves
        return rng.standard_normal(shape, np.float32).astype(np.float16).view(np.uint16)
    if dtype.startswith("uint"):
        return rng.integers(0, 1 << 15, shape).astype(dtype)
    scale = 0.01 if name in ("scale", "multiplier", "params") else 1.0
    return (scale * rng.standard_normal(shape, np.float32)).astype(dtype)


def difference(expected: NDArray[Any], got: NDArray[Any]) -> float:
    """The largest difference, of the largest value. Codes may be the next: what is rounded differs by its last bit."""
    one, other = expected.astype(np.float64), got.astype(np.float64)
    error = float(np.abs(one - other).max(initial=0))
    if expected.dtype.kind in "ui":
        error = max(error - 1, 0.0)
    error /= max(float(np.abs(one).max(initial=0)), 1e-30)
    return error if np.isfinite(error) else float("inf")


def compare(device: Device, specs: Sequence[Spec], rounds: int, tolerance: float) -> dict[str, Any]:
    """{wrong, seconds}: of two copies of the first candidate, which is the default, then of the others.

    {skip: why} where the GPU has too little memory. Raises RuntimeError: something else went wrong on the GPU.
    """
    try:
        return _compare(device, specs, rounds, tolerance)
    except Exception as error:
        if not any(text in str(error) for text in NO_MEMORY):
            raise
        size = sum(array.nbytes for part in arrays_of(specs[0]) for array in part.values())
        free = device.facts()["free"] >> 20
        return {"skip": f"too little memory on the GPU: {size >> 20} MiB are needed, {free} MiB are free"}


def _compare(device: Device, specs: Sequence[Spec], rounds: int, tolerance: float) -> dict[str, Any]:
    inputs = arrays_of(specs[0])[0]
    placed = [{name: device.place(a) for name, a in inputs.items()} for _ in range(copies_of(inputs, device))]
    prepared, wrong, expected = [], list[str | None](), list[NDArray[Any]]()
    for spec in specs:
        module = device.load(Path(spec["library"]))
        own = {name: device.place(array) for name, array in arrays_of(spec)[1].items()}
        runs = [
            [(function, [{**copy, **own}[name] for name in names]) for function, names in spec["stages"]]
            for copy in placed
        ]
        for function, given in runs[0]:
            module[function](*given)
        got = [device.fetch(own[name]) for name in spec["results"]]
        expected = expected or got
        worst = max(map(difference, expected, got))
        text = f"wrong: differs from the default by {worst:.1e} of the largest result"
        wrong.append(None if worst <= tolerance else text)
        prepared.append((module, runs))
    timers = [
        _unmeasured if text else device.timer(*made) for made, text in zip(prepared, wrong, strict=True)
    ]
    wrong = [None, *wrong]
    return {"wrong": wrong, "seconds": in_turns([timers[0], *timers], wrong, rounds)}


def copies_of(inputs: Mapping[str, NDArray[Any]], device: Device) -> int:
    """How often the inputs are needed so that each comes from memory, as far as there is room."""
    facts, size = device.facts(), max(1, sum(array.nbytes for array in inputs.values()))
    return max(1, min(COPIES, int(SPARE * facts["free"]) // size, -(-COLD * facts["cache"] // size)))


def _unmeasured() -> float:
    raise AssertionError("a wrong candidate is not timed")


def answer(connect: Callable[[], Device], question: dict[str, Any]) -> dict[str, Any]:
    """One question of the parent: `gpu` (facts) or `compare`."""
    device = connect()
    if question["do"] == "gpu":
        return device.facts()
    return compare(device, question["specs"], question["rounds"], question["tolerance"])


def main(arguments: list[str]) -> None:
    """Serve the parent; a lost server or GPU is told as `{"lost": why}`."""
    kept: list[Device] = []

    def connect() -> Device:
        if not kept:
            lent = LentGpu(ServerDevice(arguments[0], int(arguments[1]), arguments[2])) if arguments else None
            kept.append(lent or LocalGpu())
        return kept[0]

    def reply(question: dict[str, Any]) -> dict[str, Any]:
        try:
            return answer(connect, question)
        except Exception as error:
            # After an error of a kernel the GPU is of no use to its process.
            lines = str(error).strip().splitlines()
            return {"lost": f"{type(error).__name__}: {lines[-1] if lines else ''}"}

    serve(reply)


if __name__ == "__main__":
    main(sys.argv[1:])
