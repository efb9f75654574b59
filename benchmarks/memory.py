"""Memory and time of the two ends: loading a packed model, and compiling one.

    python benchmarks/memory.py [--json FILE] [--quick]

Loading: a fresh process opens the artefact of BERT-base and runs it; counted is anonymous memory (RssAnon),
since weights that are read in place belong to the page cache. What ONNX Runtime itself takes once per
process (its environment, its thread pool, the op library) is measured with a one-node model first and not
counted. The bar: within 5 % of what the same graph needs when its weights are taken away
(``without_weights``), that is of activations, nodes, arena and what ONNX Runtime notes about every
initializer, however small (name, type, mapping: 2 to 3 KiB each; the row ``ONNX Runtime's notes`` is the
measured sum). Compiling: a fresh process compiles BERT-
base, verification included; bars are 60 s and 3.5 times the float32 weights at the peak.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from artefacts import compile_to, op_library
from harness import BenchmarkError, Results, main, parse
from subjects import bert_base, bert_onnx

RECIPES = ("w8a8", "w4a8")
TABLE_ROWS = 1000
# More than the 127 bytes up to which ONNX Runtime treats an initializer differently, whatever the type.
STAND_IN = 128
LOADS = 7


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


def fresh_loads(*arguments: str) -> dict[str, float]:
    """Median of every step over fresh processes: page-sized differences come from the allocator's luck."""
    answers = [fresh("load", *arguments) for _ in range(LOADS)]
    return {step: statistics.median(answer[step] for answer in answers) for step in answers[0]}


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
    # Ids stay inside the tables that without_weights cuts, for both files alike.
    feeds = {node.name: feeds[node.name] % TABLE_ROWS for node in opened.get_inputs()}
    outputs = [node.name for node in opened.get_outputs() if not node.name.startswith("stand_in_")]
    for step in ("first run", "second run"):
        opened.run(outputs, feeds)
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


def without_weights(model: Path, same_count: bool = True) -> Path:
    """Beside ``model``, the same graph with next to no weights: what loading must cost without copies of
    them.

    Weights of one shape and type become one shared initializer (the twelve layers read the same bytes) and
    tables of more than 10,000 rows keep their first 1,000. With ``same_count`` every initializer that went is
    stood in for by one of ``STAND_IN`` elements with its name, type and number of dimensions, so that both
    files have as many. Nodes, shapes of activations and kernels stay the same, so the difference in anonymous
    memory between the two files is memory that grows with the bytes of the weights.
    """
    proto = onnx.load(str(model), load_external_data=False)
    graph = proto.graph
    representative: dict[tuple[Any, ...], str] = {}
    shared: dict[str, str] = {}
    kept, gone = [], []
    for tensor in graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            kept.append(tensor)
            continue
        key = (tensor.data_type, *tensor.dims)
        shared[tensor.name] = representative.setdefault(key, tensor.name)
        if shared[tensor.name] != tensor.name:
            gone.append(tensor)
            continue
        if tensor.dims and tensor.dims[0] > 10_000:
            resize(tensor, [TABLE_ROWS, *tensor.dims[1:]])
        kept.append(tensor)
    if not shared:
        raise BenchmarkError(
            f"{model} has no external weights: they would be copied by parsing the file alone"
        )
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = shared.get(name, name)
    copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    stand_ins = [TensorProto.FromString(tensor.SerializeToString()) for tensor in gone] if same_count else []
    del graph.initializer[:]
    graph.initializer.extend(copies)
    for stand_in in stand_ins:
        resize(stand_in, [*[1] * (len(stand_in.dims) - 1), STAND_IN])
    keep_alive(graph, stand_ins)
    twin = model.with_name(f"without-weights-{same_count}.onnx")
    onnx.save(proto, str(twin))
    return twin


def resize(tensor: onnx.TensorProto, dims: list[int]) -> None:
    """Give an external initializer other dimensions; it reads the first of its bytes."""
    width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    del tensor.dims[:]
    tensor.dims.extend(dims)
    length = int(np.prod(dims, dtype=np.int64)) * width
    next(e for e in tensor.external_data if e.key == "length").value = str(length)


