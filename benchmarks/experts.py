"""A decode step of mixtures of experts, and a prompt, against ONNX Runtime's own operators for them.

    python benchmarks/experts.py [--json FILE] [--quick]

Two blocks of Qwen3-MoE's shapes (hidden 2048, gated experts of 768, top 8; 32 experts, which only the size of the file
depends on), router logits given. All read int4 weights in groups of 32, or float32 ones: `isofold` as it
compiles a module in recipe w4a8, w4a16 or float32; `com.microsoft.QMoE` int4 and `com.microsoft.MoE` float32, which
want gate and up interleaved. The experts that one row chooses in both blocks are more than the L3 holds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from artefacts import compile_to
from harness import BenchmarkError, Results, Worker, interleave, main, parse, per_round, ratios
from subjects import subject_folder

HIDDEN, INNER, EXPERTS, TOP, BLOCKS, GROUP = 2048, 768, 32, 8, 2, 32
LIMIT = {"float32": 1e-4, "w4a16": 0.08, "w4a8": 0.08, "QMoE int4": 1e-2, "MoE float32": 1e-4}
"""Relative error to float32. The weights lie on a grid that QMoE's codes hold; recipes search ranges of their own."""
RIVAL = {"w4a8": "QMoE int4", "w4a16": "QMoE int4", "float32": "MoE float32"}


class Blocks(nn.Module):
    """x + the sum of what the experts of its largest logits make of it, twice."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weights(n: int, k: int) -> nn.ParameterList:
            return nn.ParameterList(
                on_grid(torch.randn(EXPERTS, n, k, generator=generator) / k**0.5) for _ in range(BLOCKS)
            )

        self.gate_up, self.down = weights(2 * INNER, HIDDEN), weights(HIDDEN, INNER)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        for block in range(BLOCKS):
            best, expert = logits[:, block].topk(TOP, -1)
            shares, expert = best.softmax(-1).reshape(-1, 1), expert.reshape(-1)
            rows = x.repeat_interleave(TOP, 0)
            inner = torch.bmm(self.gate_up[block][expert], rows.unsqueeze(-1)).squeeze(-1)
            gate, up = inner.chunk(2, -1)
            inner = nn.functional.silu(gate) * up
            y = torch.bmm(self.down[block][expert], inner.unsqueeze(-1)).squeeze(-1) * shares
            x = x + y.reshape(-1, TOP, HIDDEN).sum(1)
        return x


def on_grid(weight: Tensor) -> Tensor:
    """Each group of a row at codes -7..7 times a power of two."""
    groups = weight.unflatten(-1, (-1, GROUP))
    scale = 2.0 ** torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True) / 7))
    return (scale * (groups / scale).round().clamp(-7, 7)).flatten(-2)


def interleaved(weight: Tensor) -> Tensor:
    """Gate and up rows in turn, as ONNX Runtime's operators read them."""
    return torch.stack(weight.detach().chunk(2, 1), 2).flatten(1, 2)


