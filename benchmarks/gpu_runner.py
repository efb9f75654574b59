"""Plans of operators on a GPU: compiled, placed, launched and timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_device import Gpu
from isofold.compiler.dialect import OPERATORS
from isofold.runtimes.tvm.cuda.compile import compile_functions
from isofold.runtimes.tvm.cuda.operators import EMITTERS
from isofold.runtimes.tvm.cuda.plan import Call, Operand, Plan
from isofold.runtimes.tvm.cuda.rewrite import is_tensor


def call_of(name: str, arguments: dict[str, Any]) -> tuple[Call, dict[str, np.ndarray]]:
    """An operator's use as emitters take it, and its tensors as arrays."""
    declared = OPERATORS[name].overload._schema.arguments
    given = {a.name: arguments.get(a.name, a.default_value) for a in declared}
    tensors = {a.name: given[a.name] for a in declared if is_tensor(a)}
    arrays = {n: t.contiguous().numpy() for n, t in tensors.items() if t is not None}
    operands = {
        n: None if t is None else Operand(tuple(t.shape), str(arrays[n].dtype)) for n, t in tensors.items()
    }
    return Call(operands, {n: v for n, v in given.items() if n not in tensors}), arrays


class Runner:
    """Plans compiled together, ready to be launched."""

    def __init__(self, gpu: Gpu, plans: list[Plan], arch: str, folder: Path) -> None:
        self.gpu, self.plans = gpu, plans
        functions = {}
        self.names = []
        for number, plan in enumerate(plans):
            self.names.append([f"{stage.name}_p{number}" for stage in plan.stages])
            for name, stage in zip(self.names[-1], plan.stages, strict=True):
                functions[name] = stage.function.with_attr("global_symbol", name)
        module, self.cubin = compile_functions(functions, arch)
        library = folder / f"kernels{len(list(folder.iterdir()))}.so"
        module.export_library(str(library))
        self.module = gpu.load(library)

    def prepared(
        self, number: int, arrays: dict[str, np.ndarray]
    ) -> tuple[Callable[[], None], dict[str, Any]]:
        """What launches a plan on these arguments, and its tensors by name."""
        plan, values = self.plans[number], {}
        for name, shape in plan.views.items():
            values[name] = self.gpu.place(arrays[name.partition("@")[0]].reshape([int(s) for s in shape]))
        for name, table in plan.constants.items():
            values[name] = self.gpu.place(table)
        calls = []
        for name, stage in zip(self.names[number], plan.stages, strict=True):
            for tensor in stage.outputs:
                values[tensor.name] = self.gpu.empty([int(s) for s in tensor.shape], tensor.dtype)
            calls.append(
                (self.module[name], [values[n] for n in (*stage.inputs, *(t.name for t in stage.outputs))])
            )

        def run() -> None:
            for function, given in calls:
                function(*given)

        return run, values


def time_operator(
    gpu: Gpu, arch: str, folder: Path, name: str, arguments: dict[str, Any], layers: int, rounds: int
) -> list[float]:
    """Seconds of one use of an operator inside a CUDA graph of many, each with tensors of its own."""
    call, arrays = call_of(name, arguments)
    runner = Runner(gpu, [EMITTERS[name](call)], arch, folder)
    launches = [runner.prepared(0, arrays)[0] for _ in range(layers)]

    def every() -> None:
        for launch in launches:
            launch()

    return [t / layers for t in gpu.seconds(gpu.graph(every), rounds)]


def fp8_arguments(n: int, k: int, rows: int) -> dict[str, Any]:
    """A linear_fp8 with a scale a row on random codes that are numbers."""
    g = torch.Generator().manual_seed(n + k + rows)
    weight, u = (
        torch.randint(0, 0x7F, shape, generator=g, dtype=torch.int32).to(torch.uint8)
        for shape in ((n // 16, k // 2, 16, 2), (rows, k))
    )
    return {
        "u": u, "params": torch.rand(rows, 1, generator=g), "weight": weight,
        "scale": torch.rand(n // 16, 1, 16, generator=g), "bias": None, "residual": None, "n": n, "k": k,
        "format": "e4m3", "group_size": 0, "scale_multiplier": 1.0, "activation": "none", "gated": False,
    }  # fmt: skip


def linear_arguments(n: int, k: int, bits: int, group: int, rows: int, floats: bool) -> dict[str, Any]:
    """A linear on random bytes: speed does not depend on them."""
    g = torch.Generator().manual_seed(n + k + rows)
    per = {8: (4, torch.int8), 4: (8, torch.uint8)}[bits]
    weight = torch.randint(0, 127, (n // 16, k // per[0], 16, 4), generator=g, dtype=torch.int32).to(per[1])
    groups = k // group if group else 1
    scale = torch.rand(n // 16, groups, 16, generator=g).to(torch.float16 if group else torch.float32)
    shared = {
        "weight": weight, "scale": scale, "zero": None, "bias": None, "residual": None, "n": n, "k": k, "bits": bits,
        "group_size": group, "scale_multiplier": 0.01, "activation": "none", "gated": False,
    }  # fmt: skip
    if floats:
        return {"x": torch.randn(rows, k, generator=g), **shared}
    u = torch.randint(0, 255, (rows, k), generator=g, dtype=torch.int32).to(torch.uint8)
    return {"u": u, "params": torch.rand(rows, 2, generator=g), "wsum": torch.rand(n, generator=g), **shared}