def keep_alive(graph: onnx.GraphProto, tensors: list[onnx.TensorProto]) -> None:
    """Add initializers and, for each type and rank, one node that reads them next to a value of the run, so
    that they are neither dropped nor folded."""
    groups: dict[tuple[int, int], list[str]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.data_type, len(tensor.dims)), []).append(tensor.name)
    graph.initializer.extend(tensors)
    source = graph.input[0].name
    for (kind, rank), names in groups.items():
        cast, shape, flat, read = (
            f"stand_in_{part}_{kind}_{rank}" for part in ("cast", "shape", "flat", "read")
        )
        graph.initializer.append(
            helper.make_tensor(shape, TensorProto.INT64, [rank], [*[1] * (rank - 1), -1])
        )
        graph.node.extend(
            [
                helper.make_node("Cast", [source], [cast], to=kind),
                helper.make_node("Reshape", [cast, shape], [flat]),
                helper.make_node("Concat", [flat, *names], [read], axis=-1),
            ]
        )
        graph.output.append(onnx.ValueInfoProto(name=read))


def activation_need(model: Path, library: str, inputs: Path, folder: Path) -> int:
    """Largest sum of live values over the nodes of the graph that ONNX Runtime really runs.

    A value lives from the node that makes it to the last node that reads it; the optimized graph keeps the
    order of execution. Sizes are those of one run in which every value is an output.
    """
    import onnxruntime

    def options() -> Any:
        chosen = onnxruntime.SessionOptions()
        chosen.log_severity_level = 3
        if library:
            chosen.register_custom_ops_library(library)
        return chosen

    optimized = folder / "optimized.onnx"
    first = options()
    first.optimized_model_filepath = str(optimized)
    # Everything that is a weight goes outside, so that the graph can be read and written without it.
    first.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.bin")
    onnxruntime.InferenceSession(str(model), first, providers=["CPUExecutionProvider"])
    proto = onnx.load(str(optimized), load_external_data=False)
    graph = proto.graph
    last = {name: index for index, node in enumerate(graph.node) for name in node.input}
    last.update({value.name: len(graph.node) for value in graph.output})
    made = [name for node in graph.node for name in node.output if name]
    kept = {value.name for value in graph.output}
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in kept)
    all_outputs = folder / "all-outputs.onnx"
    onnx.save(proto, str(all_outputs))
    second = options()
    second.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(all_outputs), second, providers=["CPUExecutionProvider"])
    with np.load(inputs) as arrays:
        feeds = {node.name: arrays[node.name] for node in session.get_inputs()}
    sizes = {name: array.nbytes for name, array in zip(made, session.run(made, feeds), strict=True)}
    peak = 0
    alive: list[str] = []
    for index, node in enumerate(graph.node):
        alive += [name for name in node.output if name]
        peak = max(peak, sum(sizes[name] for name in alive))
        alive = [name for name in alive if last.get(name, -1) > index]
    return peak


def body() -> int:
    """Both ends for every recipe."""
    if "--role" in sys.argv:
        role, *rest = sys.argv[sys.argv.index("--role") + 1 :]
        roles: dict[str, Callable[..., Any]] = {"load": load, "compile": compile_role}
        print(json.dumps(roles[role](*rest)))
        return 0
    arguments = parse(__doc__)
    results = Results("memory")
    library = op_library()
    float32, inputs = bert_onnx()
    mega = 1 << 20
    with tempfile.TemporaryDirectory(prefix="isofold-memory-") as temporary:
        folder = Path(temporary)
        steps = fresh_loads(str(float32), "", str(inputs))
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
            need = activation_need(model, library, inputs, folder)
            steps = fresh_loads(str(model), library, str(inputs))
            bare = fresh_loads(str(without_weights(model)), library, str(inputs))
            fewer = fresh_loads(str(without_weights(model, same_count=False)), library, str(inputs))
            loaded = steps["loaded"] - steps["before"]
            ran = steps["second run"] - steps["before"]
            required = bare["second run"] - bare["before"]
            results.add(f"{recipe}: weights", total / mega, "MiB")
            results.add(f"{recipe}: largest sum of live activations", need / mega, "MiB")
            results.add(f"{recipe}: anonymous memory by loading", loaded / mega, "MiB")
            results.add(f"{recipe}: the same / weights", loaded / total, "x", "<= 0.05")
            results.add(f"{recipe}: anonymous memory by loading and running", ran / mega, "MiB")
            results.add(f"{recipe}: the same for the graph without weights", required / mega, "MiB")
            notes = required - (fewer["second run"] - fewer["before"])
            results.add(f"{recipe}: of it ONNX Runtime's notes about initializers", notes / mega, "MiB")
            results.add(f"{recipe}: with weights / without", ran / required, "x", "<= 1.05")
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
