"""Memory and time of the two ends: loading a packed model, and compiling one.

    python benchmarks/memory.py [--json FILE] [--quick]

Loading: a fresh process opens the artefact of BERT-base and runs it; counted is anonymous memory (RssAnon),
since weights that are read in place belong to the page cache. What ONNX Runtime itself takes once per process
(its environment, its thread pool, the op library) is measured with a one-node model first and not counted.
The activations' need is the largest sum of live values over the run, from the artefact's own shapes.
Compiling: a fresh process compiles BERT-base, verification included; bars are 60 s and 3.5 times the float32
weights at the peak.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from artefacts import compile_to, op_library
from harness import BenchmarkError, Results, main, parse
from subjects import bert_base, bert_onnx

RECIPES = ("w8a8", "w4a8")


def fresh(role: str, *arguments: str) -> dict[str, Any]:
    """Run one role of this file in a process of its own; its last line is its answer."""
    command = [sys.executable, __file__, "--role", role, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        tail = "\n".join(done.stderr.splitlines()[-8:])
        raise BenchmarkError(f"{role} {' '.join(arguments)} ended with exit code {done.returncode}:\n{tail}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    with open("/proc/self/status", encoding="ascii") as stream:
        for line in stream:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise BenchmarkError("/proc/self/status has no RssAnon: this kernel is older than 4.5")


def load(model: str, library: str, inputs: str) -> dict[str, Any]:
    """Role: open a model, run it twice, and say what became of anonymous memory after each step."""
    import onnxruntime

    def session(path: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.log_severity_level = 3
        if library:
            options.register_custom_ops_library(library)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    with tempfile.TemporaryDirectory() as folder:
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            [helper.make_node("Relu", ["x"], ["y"])],
            "warm",
            [value("x", TensorProto.FLOAT, [8])],
            [value("y", TensorProto.FLOAT, [8])],
        )
        warm = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(warm, f"{folder}/warm.onnx")
        first = session(f"{folder}/warm.onnx")
        first.run(None, {"x": np.zeros(8, np.float32)})
    with np.load(inputs) as arrays:
        feeds = {name: arrays[name] for name in arrays.files}
    steps = {"before": anonymous()}
    opened = session(model)
    steps["loaded"] = anonymous()
    feeds = {node.name: feeds[node.name] for node in opened.get_inputs()}
    for step in ("first run", "second run"):
        opened.run(None, feeds)
        steps[step] = anonymous()
    return steps


def compile_role(recipe: str, folder: str) -> dict[str, Any]:
    """Role: compile BERT-base and say how long it took and the largest resident size of the process."""
    import isofold  # noqa: F401  # imports are not part of the compile time, but of the peak

    module, feeds = bert_base()
    weights = sum(p.numel() * 4 for p in module.parameters())
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    compile_to(Path(folder), module, recipe, kwargs=feeds)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": seconds, "weights": weights, "before": base, "peak": max(peak, children)}


def weight_bytes(model: Path) -> int:
    """Bytes of all initializers, external or not."""
    graph = onnx.load(str(model), load_external_data=False).graph
    total = 0
    for tensor in graph.initializer:
        width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        total += int(np.prod(tensor.dims, dtype=np.int64)) * width
    return total


def activation_need(model: Path, library: str, folder: Path) -> int:
    """Largest sum of live values over the nodes of the graph that ONNX Runtime really runs.

    A value lives from the node that makes it to the last node that reads it. The optimized graph keeps the
    order of execution; shapes come from its value_info (static model). A value without a shape is an error,
    because the sum would be too small.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", "optimized.bin"
    )
    if library:
        options.register_custom_ops_library(library)
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    sizes: dict[str, int] = {}
    for value in [
        *onnx.load(str(model), load_external_data=False).graph.value_info,
        *graph.value_info,
        *graph.output,
    ]:
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            width = helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
            sizes[value.name] = int(np.prod([d.dim_value for d in tensor.shape.dim], dtype=np.int64)) * width
    last = {name: index for index, node in enumerate(graph.node) for name in node.input}
    last.update({value.name: len(graph.node) for value in graph.output})
    made = [name for node in graph.node for name in node.output if name]
    unknown = [name for name in made if name not in sizes]
    if unknown:
        raise BenchmarkError(
            f"{len(unknown)} values of {model} have no static shape, for example {unknown[:3]}"
        )
    live = peak = 0
    alive: list[str] = []
    for index, node in enumerate(graph.node):
        alive += [name for name in node.output if name]
        live = sum(sizes[name] for name in alive)
        peak = max(peak, live)
        alive = [name for name in alive if last.get(name, -1) > index]
    return peak


def body() -> int:
    """Both ends for every recipe."""
    if "--role" in sys.argv:
        role, *rest = sys.argv[sys.argv.index("--role") + 1 :]
        print(json.dumps({"load": load, "compile": compile_role}[role](*rest)))
        return 0
    arguments = parse(__doc__)
    results = Results("memory")
    library = op_library()
    float32, inputs = bert_onnx()
    mega = 1 << 20
    with tempfile.TemporaryDirectory(prefix="isofold-memory-") as temporary:
        folder = Path(temporary)
        steps = fresh("load", str(float32), "", str(inputs))
        total = weight_bytes(float32)
        results.add("ONNX Runtime float32: weights", total / mega, "MiB")
        grown = (steps["loaded"] - steps["before"]) / total
        results.add("ONNX Runtime float32: anonymous memory by loading / weights", grown, "x")
        for recipe in RECIPES[:1] if arguments.quick else RECIPES:
            target = folder / recipe
            made = fresh("compile", recipe, str(target))
            results.add(f"{recipe}: compile BERT-base", made["seconds"], "s", "< 60")
            results.add(f"{recipe}: resident before compiling", made["before"] / mega, "MiB")
            ratio = made["peak"] / made["weights"]
            results.add(f"{recipe}: peak resident / float32 weights", ratio, "x", "< 3.5")
            model = target / "model.onnx"
            total = weight_bytes(model)
            need = activation_need(model, library, folder)
            steps = fresh("load", str(model), library, str(inputs))
            loaded = steps["loaded"] - steps["before"]
            ran = steps["second run"] - steps["loaded"]
            results.add(f"{recipe}: weights", total / mega, "MiB")
            results.add(f"{recipe}: activations' need", need / mega, "MiB")
            results.add(f"{recipe}: anonymous memory by loading", loaded / mega, "MiB")
            results.add(f"{recipe}: anonymous memory by running", ran / mega, "MiB")
            results.add(f"{recipe}: anonymous memory by loading / weights", loaded / total, "x", "<= 0.05")
            results.add(
                f"{recipe}: anonymous memory in all / activations' need",
                (loaded + ran) / need,
                "x",
                "<= 1.05",
            )
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
