"""Every model of models/ in every recipe, with the op library and on stock ONNX Runtime.

    python benchmarks/coverage.py [--json FILE] [--quick] [--model NAME ...] [--size tiny]

For each model and recipe: relative error (norm of the difference over norm) of the artefact's outputs, on the
example inputs and on inputs of other sizes, to PyTorch for float32 (bar 1e-4) and to the Program's own
outputs where it is quantized; the share of weight bytes that was packed; operators before and after; and as
notes what was left out and why.

A quantized Program does not agree with itself more sharply than its roundings let it: a sum in another order
moves a value across a rounding boundary of the next quantizer. ``rounding noise`` is how far it gets from its
own outputs when it computes in float64, or in float32 with every result off by up to one unit in its last
place (Monte Carlo arithmetic); the bar of the relative error is twice that, and at least 1e-2. What so loose
a bar could hide shows in the rows ``operators``: there every operator of the file gets the Program's own
inputs, so that nothing is amplified: float results within 1e-5, codes off by at most one step in at most one
of a thousand places of the model, with the op library and without.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from rich.progress import Progress

from artefacts import op_library
from harness import Results, main, number, parse
from isofold.compiler.differences import share_of_codes
from isofold.compiler.errors import IsofoldError
from isofold.compiler.frontend import Lowerable, prepare, report_of
from isofold.compiler.program import Program
from isofold.compiler.registry import backend_for
from isofold.models import registry
from isofold.models.case import ModelCase
from isofold.runtimes.onnx.operator_check import operator_differences

RECIPES = ("float32", "w8a8", "w4a8")
QUICK = ("llama", "bert", "whisper_encoder", "resnet")
BAR = {"float32": "<= 1e-4", "w8a8": "<= 1e-2", "w4a8": "<= 1e-2"}
LAST_PLACE = 2.0**-23
NOISE_SEEDS = (0, 1)


def flat(values: Any) -> list[np.ndarray]:
    """Tensors of any nested result, in order, as float64."""
    leaves = torch.utils._pytree.tree_leaves(values)
    return [leaf.detach().to(torch.float64).numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def relative_error(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """Largest over the outputs of |found - wanted| / |wanted|; infinite where shapes differ."""
    if len(found) != len(wanted) or any(f.shape != w.shape for f, w in zip(found, wanted, strict=True)):
        return float("inf")
    return max(
        float(np.linalg.norm(f.astype(np.float64) - w) / max(float(np.linalg.norm(w)), 1e-30))
        for f, w in zip(found, wanted, strict=True)
    )


class Noisy(torch.fx.Interpreter):
    """Runs a graph with every float32 result off by up to one unit in its last place.

    Whole numbers stay: they are masks, positions and zero points, which no rounding touches.
    """

    def __init__(self, program: Program, seed: int) -> None:
        super().__init__(program.graph_module)
        self.generator = torch.Generator().manual_seed(seed)

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        return torch.utils._pytree.tree_map(self.off, result) if n.op == "call_function" else result

    def off(self, value: Any) -> Any:
        """The value with noise."""
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        noise = LAST_PLACE * (2 * torch.rand(value.shape, generator=self.generator) - 1)
        return torch.where(value == value.round(), value, value * (1 + noise))


def rounding_noise(program: Program, args: Sequence[Any], wanted: Sequence[np.ndarray]) -> float:
    """Relative distance of the Program's outputs from those of the same Program rounded otherwise."""
    others = [flat(program.run_float64(args, {}))]
    for seed in NOISE_SEEDS:
        inputs = program.flatten_inputs(args, {})
        others.append(flat(Noisy(program, seed).run(*inputs, enable_io_processing=False)))
    return max(relative_error(other, wanted) for other in others)