def int4(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes with 8 added, two in a byte, and scales of groups."""
    groups = weight.detach().unflatten(-1, (-1, GROUP))
    scale = 2.0 ** torch.ceil(torch.log2(groups.abs().amax(-1) / 7))
    codes = ((groups / scale[..., None]).round() + 8).flatten(-2).to(torch.uint8).numpy()
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scale.numpy()


def write_peer(module: Blocks, quantized: bool, path: Path) -> None:
    """The same blocks in ONNX Runtime's operators."""
    nodes, weights = [], {}
    common: dict[str, Any] = {
        "domain": "com.microsoft",
        "k": TOP,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
    }
    common |= {"normalize_routing_weights": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    x = "x"
    for block in range(BLOCKS):
        first, second = interleaved(module.gate_up[block]), module.down[block]
        weights[f"index{block}"] = np.array(block, dtype=np.int64)
        nodes.append(helper.make_node("Gather", ["logits", f"index{block}"], [f"p{block}"], axis=1))
        if quantized:
            for name, weight in (("1", first), ("2", second)):
                weights[f"w{name}_{block}"], weights[f"s{name}_{block}"] = int4(weight)
            inputs = [x, f"p{block}", f"w1_{block}", f"s1_{block}", "", f"w2_{block}", f"s2_{block}"]
            nodes.append(
                helper.make_node(
                    "QMoE", inputs, [f"y{block}"], expert_weight_bits=4, block_size=GROUP, **common
                )
            )
        else:
            weights[f"w1_{block}"], weights[f"w2_{block}"] = first.numpy(), second.detach().numpy()
            inputs = [x, f"p{block}", f"w1_{block}", "", f"w2_{block}"]
            nodes.append(helper.make_node("MoE", inputs, [f"y{block}"], **common))
        nodes.append(helper.make_node("Add", [x, f"y{block}"], [f"x{block}"]))
        x = f"x{block}"
    real = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "experts",
        [
            helper.make_tensor_value_info("x", real, ["m", HIDDEN]),
            helper.make_tensor_value_info("logits", real, ["m", BLOCKS, EXPERTS]),
        ],
        [helper.make_tensor_value_info(x, real, ["m", HIDDEN])],
        [onnx.numpy_helper.from_array(np.array(held, order="C"), name) for name, held in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, str(path), save_as_external_data=True, location=path.name + ".data")


def subjects(folder: Path) -> dict[str, dict[str, Any]]:
    """How a worker opens each competitor; what is there is not made again."""
    specs: dict[str, dict[str, Any]] = {}
    module = Blocks().eval()
    args = (torch.randn(2, HIDDEN), torch.randn(2, BLOCKS, EXPERTS))
    rows = torch.export.Dim("m", min=1, max=4096)
    for recipe in ("w4a8", "w4a16", "float32"):
        made = folder / recipe
        if not made.exists():
            compile_to(made, module, recipe, args, dynamic_shapes=({0: rows}, {0: rows}), verify=False)
        specs[recipe] = {"model": str(made / "model.onnx"), "library": str(made / "libisofold_ops.so")}
    for name, quantized in (("QMoE int4", True), ("MoE float32", False)):
        path = folder / f"{'qmoe' if quantized else 'moe'}.onnx"
        if not path.exists():
            write_peer(module, quantized, path)
        specs[name] = {"model": str(path)}
    return specs


def measure(results: Results, specs: dict[str, dict[str, Any]], m: int, threads: int, rounds: int) -> None:
    """One interleaved run of all competitors on m rows."""
    folder = subject_folder("experts", HIDDEN, INNER, EXPERTS, BLOCKS)
    random = np.random.default_rng(m)
    feeds: dict[str, Any] = {
        "x": random.standard_normal((m, HIDDEN)).astype(np.float32),
        "logits": random.standard_normal((m, BLOCKS, EXPERTS)).astype(np.float32),
    }
    inputs = folder / f"inputs-{m}.npz"
    np.savez(inputs, **feeds)
    workers: list[Worker] = []
    try:
        outputs: dict[str, np.ndarray] = {}
        for name, spec in specs.items():
            own = {"engine": "onnxruntime", "inputs": str(inputs), "threads": threads, **spec}
            workers.append(Worker(name, own))
            file = folder / "outputs.npz"
            workers[-1].ask({"do": "outputs", "file": str(file)})
            workers[-1].stop()
            with np.load(file) as arrays:
                outputs[name] = arrays["arr_0"]
        wanted = outputs["MoE float32"]
        for name, found in outputs.items():
            error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
            if not error < LIMIT[name]:
                raise BenchmarkError(f"{name}, {m} rows: relative error {error:.2e}, limit {LIMIT[name]}")
        seconds = interleave(workers, rounds, {worker.name: 4 if m == 1 else 1 for worker in workers})
    finally:
        for worker in workers:
            worker.close()
    where = f"{m} row{'s' * (m > 1)}, {threads} thread{'s' * (threads > 1)}"
    for name in specs:
        results.sampled(f"{name}, {where}", [1e6 * t / BLOCKS for t in per_round(seconds[name])], "us")
    for name, rival in RIVAL.items():
        results.sampled(
            f"{name}, {where}: against {rival}", ratios(seconds[rival], seconds[name]), "x", ">= 1"
        )
    results.sampled(
        f"w4a8, {where}: against float32 experts", ratios(seconds["MoE float32"], seconds["w4a8"]), "x"
    )


def body() -> int:
    """Build, run, print."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--threads", type=int, choices=(1, 2), action="append", help="only this many threads"
        )

    arguments = parse(__doc__, extra)
    results = Results("experts")
    specs = subjects(subject_folder("experts", HIDDEN, INNER, EXPERTS, BLOCKS))
    for threads in (1,) if arguments.cpu_time else arguments.threads or (1, 2):
        for m in (1, 64):
            measure(
                results, specs, m, threads, (5 if m == 1 else 2) if arguments.quick else (24 if m == 1 else 6)
            )
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
