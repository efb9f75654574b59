"""Runs candidates and takes their times, on this machine or through TVM's RPC: a process of its own that may be lost.

    python -m isofold.runtimes.tuning.worker [TRACKER_HOST TRACKER_PORT KEY]

Every candidate is first compared with the first library (the defaults) on the workload and on a small ragged relative.
Those that agree are timed in turns: in every round each library has one turn, and the order moves on by one. A cold
turn takes the next layers of an arena larger than the cache, the same arena for all libraries.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...compiler.processor import cache_folder
from ...compiler.whole_pages import WholePagesWriter
from .child import serve
from .workloads import Workload

Function = Callable[..., int]

TURN, CACHED_TURN = 3e-3, 1e-3
"""Seconds that one turn should take: long against a clock, short against the slices of a busy machine."""
TOLERANCE = 1e-5
"""Largest difference between outputs, of the largest output, where the order of sums may change."""


class Device(Protocol):
    """A place where candidates run, with memory of its own."""

    def load(self, path: Path) -> Callable[[str], Function]:
        """Load a library; the result gives its functions by name."""

    def put(self, array: NDArray[Any]) -> Any:
        """A copy of an array in the device's memory."""

    def empty(self, size: int) -> Any:
        """`size` uninitialised bytes in the device's memory."""

    def get(self, tensor: Any, dtype: str) -> NDArray[Any]:
        """The content of a device tensor as a NumPy array of this process."""


class LocalDevice:
    """This process."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def load(self, path: Path) -> Callable[[str], Function]:
        import tvm_ffi

        module = tvm_ffi.load_module(str(path))
        self._kept.append(module)
        return lambda name: module.get_function(f"isofold_{name}")

    def put(self, array: NDArray[Any]) -> Any:
        import tvm_ffi

        return tvm_ffi.from_dlpack(array)

    def empty(self, size: int) -> Any:
        # Where ONNX Runtime has weights: in a mapped file, written as an export writes it. Where memory lies decides
        # which distances are best: values tuned in other pages gained 11 % there and lost 15 % in a model.
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with WholePagesWriter(tempfile.TemporaryFile(dir=folder, buffering=0)) as file:
            file.write(bytes(size))
            file.flush()
            return self.put(np.memmap(file, np.uint8, "r+", shape=(size,)))

    def get(self, tensor: Any, dtype: str) -> NDArray[Any]:
        return np.from_dlpack(tensor).view(dtype)


class ServerDevice:
    """A server that a tracker lends."""

    def __init__(self, host: str, port: int, key: str) -> None:
        from tvm import rpc

        self.session = rpc.connect_tracker(host, port).request(key, session_timeout=0)
        self._device = self.session.cpu(0)
        self._count = 0

    def module(self, path: Path) -> Any:
        """A library as TVM's module."""
        self._count += 1
        name = f"isofold-{self._count}-{path.name}"
        self.session.upload(bytearray(path.read_bytes()), name)
        module = self.session.load_module(name)
        self.session.remove(name)  # mapped, so no longer needed
        return module

    def load(self, path: Path) -> Callable[[str], Function]:
        module = self.module(path)
        return lambda function: module[f"isofold_{function}"]

    def put(self, array: NDArray[Any]) -> Any:
        import tvm.runtime

        return tvm.runtime.tensor(array, device=self._device)

    def empty(self, size: int) -> Any:
        import tvm.runtime

        return tvm.runtime.empty((size,), "uint8", self._device)

    def get(self, tensor: Any, dtype: str) -> NDArray[Any]:
        found: NDArray[Any] = tensor.numpy()
        return found.view(dtype)


class Memory:
    """The arena of one workload, filled."""

    def __init__(
        self, device: Device, fill: Callable[[str], Function], workload: Workload, isa: str, cache: int
    ):
        self.device, self.workload = device, workload
        self.layers = workload.layers(cache)
        self.spec = device.put(np.array(workload.spec(isa, self.layers), np.int64))
        self.arena = device.empty(int(fill("bytes")(self.spec)))
        fill("fill")(self.spec, self.arena)
        self.y = device.empty(workload.outputs * 4)

    def run(self, library: Callable[[str], Function], first: int, count: int) -> float:
        """Seconds of a layer. Raises RuntimeError where threads cannot be started."""
        picoseconds = int(library("run")(self.spec, self.arena, self.y, first, count))
        if picoseconds < 0:
            raise RuntimeError(f"{self.workload.threads} threads could not be started")
        return 1e-12 * picoseconds

    def outputs(self, library: Callable[[str], Function]) -> NDArray[np.float32]:
        """What the first layer gives; the buffer is cleared before."""
        self.y = self.device.put(np.full(self.workload.outputs * 4, 0xFF, np.uint8))
        self.run(library, 0, 1)
        return self.device.get(self.y, "float32").copy()


