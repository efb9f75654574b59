"""Unstructured sparse linears against our own dense ones of the same type, cold weights, inside ONNX Runtime.

    python benchmarks/sparse.py [--json FILE] [--quick] [--threads N] [--rows M]

K = N = 4096, one row of activations and 128. Dense float32 is ONNX Runtime's MatMul (isofold leaves float
linears to it), dense int8 is PackedLinear; the activation quantizer of int8 is included on both sides. Every
competitor is a session of many layers whose weights together exceed the L3 cache. Bars: one row at 50, 75 and
90 % zeros at least 1.3, 2 and 4 times the dense speed, 128 rows at 80 % at least 2 times for float32 and 1.5
times for int8.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from harness import (
    HERE,
    BenchmarkError,
    Results,
    Worker,
    interleave,
    last_level_cache,
    main,
    parse,
    per_round,
    ratios,
)
from linear_models import SEED, ExternalData
from subjects import subject_folder

N = K = 4096
BARS = {
    ("float32", 1, 50): 1.3, ("float32", 1, 75): 2.0, ("float32", 1, 90): 4.0,
    ("int8", 1, 50): 1.3, ("int8", 1, 75): 2.0, ("int8", 1, 90): 4.0,
    ("float32", 128, 80): 2.0, ("int8", 128, 80): 1.5,
}  # fmt: skip
TOLERANCE = {"float32": 1e-4, "int8": 0.03}
"""Relative error to the float64 product: 8-bit activations cost about 1 %."""


@dataclass(frozen=True)
class Kind:
    """A type of weights and how many percent of them are zero; None: stored dense (the zeros do not matter)."""

    dtype: str
    zeros: int | None

    @property
    def name(self) -> str:
        return f"{self.dtype} {'dense' if self.zeros is None else f'{self.zeros} % zeros'}"

    @property
    def ours(self) -> bool:
        return self.dtype == "int8" or self.zeros is not None

    @property
    def bytes(self) -> float:
        """Bytes of a layer's weights, about."""
        width = 4 if self.dtype == "float32" else 1
        return N * K * (width if self.zeros is None else 1 / 8 + width * (1 - self.zeros / 100))


@lru_cache(maxsize=2)
def _drawn(kind: Kind) -> NDArray[Any]:
    generator = np.random.default_rng([SEED, kind.zeros or 0])
    matrix = generator.standard_normal((N, K), np.float32)
    matrix[generator.random((N, K), np.float32) < (kind.zeros or 0) / 100] = 0
    if kind.dtype == "float32":
        return matrix
    codes = np.rint(matrix * 42).clip(-127, 127).astype(np.int8)
    codes[(codes == 0) & (matrix != 0)] = 1  # as many zeros as asked for
    return codes


def weights_of(kind: Kind, layer: int) -> NDArray[Any]:
    """float32 weights or int8 codes `[N, K]`; layers are rotations of one drawn matrix."""
    return np.roll(_drawn(kind), layer, 0)


def scale_of(kind: Kind) -> float:
    """What codes are multiplied by."""
    return 1 / np.sqrt(K) / (42 if kind.dtype == "int8" else 1)


def _nodes(kind: Kind, data: ExternalData, layer: int) -> Iterator[onnx.NodeProto]:
    import torch

    from isofold.compiler.dialect.packing import pack_linear
    from isofold.compiler.dialect.sparse_packing import pack_sparse

    weights, target = weights_of(kind, layer), f"y{layer}"
    if not kind.ours:
        scaled = np.ascontiguousarray((weights * np.float32(scale_of(kind))).T)
        yield helper.make_node("MatMul", ["x", data.add(f"weight{layer}", scaled)], [target])
        return
    common: dict[str, Any] = {"n": N, "k": K, "activation": "none", "gated": 0, "domain": "ai.isofold"}
    if kind.dtype == "float32":
        packed = pack_sparse(torch.from_numpy(weights * np.float32(scale_of(kind))))
        stored = [data.add(f"{p}{layer}", getattr(packed, p).numpy()) for p in ("mask", "values", "offsets")]
        yield helper.make_node("SparseLinearFloat", ["x", *stored], [target], **common)
        return
    quantizer = helper.make_node(
        "QuantizeActivation",
        ["x"],
        [f"u{layer}", f"params{layer}"],
        domain="ai.isofold",
        bits=8,
        align=32,
    )
    # make_node cannot tell the type of an empty list.
    quantizer.attribute.append(helper.make_attribute("hadamard", [], attr_type=onnx.AttributeProto.INTS))
    yield quantizer
    codes, scales = torch.from_numpy(weights), torch.full((N, 1), scale_of(kind))
    dense = pack_linear(codes, scales, None, 8, 0)
    scale, wsum = (data.add(f"{name}{layer}", getattr(dense, name).numpy()) for name in ("scale", "wsum"))
    sources = [f"u{layer}", f"params{layer}"]
    if kind.zeros is None:
        weight = data.add(f"weight{layer}", dense.weight.numpy())
        common |= {"bits": 8, "group_size": 0, "scale_multiplier": 1.0}
        yield helper.make_node("PackedLinear", [*sources, weight, scale, "", wsum], [target], **common)
        return
    packed = pack_sparse(codes)
    stored = [data.add(f"{p}{layer}", getattr(packed, p).numpy()) for p in ("mask", "values", "offsets")]
    yield helper.make_node("SparseLinear", [*sources, *stored, scale, wsum], [target], **common)


