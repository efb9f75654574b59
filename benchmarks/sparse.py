"""Sparse linears against our own dense ones of the same type, cold weights, inside ONNX Runtime.

    python benchmarks/sparse.py [--json FILE] [--quick] [--threads N] [--rows M] [--family float32|int8|int4]
                                [--only TEXT]

K = N = 4096, one row of activations and 128. Dense float32 is ONNX Runtime's MatMul (isofold leaves float
linears to it), dense int8 and int4 (groups of 32) are PackedLinear; the activation quantizer is included on both
sides. Every competitor is a session of many layers whose weights together exceed the L3 cache. Rows are named after
the pattern of the zeros and how they are stored; unstructured zeros are stored as `extract_sparsity` would. Bars: one
row at 50, 75 and 90 % unstructured zeros at least 1.3, 2 and 4 times the dense speed (int4, 50 %: 1.2 times), 128 rows
at 80 % at least 2 times for float32 and 1.5 times for int8. 2:4 has no bar: it is there to show what it is worth.
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
    cold_bytes,
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
    ("int8", 1, 50): 1.3, ("int8", 1, 75): 2.0, ("int8", 1, 90): 4.0, ("int4", 1, 50): 1.2,
    ("float32", 128, 80): 2.0, ("int8", 128, 80): 1.5,
}  # fmt: skip
"""Of unstructured zeros: type, rows of activations and percent."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-4, "int8": 0.03, "int4": 0.03}
"""Relative error to the float64 product: 8-bit activations cost about 1 %."""

GROUP = 32
"""Inputs that share a scale of int4."""


@dataclass(frozen=True)
class Kind:
    """A type of weights, how many percent of them are zero in which pattern, and the layout that stores them.

    zeros None: stored dense (the zeros do not matter). pattern: unstructured, N:M, or rows x inputs of blocks.
    beside: of a mixture, percent of the weights that are anywhere beside the blocks, and stored as `rest`.
    """

    dtype: str
    zeros: int | None = None
    pattern: str = "unstructured"
    layout: str = "bitmask"
    beside: int = 0
    rest: str = ""

    @property
    def name(self) -> str:
        if self.zeros is None:
            return f"{self.dtype} dense"
        if self.beside:
            pattern = f"{self.pattern} and {self.beside} % beside"
            return f"{self.dtype} {self.zeros} % zeros, {pattern}, as {self.layout} + {self.rest}"
        return f"{self.dtype} {self.zeros} % zeros, {self.pattern}, as {self.layout}"

    @property
    def ours(self) -> bool:
        return self.dtype != "float32" or self.zeros is not None

    @property
    def quantized(self) -> bool:
        return self.dtype.startswith("int")

    @property
    def bits(self) -> int:
        return {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}[self.dtype]

    @property
    def bytes(self) -> float:
        """Bytes of a layer's weights, about."""
        return N * K * self.bits / 8 * (1 if self.zeros is None else 0.05 + 1 - self.zeros / 100)


FAMILIES: dict[tuple[str, int], tuple[Kind, ...]] = {
    ("float32", 1): (
        Kind("float32"),
        *(Kind("float32", z) for z in (50, 75, 90)),
        *(Kind("bfloat16", z) for z in (50, 75)),
        Kind("float32", 80, "16x1", "16x1"),
    ),
    ("int8", 1): (
        Kind("int8"),
        Kind("int8", 50),
        Kind("int8", 75),
        Kind("int8", 90, layout="windows"),
        Kind("int8", 90),
        Kind("int8", 50, "2:4", "2:4"),
        Kind("int8", 50, "4:8", "4:8"),
        Kind("int8", 75, "1:4", "1:4"),
        Kind("int8", 80, "1x4", "1x4"),
        Kind("int8", 80, "16x4", "16x4"),
        Kind("int8", 80, "16x4", "16x4", 2, "windows"),
    ),
    ("int4", 1): (
        Kind("int4"),
        Kind("int4", 50, layout="panels"),
        Kind("int4", 75, layout="panels"),
        Kind("int4", 50),
        Kind("int4", 75),
    ),
    ("float32", 128): (
        Kind("float32"),
        Kind("float32", 80),
        Kind("float32", 90),
        Kind("bfloat16", 80),
        Kind("float32", 80, "16x1", "16x1"),
        Kind("float32", 80, "16x1", "16x1", 2, "bitmask"),
    ),
    ("int8", 128): (
        Kind("int8"),
        Kind("int8", 80),
        Kind("int8", 90),
        Kind("int8", 90, layout="windows"),
        Kind("int8", 50, "2:4", "2:4"),
        Kind("int8", 80, "1x4", "1x4"),
        Kind("int8", 80, "16x4", "16x4"),
        Kind("int8", 80, "16x4", "16x4", 2, "windows"),
    ),
    ("int4", 128): (Kind("int4"), Kind("int4", 50, layout="panels"), Kind("int4", 50)),
}
"""By type and rows of activations; the first is the dense one. ``--quick`` leaves nothing out but rounds."""