class Runner:
    """An ONNX file in ONNX Runtime, with our library or without; counts the nodes that really run."""

    def __init__(self, model: Path, library: str | None, folder: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        optimized = folder / f"optimized-{library is not None}.onnx"
        options.optimized_model_filepath = str(optimized)
        if library:
            options.register_custom_ops_library(library)
        self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.nodes = len(onnx.load(str(optimized), load_external_data=False).graph.node)
        optimized.unlink()

    def __call__(self, program: Program, args: Sequence[Any]) -> list[np.ndarray]:
        """Outputs on these arguments."""
        given = program.flatten_inputs(args, {})
        names = [node.name for node in self.session.get_inputs()]
        # A placeholder that nothing reads has no input in the file; the others keep their names.
        named = {node.name: value for node, value in zip(program.placeholders, given, strict=True)}
        feeds = {name: named[name].numpy() for name in names}
        return [np.asarray(value) for value in self.session.run(None, feeds)]


def share_packed(lowerable: Lowerable, report: dict[str, Any]) -> float:
    """Weight bytes of the captured model that ended in a packed operator, of all."""
    packed = {row["weight"]: row["bytes_before"] for row in report["layers"] if row["packed"]}
    return float(sum(packed.values()) / max(lowerable.captured.weight_bytes, 1))


def left_out(lowerable: Lowerable, report: dict[str, Any]) -> list[str]:
    """Reasons of the quantizing and packing passes, most frequent first, and matrices that stayed float."""
    lines = [
        f"{group['pass']}: {group['reason']} ({len(group['places'])} x, e.g. {group['places'][0]['module']})"
        for group in report["refused"]
        if group["pass"].startswith(("quantize", "pack"))
    ]
    floats = {
        name: tensor.numel() * tensor.element_size()
        for name, tensor in lowerable.program.parameters.items()
        if tensor.is_floating_point()
        and tensor.dim() >= 2
        and tensor.numel() >= 256
        and name in lowerable.captured.tensors
    }
    if floats:
        largest = sorted(floats, key=lambda name: -floats[name])[:4]
        lines.append(
            f"{len(floats)} matrices stay float, {sum(floats.values())} bytes, e.g. {', '.join(largest)}"
        )
    return lines


def cover(results: Results, case: ModelCase, recipe: str, folder: Path, library: str) -> None:
    """Rows of one model in one recipe."""
    label = f"{case.name} {recipe}"
    started = time.perf_counter()
    lowerable = prepare(case.module, case.args, recipe=recipe, dynamic_shapes=case.dynamic_shapes)
    report = report_of(lowerable, "cpu")
    artefact = folder / label.replace(" ", "-")
    artefact.mkdir()
    backend_for("cpu").write(lowerable.program, artefact, report=report)
    seconds = time.perf_counter() - started
    program, model = lowerable.program, artefact / "model.onnx"
    bar, own = BAR[recipe], 0.0
    with torch.no_grad():
        source = case.module if recipe == "float32" else program
        wanted = [(args, flat(source(*args))) for args in (case.args, case.other_args)]
        if recipe != "float32":
            own = max(rounding_noise(program, args, outputs) for args, outputs in wanted)
            results.add(f"{label}: rounding noise of the Program itself", own, "")
            bar = f"<= {max(float(bar.split()[1]), 2 * own):.4g}"
    differences = []
    for name, chosen in (("library", library), ("stock", None)):
        runner = Runner(model, chosen, folder)
        worst = max(relative_error(runner(program, args), outputs) for args, outputs in wanted)
        results.add(f"{label}, {name}: relative error", worst, "", bar)
        results.add(f"{label}, {name}: nodes in ONNX Runtime", runner.nodes, "")
        if recipe != "float32":
            path = None if chosen is None else Path(chosen)
            for args, _ in wanted:
                differences += operator_differences(program, model, path, args)
    if differences:
        results.add(f"{label}, operators: relative error", max(d.error for d in differences), "", "<= 1e-5")
        results.add(f"{label}, operators: steps between codes", max(d.steps for d in differences), "", "<= 1")
        share = share_of_codes(differences)
        results.add(f"{label}, operators: share of codes that differ", share, "", "<= 1e-3")
    before, after = lowerable.captured.operator_count, lowerable.program.operator_count
    results.add(f"{label}: operators, {before} captured", after, "")
    results.add(f"{label}: captured to artefact", seconds, "s")
    if recipe != "float32":
        results.add(f"{label}: share of weight bytes packed", share_packed(lowerable, report), "x")
        for line in left_out(lowerable, report):
            results.note(f"{label}: {line}")


def body() -> int:
    """All models, all recipes; one that fails is a row without a value and a note with its error."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--model", action="append", choices=registry.names(), help="only this one (repeatable)"
        )
        parser.add_argument("--recipe", action="append", choices=RECIPES, help="only this one (repeatable)")
        parser.add_argument("--size", default="tiny", help="size of the models (default tiny)")

    arguments = parse(__doc__, extra)
    results = Results("coverage")
    chosen = arguments.model or (QUICK if arguments.quick else registry.names())
    recipes = arguments.recipe or RECIPES
    library = op_library()
    with (
        tempfile.TemporaryDirectory(prefix="isofold-coverage-") as temporary,
        Progress(transient=True) as progress,
    ):
        task = progress.add_task("models", total=len(chosen) * len(recipes))
        for name in chosen:
            for recipe in recipes:
                progress.update(task, description=f"{name} {recipe}")
                try:
                    cover(results, registry.get(name, arguments.size), recipe, Path(temporary), library)
                # Whatever stops one model is its result; the others still count.
                except Exception as error:
                    kind = "refused" if isinstance(error, IsofoldError) else "failed"
                    results.add(f"{name} {recipe}: {kind}", None, "", BAR[recipe])
                    results.note(
                        f"{name} {recipe} {kind}: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
                    )
                progress.advance(task)
    met = [row["holds"] for row in results.rows if row["bar"]]
    results.add(f"bars met, of {number(len(met))}", sum(met), "")
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
