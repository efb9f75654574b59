"""One competitor in a process of its own: loads a model once, then runs and times it when told.

The harness starts this file with the interpreter of the environment that holds the engine, writes one JSON
specification line and then commands to standard input, and reads one JSON line per answer. Needs numpy and
the engine, nothing of isofold (but for the engine tvm, which is isofold.load).

Specification: ``engine`` (onnxruntime | openvino | tvm | read | vnni), ``threads``, and for models ``model``,
``inputs`` (an .npz), for read ``file`` and ``streams``, optionally ``library`` (custom operators), ``optimize``
(onnxruntime's graph optimization level), ``precision`` (OpenVINO's inference precision), ``clock`` (cpu: processor
time instead of wall time). Commands: ``time`` (n runs, seconds of each), ``outputs`` (write an .npz), ``memory``
(bytes of this process), ``profile`` (n runs, microseconds and count by operator type), ``quit``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


class OnnxRuntime:
    """A session whose inputs and outputs are bound once, so that a run is the graph and nothing else."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import onnxruntime

        # The timings would include the writing of warnings that every constructed model triggers once.
        onnxruntime.set_default_logger_severity(3)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = spec["threads"]
        options.inter_op_num_threads = 1
        if spec.get("optimize") is not None:
            options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, spec["optimize"])
        if spec.get("library"):
            options.register_custom_ops_library(spec["library"])
        if spec.get("profile"):
            options.enable_profiling = True
            options.profile_file_prefix = spec["profile"]
        self.session = onnxruntime.InferenceSession(
            spec["model"], options, providers=["CPUExecutionProvider"]
        )
        self.names = [output.name for output in self.session.get_outputs()]
        self.feeds: dict[str, Any] = {}
        wanted = {node.name for node in self.session.get_inputs()}
        if spec.get("inputs"):
            with np.load(spec["inputs"]) as arrays:
                self.feeds = {name: arrays[name] for name in arrays.files if name in wanted}
        missing = wanted - set(self.feeds)
        if missing:
            raise ValueError(f"{spec['model']} wants inputs {sorted(missing)}, not in {spec.get('inputs')}")
        self.binding = self.session.io_binding()
        for name, value in self.feeds.items():
            self.binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        # The first run allocates the outputs, the timed ones write into the same memory again.
        for name in self.names:
            self.binding.bind_output(name, "cpu")
        self.runs = 0
        self.run()
        for name, value in zip(self.names, self.binding.get_outputs(), strict=True):
            self.binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        self.runs += 1
        self.session.run_with_iobinding(self.binding)

    def outputs(self) -> list[Any]:
        return [np.asarray(value) for value in self.session.run(self.names, self.feeds)]

    def profile(self, runs: int) -> dict[str, list[float]]:
        for _ in range(runs):
            self.run()
        path = self.session.end_profiling()
        with open(path, encoding="utf-8") as stream:
            events = json.load(stream)
        os.unlink(path)
        total: dict[str, list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                entry = total.setdefault(event["args"]["op_name"], [0.0, 0])
                entry[0] += event["dur"]
                entry[1] += 1
        # The profile holds every run since the session was opened.
        return {name: [value / self.runs, count / self.runs] for name, (value, count) in total.items()}


class OpenVino:
    """A compiled model and one infer request, latency hint, inputs bound once."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(spec["model"])
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": spec["threads"]}
        if spec.get("precision"):
            config["INFERENCE_PRECISION_HINT"] = spec["precision"]
        with np.load(spec["inputs"]) as arrays:
            feeds = {name: arrays[name] for name in arrays.files}
        names = {port.any_name for port in model.inputs}
        model.reshape({name: openvino.PartialShape(list(feeds[name].shape)) for name in names})
        self.request = core.compile_model(model, "CPU", config).create_infer_request()
        for name in names:
            self.request.set_tensor(name, openvino.Tensor(feeds[name]))

    def run(self) -> None:
        self.request.infer()

    def outputs(self) -> list[Any]:
        self.request.infer()
        return [
            np.array(self.request.get_output_tensor(i).data) for i in range(len(self.request.model_outputs))
        ]


class Tvm:
    """One of our TVM artefacts (``model`` is its folder) as it is deployed, inputs bound once."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from isofold.runtimes.tvm.session import open_artefact

        self.model = open_artefact(spec["model"], threads=spec["threads"])
        with np.load(spec["inputs"]) as arrays:
            self.feeds = {port.name: arrays[port.name] for port in self.model.inputs}
        self.run = self.model.executor.bound(list(self.feeds.values()))

    def outputs(self) -> list[Any]:
        return list(self.model.run(self.feeds).values())

    def profile(self, runs: int) -> dict[str, list[float]]:
        total: dict[str, list[float]] = {}
        for entry in self.model.profile(*self.feeds.values(), runs=runs):
            place = total.setdefault(entry["op"], [0.0, 0])
            place[0] += entry["microseconds"]
            place[1] += 1
        return total


class Probe:
    """The machine itself: reads a file that should exceed the L3 several times, or issues vpdpbusd; see probe.c."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import ctypes
        import mmap

        library = ctypes.CDLL(spec["probe"])
        library.probe_read.restype = ctypes.c_double
        library.probe_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3]
        library.probe_vnni.restype = ctypes.c_double
        library.probe_vnni.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]
        threads, cpu = spec["threads"], int(spec.get("clock") == "cpu")
        self.measure: Callable[[], float]
        if spec["engine"] == "vnni":
            self.measure = lambda: library.probe_vnni(spec["rounds"], threads, cpu)
            return
        # Mapped as ONNX Runtime maps weights: the page cache gives both the very same memory, whose speed depends on
        # where it lies.
        with open(spec["file"], "rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        array = np.frombuffer(self.memory, np.uint8)
        address, size, streams = array.ctypes.data, len(array), spec["streams"]
        self.measure = lambda: library.probe_read(address, size, threads, streams, cpu)


def memory() -> dict[str, int]:
    """Bytes of this process by kind, from /proc/self/smaps_rollup and status."""
    found: dict[str, int] = {}
    for file in ("/proc/self/smaps_rollup", "/proc/self/status"):
        with open(file, encoding="ascii") as stream:
            for line in stream:
                parts = line.split()
                if len(parts) == 3 and parts[2] == "kB":
                    found[parts[0].rstrip(":")] = int(parts[1]) * 1024
    return found


def timed(engine: Any, clock: Callable[[], float]) -> float:
    """Seconds of one run; a probe takes its own."""
    if isinstance(engine, Probe):
        return engine.measure()
    start = clock()
    engine.run()
    return clock() - start


def serve(answers: Any) -> None:
    """Read the specification and then commands until ``quit`` or the end of the input."""
    spec = json.loads(sys.stdin.readline())
    engine: Any = {
        "onnxruntime": OnnxRuntime,
        "openvino": OpenVino,
        "tvm": Tvm,
        "read": Probe,
        "vnni": Probe,
    }[spec["engine"]](spec)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    clock = time.process_time if spec.get("clock") == "cpu" else time.perf_counter
    answer({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "quit":
            return
        if command["do"] == "time":
            resumed = time.perf_counter()
            timed(engine, clock)
            while time.perf_counter() < resumed + command["warm"]:
                timed(engine, clock)
            seconds = [timed(engine, clock) for _ in range(command["n"])]
            answer({"seconds": seconds})
        elif command["do"] == "outputs":
            np.savez(command["file"], *engine.outputs())
            answer({"written": command["file"]})
        elif command["do"] == "memory":
            answer({"memory": memory()})
        elif command["do"] == "profile":
            answer({"operators": engine.profile(command["n"])})
        else:
            raise ValueError(f"unknown command {command['do']!r}")


if __name__ == "__main__":
    # Libraries print to descriptor 1; the protocol keeps its own copy and sends theirs to standard error.
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        serve(own)
    except Exception as error:  # whatever stops an engine is its answer to the harness
        own.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        own.flush()
        sys.exit(1)