class Worker:
    """Answers `machine` and `compare`."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.memory: Memory | None = None
        self.isa = ""

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """One question of the parent."""
        libraries = [self.device.load(Path(path)) for path in question["libraries"]]
        if question["do"] == "machine":
            return self.machine(libraries[0])
        return self.compare(
            libraries,
            Workload.from_json(question["workload"]),
            question["isa"],
            question["cache"],
            question["rounds"],
            question["exact"],
        )

    def machine(self, library: Callable[[str], Function]) -> dict[str, Any]:
        """What the machine is."""
        text = self.device.put(np.zeros(1024, np.uint8))
        length = library("machine")(text)
        lines = bytes(self.device.get(text, "uint8"))[:length].decode(errors="replace").splitlines()
        return {name: value for name, _, value in (line.partition(" ") for line in lines)}

    def compare(
        self,
        libraries: list[Callable[[str], Function]],
        workload: Workload,
        isa: str,
        cache: int,
        rounds: int,
        exact: bool,
    ) -> dict[str, Any]:
        """{wrong: a text or None by library, seconds: by library and round}."""
        small = Memory(self.device, libraries[0], workload.ragged(), isa, cache)
        if self.memory is None or (self.memory.workload, self.isa) != (workload, isa):
            self.memory = None  # gives the old arena back first
            self.memory, self.isa = Memory(self.device, libraries[0], workload, isa, cache), isa
        memory = self.memory
        wrong: list[str | None] = [None] * len(libraries)
        for case in (small, memory):
            wanted = case.outputs(libraries[0])
            if not np.isfinite(wanted).all():
                raise RuntimeError(f"the defaults' outputs are not finite on {case.workload.name}")
            for i, library in enumerate(libraries[1:], 1):
                wrong[i] = wrong[i] or difference(wanted, case.outputs(library), exact, case.workload.name)
        good = [i for i, text in enumerate(wrong) if text is None]
        once = memory.run(libraries[0], 0, 1)
        turn = TURN if workload.cold else CACHED_TURN
        count = max(1, min(memory.layers if workload.cold else 1 << 16, round(turn / max(once, 1e-7))))
        seconds: list[list[float]] = [[] for _ in libraries]
        first = 0
        for number in range(rounds):
            for i in good[number % len(good) :] + good[: number % len(good)]:
                seconds[i].append(memory.run(libraries[i], first, count))
                first += count
        return {"wrong": wrong, "seconds": seconds}


def difference(
    wanted: NDArray[np.float32], found: NDArray[np.float32], exact: bool, where: str
) -> str | None:
    """What is wrong with outputs, or None. exact: every bit must agree, else within TOLERANCE of the largest."""
    if exact:
        differing = int((wanted.view(np.uint32) != found.view(np.uint32)).sum())
        return (
            f"{differing} of {wanted.size} outputs differ from the defaults' on {where}"
            if differing
            else None
        )
    error = float(np.max(np.abs(wanted - found)) / max(float(np.max(np.abs(wanted))), 1e-30))
    return None if error <= TOLERANCE else f"outputs differ by {error:.1e} of the largest on {where}"


def in_turns(
    timers: Sequence[Callable[[], float]], wrong: Sequence[str | None], rounds: int
) -> list[list[float]]:
    """Times of those that are not wrong; the order moves on by one in every round."""
    good = [i for i, text in enumerate(wrong) if text is None]
    seconds: list[list[float]] = [[] for _ in timers]
    for turn in range(rounds):
        for i in good[turn % len(good) :] + good[: turn % len(good)]:
            seconds[i].append(timers[i]())
    return seconds


def main(arguments: list[str], make: Callable[[LocalDevice | ServerDevice], Worker] = Worker) -> None:
    """Serve the parent; a lost server is told as `{"lost": why}`."""
    worker: Worker | None = None

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        nonlocal worker
        if not arguments:
            worker = worker or make(LocalDevice())
            return worker.answer(question)
        try:
            worker = worker or make(ServerDevice(arguments[0], int(arguments[1]), arguments[2]))
            return worker.answer(question)
        except Exception as error:
            # Through RPC nothing tells a crash there from a broken line.
            return {"lost": f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"}

    serve(answer)


if __name__ == "__main__":
    main(sys.argv[1:])
