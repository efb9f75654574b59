"""The CUDA kernels on a GPU: numerics of every operator, then speed beside the GPU's own rates.

    python benchmarks/gpu.py [--json FILE] [--quick] [--numerics-only] [--layers N]

Needs an NVIDIA GPU of sm_80 or later, its driver, nvcc or NVRTC, and isofold; PyTorch with CUDA for the rates of matrix
products and for the decoding step it is compared with (without it these rows are left out, and a note says so).
Kernels are timed inside CUDA graphs on layers whose weights together exceed the second-level cache several times.

Bars (issue 5): W4A16 with one token at 4096 and 8192 at least 75 % of the bandwidth of a copy, 16 tokens within 25 %
of the one token's time; W8A8 with 512 tokens and more at least 60 % of the measured int8 (or bfloat16) rate; a
Llama-shaped decoding step at least 2.5 times the same model in torch float16 with CUDA graphs.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gpu_compressed import compressed_rows
from gpu_device import Gpu
from gpu_llama import decode_rows
from gpu_runner import Runner, call_of, fp8_arguments, linear_arguments, time_operator
from harness import HERE, Results, main, parse
from isofold.compiler.dialect import OPERATORS
from isofold.runtimes.tvm.cuda.operators import EMITTERS

COLD_BYTES = 512 << 20
"""Weights of all layers of a measurement: several times any second-level cache."""
HALVES = {
    "linear_packed_float", "linear_outliers_float", "linear_coded", "linear_codebook", "linear_sparse_float",
    "attention", "attention_cached",
}  # fmt: skip


def operator_cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The uses of all operators that the tests have, and products of many rows."""
    path = HERE.parent / "tests" / "runtimes" / "onnx" / "operator_cases.py"
    spec = importlib.util.spec_from_file_location("operator_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, what, arguments in module.cases():
        yield name, what, arguments
        if "linear" in name:
            static = arguments.get("params") is not None and arguments["params"].dim() == 1
            names = [n for n in ("x", "u", "params", "residual") if arguments.get(n) is not None]
            rows = {n: torch.cat([arguments[n]] * 40) for n in names if not (n == "params" and static)}
            yield name, f"{what}-many", {**arguments, **rows}


def numerics(results: Results, gpu: Gpu, arch: str, folder: Path, quick: bool) -> None:
    """The largest relative error of every operator against its reference."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for name, _, arguments in operator_cases():
        by_name.setdefault(name, []).append(arguments)
    for name, cases in sorted(by_name.items()):
        cases = cases[:: 9 if quick else 3]  # odd: of a linear every second use has many rows
        calls = [call_of(name, arguments) for arguments in cases]
        runner = Runner(gpu, [EMITTERS[name](call) for call, _ in calls], arch, folder)
        worst = 0.0
        for number, (arguments, (_, arrays)) in enumerate(zip(cases, calls, strict=True)):
            run, values = runner.prepared(number, arrays)
            run()
            expected = OPERATORS[name].overload(**arguments)
            expected = expected if isinstance(expected, (tuple, list)) else (expected,)
            for result, reference in zip(runner.plans[number].results, expected, strict=True):
                if result in values and reference.dtype.is_floating_point:
                    got = torch.from_numpy(gpu.fetch(values[result])).reshape(reference.shape)
                    scale = max(float(reference.abs().max()), 1e-6)
                    worst = max(worst, float((got.double() - reference.double()).abs().max()) / scale)
        results.add(f"{name}: error", worst, "of the largest", f"<= {2e-3 if name in HALVES else 1e-5}")


def time_linear(
    gpu: Gpu,
    arch: str,
    folder: Path,
    n: int,
    k: int,
    bits: int,
    group: int,
    rows: int,
    floats: bool,
    rounds: int,
) -> tuple[list[float], int]:
    """Seconds of one product inside a graph of many layers, and its bytes of weights and scales; bits 0: FP8."""
    arguments = linear_arguments(n, k, bits, group, rows, floats) if bits else fp8_arguments(n, k, rows)
    name = "linear_fp8" if not bits else "linear_packed_float" if floats else "linear_packed"
    size = sum(arguments[each].numel() * arguments[each].element_size() for each in ("weight", "scale"))
    layers = max(2, -(-COLD_BYTES // size)) if rows <= 32 else 4
    return time_operator(gpu, arch, folder, name, arguments, layers, rounds), size


def gemv_rows(results: Results, gpu: Gpu, arch: str, folder: Path, quick: bool) -> None:
    """Few tokens: shares of the copy's bandwidth."""
    rounds = 5 if quick else 30
    copy = gpu.copy_bandwidth(rounds)
    results.add("copy", copy / 1e9, "GB/s")
    kinds = [
        ("W4A16 g128", 4, 128, True),
        ("W4A8 g128", 4, 128, False),
        ("W8A8", 8, 0, False),
        ("W8A16", 8, 0, True),
        ("FP8", 0, 0, False),
    ]
    for what, bits, group, floats in kinds[:1] if quick else kinds:
        for n, k in [(4096, 4096), (8192, 8192), (14336, 4096), (4096, 14336)]:
            bars = bits == 4 and floats and n == k
            single = None
            for rows in (1, 8, 16):
                times, size = time_linear(gpu, arch, folder, n, k, bits, group, rows, floats, rounds)
                name = f"{what}, {n} x {k}, {rows} token{'s' * (rows > 1)}"
                share = [size / t / copy for t in times]
                results.sampled(
                    f"{name}: share of the copy", share, "", ">= 0.75" if bars and rows == 1 else None
                )
                results.sampled(name, [1e6 * t for t in times], "us")
                single = single or statistics.median(times)
                if rows == 16:
                    ratio = statistics.median(times) / single
                    results.add(f"{name}: time of one token's", ratio, "x", "<= 1.25" if bars else None)


def matrix_rates(results: Results, size: int = 8192) -> dict[str, float]:
    """Rates that torch reaches, in operations a second."""
    if not torch.cuda.is_available():
        results.note(
            "torch has no CUDA here: no rates of matrix products and no decoding step to compare with"
        )
        return {}
    found = {}
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found["bfloat16"] = _torch_rate(lambda: torch.mm(a, b), size)
    c, d = (torch.randint(-127, 127, (size, size), device="cuda", dtype=torch.int8) for _ in range(2))
    found["int8"] = _torch_rate(lambda: torch._int_mm(c, d.t()), size)
    if torch.cuda.get_device_capability() >= (8, 9):
        e, f = (a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t())
        one = torch.ones((), device="cuda")
        found["float8"] = _torch_rate(
            lambda: torch._scaled_mm(e, f, scale_a=one, scale_b=one, out_dtype=torch.bfloat16), size
        )
    for name, rate in found.items():
        results.add(f"torch {name} product, {size}", rate / 1e12, "TOPS")
    return found


def _torch_rate(run: Callable[[], Any], size: int) -> float:
    times = []
    for turn in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(1e-3 * begin.elapsed_time(end))
    return 2 * size**3 / statistics.median(times)


def gemm_rows(results: Results, gpu: Gpu, arch: str, folder: Path, quick: bool) -> None:
    """Many tokens: shares of the rates."""
    rates = matrix_rates(results)
    rate = rates.get("int8") or rates.get("bfloat16")
    kinds = [("W8A8", 8, 0, False), ("FP8", 0, 0, False), ("W4A8 g128", 4, 128, False)]
    kinds.append(("W4A16 g128", 4, 128, True))
    for what, bits, group, floats in kinds[:1] if quick else kinds:
        for rows in (512, 2048, 8192):
            times, _ = time_linear(
                gpu, arch, folder, 4096, 4096, bits, group, rows, floats, 5 if quick else 20
            )
            speed = [2 * rows * 4096 * 4096 / t for t in times]
            name = f"{what}, 4096 x 4096, {rows} tokens"
            results.sampled(name, [s / 1e12 for s in speed], "TOPS")
            if bits == 8:
                share = [s / rate for s in speed] if rate else []
                bar = ">= 0.6"
                if share:
                    results.sampled(f"{name}: share of torch's rate", share, "", bar)
                else:
                    results.add(f"{name}: share of torch's rate", None, "", bar)
            if bits == 0 and "float8" in rates:
                share = [s / rates["float8"] for s in speed]
                results.sampled(f"{name}: share of torch's FP8 rate", share, "")


def attention_rows(results: Results, gpu: Gpu, arch: str, folder: Path, quick: bool) -> None:
    """A decoding step over a cache, and a prompt."""
    for what, queries, keys in (("decode", 1, 4096), ("decode", 1, 32768), ("prompt", 2048, 2048)):
        heads, kv, depth = 32, 8, 128
        shapes = {"q": (1, queries, heads, depth), "k": (1, keys, kv, depth), "v": (1, keys, kv, depth)}
        arguments: dict[str, Any] = {name: torch.randn(shape) for name, shape in shapes.items()}
        options = {"mask": None, "heads": heads, "kv_heads": kv, "q_start": 0, "k_start": 0, "v_start": 0}
        arguments |= {**options, "scale": depth**-0.5, "causal": what == "prompt", "softcap": 0.0}
        times = time_operator(gpu, arch, folder, "attention", arguments, 1, 5 if quick else 30)
        results.sampled(f"attention, {what}, {keys} keys", [1e6 * t for t in times], "us")
        if queries == 1:
            size = 4 * (arguments["k"].numel() + arguments["v"].numel())
            results.sampled(f"attention, {what}, {keys} keys: read", [size / t / 1e9 for t in times], "GB/s")


def body() -> int:
    """The whole benchmark."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--numerics-only", action="store_true", help="no times")
        parser.add_argument("--layers", type=int, default=16, help="of the Llama-shaped model (1 B has 16)")

    arguments = parse(__doc__, extra)
    gpu = Gpu()
    name, arch = gpu.describe()
    results = Results(f"gpu ({name}, {arch})")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        numerics(results, gpu, arch, folder, arguments.quick)
        if not arguments.numerics_only:
            gemv_rows(results, gpu, arch, folder, arguments.quick)
            gemm_rows(results, gpu, arch, folder, arguments.quick)
            attention_rows(results, gpu, arch, folder, arguments.quick)
            compressed_rows(results, gpu, arch, folder, arguments.quick)
            decode_rows(results, gpu, arch, folder, arguments.layers, arguments.quick)
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
