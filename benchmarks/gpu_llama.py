"""A decoding step of a model with Llama 3.2 1B's shapes: isofold's W4A16 executable against torch float16 in a CUDA
graph.

The cache is an input and the new keys and values are results, so that both sides compute the same function. Weights are
random; only shapes matter for time.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpu_device import Gpu
from harness import Results

HIDDEN, INNER, HEADS, KV, DEPTH, VOCABULARY = 2048, 8192, 32, 8, 64, 128256
PAST = 512


class Layer(nn.Module):
    """One layer: attention over a cache, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(HIDDEN, 1e-5), nn.RMSNorm(HIDDEN, 1e-5)
        self.q = nn.Linear(HIDDEN, HEADS * DEPTH, bias=False)
        self.k, self.v = (nn.Linear(HIDDEN, KV * DEPTH, bias=False) for _ in range(2))
        self.o = nn.Linear(HEADS * DEPTH, HIDDEN, bias=False)
        self.gate, self.up = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x `[1, 1, HIDDEN]`, cache `[1, KV, past, DEPTH]` → x, and the step's key and value."""
        y = self.first(x)
        q = self._turn(self.q(y).view(1, 1, HEADS, DEPTH).transpose(1, 2), cos, sin)
        k = self._turn(self.k(y).view(1, 1, KV, DEPTH).transpose(1, 2), cos, sin)
        v = self.v(y).view(1, 1, KV, DEPTH).transpose(1, 2)
        all_k, all_v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        attended = F.scaled_dot_product_attention(q, all_k, all_v, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).reshape(1, 1, -1))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y)), k, v

    @staticmethod
    def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin


class Decoder(nn.Module):
    """The layers, the last norm and the head."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(HIDDEN, 1e-5), nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """keys, values `[layers, 1, KV, past, DEPTH]` → logits and the step's keys and values, stacked."""
        made = []
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, cos, sin, keys[i], values[i])
            made.append((k, v))
        return self.head(self.norm(x)), torch.stack([k for k, _ in made]), torch.stack([v for _, v in made])


def example(layers: int) -> tuple[Tensor, ...]:
    """Inputs of a step after PAST tokens."""
    g = torch.Generator().manual_seed(0)
    cache = [torch.randn(layers, 1, KV, PAST, DEPTH, generator=g) for _ in range(2)]
    angles = torch.rand(1, 1, 1, DEPTH, generator=g)
    return (torch.randn(1, 1, HIDDEN, generator=g), angles.cos(), angles.sin(), *cache)


def decode_rows(results: Results, gpu: Gpu, arch: str, folder: Path, layers: int, quick: bool) -> None:
    """Milliseconds of a step on both sides, and their ratio."""
    layers, rounds = (2, 10) if quick else (layers, 50)
    torch.manual_seed(0)
    with torch.no_grad():
        model = Decoder(layers).eval()
        own = _own_seconds(model, gpu, arch, folder, layers, rounds)
        results.sampled(f"decode step, {layers} layers, w4a16", [1e3 * t for t in own], "ms")
        peer = _torch_seconds(model, layers, rounds) if torch.cuda.is_available() else []
    bar, name = ">= 2.5", f"decode step, {layers} layers: against torch float16 with CUDA graphs"
    if not peer:
        results.add(name, None, "x", bar)
        return
    results.sampled(f"decode step, {layers} layers, torch float16", [1e3 * t for t in peer], "ms")
    results.sampled(name, [p / o for p, o in zip(peer, own, strict=False)], "x", bar)


def _own_seconds(model: Decoder, gpu: Gpu, arch: str, folder: Path, layers: int, rounds: int) -> list[float]:
    prepare = import_module("isofold.compiler.frontend").prepare
    compile_program = import_module("isofold.runtimes.tvm.artefact").compile_program
    read_tensors = import_module("isofold.compiler.tensor_file").read_tensors
    executor_class = import_module("isofold.runtimes.tvm.cuda.executor").CudaExecutor
    inputs = example(layers)
    program = prepare(model, inputs, recipe="w4a16", verify=False).program
    library, weights = folder / "llama.so", folder / "llama.safetensors"
    compile_program(program, library, weights, f"cuda:{arch}")
    executor = executor_class(library, read_tensors(weights))
    placed = [gpu.place(t.numpy()) for t in inputs]
    return gpu.seconds(lambda: executor.run_placed(placed), rounds)


def _torch_seconds(model: Decoder, layers: int, rounds: int) -> list[float]:
    half = model.half().cuda()
    inputs = [t.half().cuda() for t in example(layers)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            half(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        half(*inputs)
    times = []
    for turn in range(rounds + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(1e-3 * begin.elapsed_time(end))
    return times