def write(kind: Kind, m: int, layers: int, folder: Path) -> Path:
    """Write the model of `layers` linears; an existing file of the same name is taken as it is."""
    stem = f"{kind.name.replace(' ', '-').replace('%', 'percent')}-m{m}-x{layers}"
    path = folder / f"{stem}.onnx"
    if path.exists():
        return path
    data = ExternalData(folder / f"{stem}.bin")
    nodes = [node for layer in range(layers) for node in _nodes(kind, data, layer)]
    graph = helper.make_graph(
        nodes,
        stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, K])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [m, N]) for i in range(layers)],
        data.initializers,
    )
    data.stream.close()
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.isofold", 1)]
    beside = path.with_suffix(".tmp")
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(beside))
    beside.replace(path)
    return path


def _check(worker: Worker, kind: Kind, x: NDArray[np.float32], folder: Path) -> None:
    """A fast wrong kernel is no result: layer 1 against float64."""
    file = folder / f"outputs-{kind.dtype}-{kind.zeros}.npz"
    worker.ask({"do": "outputs", "file": str(file)})
    worker.stop()
    with np.load(file) as arrays:
        found = arrays["arr_1"]
    file.unlink()
    wanted = x.astype(np.float64) @ weights_of(kind, 1).astype(np.float64).T * scale_of(kind)
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    if not error < TOLERANCE[kind.dtype]:
        raise BenchmarkError(f"{kind.name}, M={len(x)}: relative error {error:.2e} to float64")


def measure(results: Results, dtype: str, m: int, threads: int, quick: bool) -> None:
    """One interleaved run of a type's kinds, and its rows."""
    from isofold.runtimes.onnx.oplib.build import library_path

    zeros = (50, 75, 90) if m == 1 else (80,) if quick else (50, 80, 90)
    kinds = [Kind(dtype, None), *(Kind(dtype, z) for z in zeros)]
    folder = subject_folder("sparse", hashlib.sha256((HERE / "sparse.py").read_bytes()).hexdigest())
    x = np.random.default_rng(1).standard_normal((m, K)).astype(np.float32)
    inputs = folder / f"x-m{m}.npz"
    np.savez(inputs, x=x)
    # At M = 128 a layer computes for long enough that fewer of them do.
    cold = (1.25 if quick else 2.5) * last_level_cache() if m == 1 else last_level_cache()
    layers = {kind.name: max(2, int(np.ceil(cold / kind.bytes))) for kind in kinds}
    workers: list[Worker] = []
    try:
        for kind in kinds:
            spec = {
                "engine": "onnxruntime",
                "model": str(write(kind, m, layers[kind.name], folder)),
                "inputs": str(inputs),
                "threads": threads,
                "optimize": "ORT_DISABLE_ALL",
                "library": str(library_path()) if kind.ours else None,
            }
            workers.append(Worker(kind.name, spec))
            _check(workers[-1], kind, x, folder)
        rounds = (5 if quick else 24) if m == 1 else (2 if quick else 8)
        seconds = interleave(workers, rounds, 4 if m == 1 else 1)
    finally:
        for worker in workers:
            worker.close()
    where = f"M={m}, {threads} thread{'s' if threads > 1 else ''}"
    per_layer = {
        name: [[run / layers[name] for run in turn] for turn in turns] for name, turns in seconds.items()
    }
    for kind in kinds:
        times = [1e6 * t for t in per_round(per_layer[kind.name])]
        results.sampled(f"{kind.name}, {where}", times, "us")
    for kind in kinds[1:]:
        bar = BARS.get((dtype, m, kind.zeros or 0))
        gain = ratios(per_layer[kinds[0].name], per_layer[kind.name])
        text = None if bar is None else f">= {bar:g}"
        results.sampled(f"{kind.name}, {where}: against dense", gain, "x", text)


def body() -> int:
    """Build, run, print."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--threads", type=int, choices=(1, 2), action="append", help="only so many")
        parser.add_argument("--rows", type=int, choices=(1, 128), action="append", help="only so many")

    arguments = parse(__doc__, extra)
    results = Results("sparse")
    for threads in (1,) if arguments.cpu_time else arguments.threads or (1, 2):
        for m in arguments.rows or (1, 128):
            for dtype in ("float32", "int8"):
                measure(results, dtype, m, threads, arguments.quick)
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