def _keep(kind: Kind, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Where weights are not zero."""
    share = 1 - (kind.zeros or 0) / 100
    if ":" in kind.pattern:
        some, of = map(int, kind.pattern.split(":"))
        order = generator.random((N, K // of, of), np.float32).argsort(-1).argsort(-1)
        return (order < some).reshape(N, K)
    height, width = map(int, kind.pattern.split("x")) if "x" in kind.pattern else (1, 1)
    single = kind.beside / 100
    blocks = generator.random((N // height, K // width), np.float32) < (share - single) / (1 - single)
    return blocks.repeat(height, 0).repeat(width, 1) | (generator.random((N, K), np.float32) < single)


@lru_cache(maxsize=2)
def _drawn(kind: Kind) -> NDArray[Any]:
    generator = np.random.default_rng([SEED, kind.zeros or 0])
    matrix = generator.standard_normal((N, K), np.float32)
    matrix[~_keep(kind, generator)] = 0
    if kind.dtype == "bfloat16":
        return (matrix.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    if not kind.quantized:
        return matrix
    largest = 2 ** (kind.bits - 1) - 1
    codes = np.rint(matrix * (largest / 3)).clip(-largest, largest).astype(np.int8)
    codes[(codes == 0) & (matrix != 0)] = 1  # as many zeros as asked for
    return codes


def weights_of(kind: Kind, layer: int) -> NDArray[Any]:
    """float32 weights or codes `[N, K]`; layers are rotations of one drawn matrix, by whole blocks of rows."""
    return np.roll(_drawn(kind), 16 * layer, 0)


def scale_of(kind: Kind) -> float:
    """What weights are multiplied by: a power of two, so that it changes no bfloat16 and is a float16."""
    return 2.0 ** (-6 - (kind.bits if kind.quantized else 0))


DISTINCT = 4
"""Layers that are packed; those behind them repeat them in other memory."""


class _Arrays(list[tuple[str, NDArray[Any]]]):
    """Names and arrays of one layer, collected like an `ExternalData`."""

    def add(self, name: str, array: NDArray[Any]) -> str:
        self.append((name, array))
        return name


@lru_cache(maxsize=DISTINCT)
def _layer(kind: Kind, turn: int) -> tuple[list[onnx.NodeProto], _Arrays]:
    """Nodes and arrays of a layer; `@` stands for its number in names."""
    arrays = _Arrays()
    return list(_nodes(kind, arrays, turn)), arrays


def _numbered(kind: Kind, data: ExternalData, layer: int) -> Iterator[onnx.NodeProto]:
    nodes, arrays = _layer(kind, layer % DISTINCT)
    for name, array in arrays:
        data.add(name.replace("@", str(layer)), array)
    for node in nodes:
        made = onnx.NodeProto()
        made.CopyFrom(node)
        for names in (made.input, made.output):
            names[:] = [name.replace("@", str(layer)) for name in names]
        yield made


def _nodes(kind: Kind, data: _Arrays, layer: int) -> Iterator[onnx.NodeProto]:
    import torch

    from isofold.compiler.dialect.packing import pack_linear
    from isofold.compiler.dialect.sparse_packing import pack_sparse

    weights, target = weights_of(kind, layer), "y@"
    if not kind.ours:
        scaled = np.ascontiguousarray((weights * np.float32(scale_of(kind))).T)
        yield helper.make_node("MatMul", ["x", data.add("weight@", scaled)], [target])
        return
    common: dict[str, Any] = {"n": N, "k": K, "activation": "none", "gated": 0, "domain": "ai.isofold"}
    if not kind.quantized:
        matrix = torch.from_numpy(weights * np.float32(scale_of(kind))).to(getattr(torch, kind.dtype))
        for name, part, residual, result in _parts(kind, matrix, target):
            packed = pack_sparse(part, name)
            stored = [data.add(f"{p}_{result}", getattr(packed, p).numpy()) for p in STORED]
            sources = ["x", *stored, *residual]
            yield helper.make_node("SparseLinearFloat", sources, [result], layout=name, **common)
        return
    quantizer = helper.make_node(
        "QuantizeActivation",
        ["x"],
        ["u@", "params@"],
        domain="ai.isofold",
        bits=8,
        align=32,
    )
    # make_node cannot tell the type of an empty list.
    quantizer.attribute.append(helper.make_attribute("hadamard", [], attr_type=onnx.AttributeProto.INTS))
    yield quantizer
    group = GROUP if kind.bits == 4 else 0
    codes, scales = torch.from_numpy(weights), torch.full((N, K // group if group else 1), scale_of(kind))
    dense = pack_linear(codes, scales, None, kind.bits, group)
    scale, wsum = (data.add(f"{name}@", getattr(dense, name).numpy()) for name in ("scale", "wsum"))
    sources = ["u@", "params@"]
    common |= {"bits": kind.bits, "group_size": group, "scale_multiplier": dense.scale_multiplier}
    if kind.zeros is None:
        weight = data.add("weight@", dense.weight.numpy())
        yield helper.make_node("PackedLinear", [*sources, weight, scale, "", wsum], [target], **common)
        return
    for name, part, residual, result in _parts(kind, codes, target):
        packed = pack_sparse(part, name, kind.bits)
        stored = [data.add(f"{p}_{result}", getattr(packed, p).numpy()) for p in STORED]
        if kind.beside:
            sums = pack_linear(part, scales, None, kind.bits, group).wsum
            wsum = data.add(f"wsum_{result}", sums.numpy())
        inputs = [*sources, *stored, scale, wsum, *residual]
        yield helper.make_node("SparseLinear", inputs, [result], layout=name, **common)


def _parts(kind: Kind, matrix: Any, target: str) -> Iterator[tuple[str, Any, tuple[str, ...], str]]:
    """The matrix, or R and B of a mixture: layout, part, what stands for bias and residual, and the result's name."""
    from isofold.passes.sparse_candidates import Candidate, Rest
    from isofold.passes.sparse_mixtures import split

    if not kind.beside:
        yield kind.layout, matrix, (), target
        return
    blocks, rest = split(matrix, Candidate(kind.layout, "", 0, 0, 0.0, Rest(kind.rest, 0, 0.5, 0.0)))
    yield kind.rest, rest, (), f"{target}_rest"
    yield kind.layout, blocks, ("", f"{target}_rest"), target


STORED = ("places", "values", "offsets")


def write(kind: Kind, m: int, layers: int, folder: Path) -> Path:
    """Write the model of `layers` linears; an existing file of the same name is taken as it is."""
    named = kind.name.replace(" ", "-").replace("%", "percent").replace(":", "of").replace(",", "")
    stem = f"{named}-m{m}-x{layers}"
    path = folder / f"{stem}.onnx"
    if path.exists():
        return path
    data = ExternalData(folder / f"{stem}.bin")
    nodes = [node for layer in range(layers) for node in _numbered(kind, data, layer)]
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
    file = folder / f"outputs-{kind.dtype}-{kind.zeros}-{len(x)}.npz"
    worker.ask({"do": "outputs", "file": str(file)})
    worker.stop()
    with np.load(file) as arrays:
        found = arrays["arr_1"]
    file.unlink()
    wanted = x.astype(np.float64) @ weights_of(kind, 1).astype(np.float64).T * scale_of(kind)
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    if not error < TOLERANCE[kind.dtype]:
        raise BenchmarkError(f"{kind.name}, M={len(x)}: relative error {error:.2e} to float64")


def chosen(dtype: str, m: int, only: list[str]) -> tuple[Kind, ...]:
    """A type's kinds: the dense one, and of the others those whose name has one of these texts (none: all)."""
    dense, *others = FAMILIES[dtype, m]
    return (dense, *(kind for kind in others if not only or any(text in kind.name for text in only)))


def measure(results: Results, kinds: tuple[Kind, ...], m: int, threads: int, quick: bool) -> None:
    """One interleaved run of some kinds, and its rows; the first is the dense one."""
    from isofold.runtimes.onnx.oplib.build import library_path

    packers = sorted((HERE.parent / "compiler" / "dialect").glob("sparse_*.py"))
    sources = b"".join(path.read_bytes() for path in (HERE / "sparse.py", *packers))
    folder = subject_folder("sparse", hashlib.sha256(sources).hexdigest())
    x = np.random.default_rng(1).standard_normal((m, K)).astype(np.float32)
    inputs = folder / f"x-m{m}.npz"
    np.savez(inputs, x=x)
    # At M = 128 a layer computes for long enough that fewer of them do. With one row, the cache would keep a share
    # otherwise, and another one for each competitor.
    cold = cold_bytes() if m == 1 else last_level_cache()
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
    barred: set[tuple[str, int, int]] = set()  # the first of several layouts is the one that would be chosen
    for kind in kinds[1:]:
        key = (kind.dtype, m, kind.zeros or 0)
        unstructured = kind.pattern == "unstructured" and key not in barred
        barred.add(key)
        bar = BARS.get(key) if unstructured else None
        gain = ratios(per_layer[kinds[0].name], per_layer[kind.name])
        text = None if bar is None else f">= {bar:g}"
        results.sampled(f"{kind.name}, {where}: against dense", gain, "x", text)


def body() -> int:
    """Build, run, print."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--threads", type=int, choices=(1, 2), action="append", help="only so many")
        parser.add_argument("--rows", type=int, choices=(1, 128), action="append", help="only so many")
        parser.add_argument(
            "--family", choices=("float32", "int8", "int4"), action="append", help="only this type"
        )
        parser.add_argument(
            "--only", metavar="TEXT", action="append", help="only rows with this text in the name, and dense"
        )

    arguments = parse(__doc__, extra)
    results = Results("sparse")
    for threads in (1,) if arguments.cpu_time else arguments.threads or (1, 2):
        for m in arguments.rows or (1, 128):
            for dtype in arguments.family or ("float32", "int8", "int4"):
                kinds = chosen(dtype, m, arguments.only or [])
                if len(kinds) > 1:
                    measure(results, kinds, m, threads, arguments.quick)
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
