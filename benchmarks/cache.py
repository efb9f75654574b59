"""Attention on caches of codes against float32: one new token (decode) and a block of queries (prefill), long contexts.

    python benchmarks/cache.py [--json FILE] [--quick] [--threads 1] [--context 4096]

One layer of a decoder, 32 query heads on 8 key heads of 128 dimensions, inside ONNX Runtime: several attentions, each
with a cache of its own, so that the caches of one run exceed the L3 cache and come from memory, as they do in a
model. Kinds: our `Attention` on float32 keys and values, `CachedAttention` on 8 and 4 bits. Bytes are those of keys
and values of one attention, pairs included.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from harness import (
    HERE,
    BenchmarkError,
    Results,
    Worker,
    cold_bytes,
    interleave,
    main,
    parse,
    per_round,
    ratios,
)
from linear_models import ExternalData
from linears import library
from subjects import subject_folder

HEADS, KV_HEADS, DEPTH = 32, 8, 128
CONTEXTS = (1024, 4096, 16384)
QUERIES = {"decode": 1, "prefill of 128": 128}
KINDS = {0: "float32", 8: "8 bits", 4: "4 bits"}
FASTER = {("decode", 8): ">= 2", ("decode", 4): ">= 2"}


def _cache(bits: int, tokens: int, layer: int) -> list[np.ndarray]:
    """Keys and values of one attention: floats `[1, T, G, D]`, or codes and pairs `[1, G, T, ...]`."""
    import torch

    generator = torch.Generator().manual_seed(layer)
    drawn = [torch.randn(1, KV_HEADS, 64, DEPTH, generator=generator) for _ in range(2)]
    floats = [x.repeat(1, 1, tokens // 64, 1) for x in drawn]
    if not bits:
        return [x.transpose(1, 2).contiguous().numpy() for x in floats]
    import isofold.compiler.dialect  # noqa: F401  # registers the operators

    return [t.numpy() for x in floats for t in torch.ops.isofold.quantize_cache(x, None, bits)]


def _write(bits: int, tokens: int, queries: int, layers: int, folder: Path) -> tuple[Path, int]:
    path = folder / f"{bits}-t{tokens}-s{queries}-x{layers}.onnx"
    size = path.with_suffix(".bytes")
    if path.exists() and size.exists():
        return path, int(size.read_text())
    data, nodes = ExternalData(path.with_suffix(".bin")), []
    common: dict[str, Any] = {
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "q_start": 0,
        "scale": DEPTH**-0.5,
        "causal": 0,
    }
    common |= {"softcap": 0.0, "domain": "ai.isofold"}
    for layer in range(layers):
        held = [data.add(f"cache{layer}_{i}", array) for i, array in enumerate(_cache(bits, tokens, layer))]
        if bits:
            more: dict[str, Any] = {"depth": DEPTH, "value_depth": DEPTH, "bits": bits, "group": 0}
            nodes.append(helper.make_node("CachedAttention", ["q", *held], [f"y{layer}"], **common, **more))
        else:
            more = {"k_start": 0, "v_start": 0}
            nodes.append(helper.make_node("Attention", ["q", *held], [f"y{layer}"], **common, **more))
    data.stream.close()
    shape = [1, queries, HEADS, DEPTH]
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("q", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"y{layer}", TensorProto.FLOAT, shape) for layer in range(layers)],
        data.initializers,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.isofold", 1)]
    beside = path.with_suffix(".tmp")
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(beside))
    size.write_text(str(data.tensor_bytes))
    beside.replace(path)
    return path, data.tensor_bytes


def _open(bits: int, tokens: int, queries: int, threads: int, folder: Path) -> tuple[Worker, int, int]:
    """A worker, its attentions, and the bytes of one's cache."""
    per_layer = 2 * KV_HEADS * tokens * (DEPTH * (bits or 32) // 8 + (8 if bits else 0))
    layers = max(2, int(np.ceil(cold_bytes() / per_layer))) if queries == 1 else 2
    path, total = _write(bits, tokens, queries, layers, folder)
    q = np.random.default_rng(1).standard_normal((1, queries, HEADS, DEPTH)).astype(np.float32)
    inputs = folder / f"q-s{queries}.npz"
    np.savez(inputs, q=q)
    spec = {
        "engine": "onnxruntime",
        "model": str(path),
        "inputs": str(inputs),
        "threads": threads,
        "optimize": "ORT_DISABLE_ALL",
        "library": library(),
    }
    worker = Worker(f"{KINDS[bits]}, {queries} x {tokens}", spec)
    _check(worker, bits, q, tokens, folder)
    return worker, layers, total // layers


def _check(worker: Worker, bits: int, q: np.ndarray, tokens: int, folder: Path) -> None:
    """A fast wrong kernel is no result: attention 1 against float64 on what its codes stand for."""
    file = folder / f"outputs-{bits}-{tokens}-{q.shape[1]}.npz"
    worker.ask({"do": "outputs", "file": str(file)})
    worker.stop()
    with np.load(file) as arrays:
        found = arrays["arr_1"][0]
    file.unlink()
    cache = _cache(bits, tokens, 1)
    if bits:
        import torch

        both = (
            torch.ops.isofold.dequantize_cache(*map(torch.from_numpy, cache[i : i + 2]), DEPTH, bits)
            for i in (0, 2)
        )
        k, v = (x.double().numpy()[0] for x in both)
    else:
        k, v = (x[0].transpose(1, 0, 2).astype(np.float64) for x in cache)
    for head in (0, HEADS - 1):
        g = head // (HEADS // KV_HEADS)
        logits = q[0, :, head] @ k[g].T * DEPTH**-0.5
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        wanted = weights / weights.sum(-1, keepdims=True) @ v[g]
        error = np.linalg.norm(found[:, head] - wanted) / np.linalg.norm(wanted)
        if not error < 1e-4:
            raise BenchmarkError(f"{worker.name}: relative error {error:.2e} to float64")


def measure(results: Results, what: str, tokens: int, threads: int, rounds: int) -> None:
    """One interleaved run of all kinds, and its rows."""
    source = hashlib.sha256((HERE / "cache.py").read_bytes()).hexdigest()
    folder = subject_folder("cache", str(tokens), source)
    opened: dict[int, tuple[Worker, int, int]] = {}
    try:
        for bits in KINDS:
            opened[bits] = _open(bits, tokens, QUERIES[what], threads, folder)
        workers = [worker for worker, _, _ in opened.values()]
        seconds = interleave(workers, rounds, {worker.name: 3 for worker in workers})
    finally:
        for worker, _, _ in opened.values():
            worker.close()
    where = f"{what}, {tokens} tokens, {threads} thread{'s' if threads > 1 else ''}"
    each = {bits: [[t / n for t in turn] for turn in seconds[w.name]] for bits, (w, n, _) in opened.items()}
    for bits, name in KINDS.items():
        if threads == 1 and what == "decode":
            results.add(f"{name}, {tokens} tokens: bytes of keys and values", opened[bits][2], "bytes")
        results.sampled(f"{name}, {where}", [1e6 * t for t in per_round(each[bits])], "us")
        if bits:
            bar = FASTER.get((what, bits))
            results.sampled(f"{name}, {where}: against float32", ratios(each[0], each[bits]), "x", bar)


def body() -> int:
    """Build, run, print."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--threads", type=int, choices=(1, 2), action="append", help="only this many threads"
        )
        parser.add_argument(
            "--context", type=int, choices=CONTEXTS, action="append", help="only this many tokens"
        )

    arguments = parse(__doc__, extra)
    results = Results("cache")
    for threads in (1,) if arguments.cpu_time else arguments.threads or (1, 2):
        for tokens in arguments.context or CONTEXTS:
            for what in QUERIES:
                if what == "decode" or tokens <= 4096:
                    measure(results, what, tokens, threads, 5 if arguments.quick else 16)
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
