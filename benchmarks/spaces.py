"""Channel spaces of every model of models/: random members of every group in every legal place, and what they cost.

    python benchmarks/spaces.py [--json FILE] [--quick] [--model NAME ...] [--docs FILE]

For each model: gains folded, writers centred, then a random matrix, permutation, scale and shift wherever the analysis
allows one. Largest difference of the outputs over their largest value, in float64 (bar 1e-9) and with float32
parameters run in float32 (bar 1e-4); whether the same spaces come out when every name in the captured graph is replaced
by a hash; and whether they do when the model is written with other operators (spellings.py: each spelling for some
models, all at once for every model). Then the seconds that the analysis of a 32-layer decoder takes (bar 10), and, but
for --quick, the folds of the preset w4a8-rotate in a Llama of a billion parameters, and gains with a random dense
rotation, each in a process of its own, run and verified by the driver: seconds (bar 180) and the process's peak memory
over the bytes of the weights (bar 2). --docs rewrites the table of docs/spaces.md.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from harness import HERE, Results, main, number, parse
from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, relative_error, run_steps
from isofold.compiler.editor import Editor
from isofold.compiler.passes import PassResult
from isofold.compiler.program import Program
from isofold.compiler.recipe import PRESETS
from isofold.compiler.spaces import sample
from isofold.compiler.spaces.analysis import Spaces, analyse
from isofold.compiler.spaces.atoms import Group
from isofold.compiler.spaces.change import apply_bases, apply_factors, apply_shifts
from isofold.compiler.spaces.transform import random_orthogonal
from isofold.models import registry
from isofold.models.case import ModelCase
from isofold.passes.center_norms import center_norms
from isofold.passes.fold_norm_affine import fold_norm_affine
from isofold.passes.fold_permutation import fold_permutation
from isofold.passes.fold_rotation import fold_rotation
from isofold.passes.fold_transforms import fold_steps
from isofold.passes.untie_embeddings import untie_embeddings
from spellings import SPELLINGS, outline

QUICK = ("llama", "bert", "whisper", "resnet")
SPELLED = ("llama", "bert", "opt", "vit", "mpt", "bloom", "gpt_neox", "gpt2")
"""Models that are written in every spelling; the others in all at once."""
BAR = {"float64": "<= 1e-9", "float32": "<= 1e-4"}
LETTERS = {
    Group.ORTHOGONAL: "O",
    Group.FIX_ONES: "O keeping ones",
    Group.GENERAL: "GL",
    Group.PAIR: "pairs",
    Group.PAIR_ORTHOGONAL: "pair rotations",
    Group.PERMUTATION: "permutations",
}
BEGIN, END = "<!-- table: benchmarks/spaces.py --docs -->", "<!-- end of table -->"


def with_tensors(program: Program, tensors: dict[str, Any]) -> Program:
    """The same graph with other tensors."""
    return Program(
        program.graph,
        tensors,
        program.example_args,
        program.example_kwargs,
        program.dynamic_shapes,
        program.records,
    )


def widened(program: Program) -> Program:
    """The program with float64 parameters."""

    def wide(held: Any) -> Any:
        return held.double() if isinstance(held, Tensor) and held.is_floating_point() else held

    return with_tensors(program, {name: wide(held) for name, held in program.tensors.items()})


def prepared(program: Program) -> tuple[Program, int, int]:
    """Untied, gains folded, writers centred; gains folded and gains in all."""
    program = untie_embeddings(program).program
    gains = len(analyse(program).gains)
    folded = fold_norm_affine(program)
    return center_norms(folded.program).program, len(folded.report.applied), gains


def folded(program: Program, generator: torch.Generator) -> Program:
    """A random member of everything that is allowed."""
    spaces, editor = analyse(program), Editor(program)
    apply_bases(editor, spaces, sample.random_bases(spaces, generator))
    program = editor.finish()
    program = fold_permutation(program, orders=sample.random_orders(analyse(program), generator)).program
    for draw, apply in ((sample.random_factors, apply_factors), (sample.random_shifts, apply_shifts)):
        spaces, editor = analyse(program), Editor(program)
        apply(editor, spaces, draw(spaces, generator))
        program = editor.finish()
    return program


def run32(program: Program) -> list[Tensor]:
    """Outputs as the program computes them."""
    with torch.no_grad():
        flat = torch.utils._pytree.tree_leaves(program(*program.example_args, **program.example_kwargs))
    return [y for y in flat if isinstance(y, Tensor)]


def scrambled(program: Program) -> Program:
    """The captured program with hashes for the names of nodes and tensors, and without the modules' paths."""
    names = {name: "p" + hashlib.sha256(name.encode()).hexdigest()[:16] for name in program.tensors}
    graph = program.copy_graph()
    for index, node in enumerate(graph.nodes):
        if node.op == "get_attr":
            node.target = names[str(node.target)]
        if node.op != "placeholder":
            node._rename("n" + hashlib.sha256(f"{index} {node.name}".encode()).hexdigest()[:16])
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "from_node"):
            node.meta.pop(key, None)
    return Program(
        graph,
        {names[name]: held for name, held in program.tensors.items()},
        program.example_args,
        program.example_kwargs,
        program.dynamic_shapes,
    )


def signature(spaces: Spaces) -> Any:
    """What must not depend on names: spaces with groups and sizes, and the number of free scales and shifts."""
    found = [(s.group.name, s.size, s.copies, len(s.parameters), len(s.values)) for s in spaces.spaces]
    return found, len(spaces.scales.free_roots()), len(spaces.shifts.free_roots())


def description(spaces: Spaces) -> str:
    """`O(64); 4 x GL(16); permutations of 96` and so on."""
    counted = Counter((s.group, s.size, s.copies) for s in spaces.spaces)
    parts = []
    for (group, size, copies), count in sorted(counted.items(), key=lambda item: (-item[0][0], -item[0][1])):
        times = f"{count * copies} x " if count * copies > 1 else ""
        parts.append(f"{times}{LETTERS[group]}({size})")
    return "; ".join(parts)


def forbids(spaces: Spaces) -> str:
    """The first reason of each space that takes permutations only, the most frequent first."""
    why = Counter(s.bound[0].why for s in spaces.spaces if s.group == Group.PERMUTATION and s.bound)
    kept = Counter(reason.why for _, reason in spaces.kept)
    shown = [text for text, _ in why.most_common(2)] + [
        f"gains kept: {text}" for text, _ in kept.most_common(1)
    ]
    return "; ".join(shown)


def cover(results: Results, case: ModelCase) -> str:
    """Rows of one model; returns its line of the table."""
    captured = capture(case.module, case.args, dynamic_shapes=case.dynamic_shapes)
    program = canonicalize(captured).program
    wide = widened(program)
    ready, gains, total = prepared(wide)
    spaces = analyse(ready)
    # Gains and centring are part of what is measured: errors are against the captured program's weights.
    error = relative_error(wide.run_float64(), folded(ready, torch.Generator().manual_seed(0)).run_float64())
    results.add(f"{case.name}: relative error, float64", error, "", BAR["float64"])
    single, _, _ = prepared(program)
    error32 = relative_error(run32(program), run32(folded(single, torch.Generator().manual_seed(0))))
    results.add(f"{case.name}: relative error, float32", error32, "", BAR["float32"])
    other, _, _ = prepared(widened(canonicalize(scrambled(captured)).program))
    same = signature(analyse(other)) == signature(spaces)
    results.add(f"{case.name}: same spaces with names replaced by hashes", float(same), "", ">= 1")
    spell(results, case, wide, spaces)
    scales, shifts = len(spaces.scales.free_roots()), len(spaces.shifts.free_roots())
    results.add(f"{case.name}: spaces", len(spaces.spaces), "")
    return (
        f"| {case.name} | {description(spaces)} | {gains}/{total} | {scales} | {shifts} | {error:.0e} | "
        f"{forbids(spaces)} |"
    )


def programs(case: ModelCase) -> Iterator[tuple[str, Program]]:
    """The model in other spellings, in float64."""
    for name, spelling in SPELLINGS.items():
        wanted = name == "all" or case.name in SPELLED
        if wanted and (name != "separate" or case.name in ("gpt2", "mpt")):
            yield name, widened(spelling.program(case))
    if case.name in SPELLED:
        eager = registry.get(case.name, attention="eager")
        captured = capture(eager.module, eager.args, dynamic_shapes=eager.dynamic_shapes)
        yield "eager", widened(canonicalize(captured).program)


def spell(results: Results, case: ModelCase, plain: Program, spaces: Spaces) -> None:
    """Whether other spellings have the same spaces, and the largest error of random folds in them."""
    expected, wanted = plain.run_float64(), outline(spaces)
    errors, others = [], []
    for name, program in programs(case):
        ready, _, _ = prepared(program)
        if outline(analyse(ready)) != wanted:
            others.append(name)
        errors.append(relative_error(expected, folded(ready, torch.Generator().manual_seed(0)).run_float64()))
    count = len(errors)
    same = f"{case.name}: spellings of {count} with the same spaces"
    results.add(same, count - len(others), "", f">= {count}")
    results.add(f"{case.name}: relative error, float64, worst spelling", max(errors), "", BAR["float64"])
    if others:
        results.note(f"{case.name}: other spaces in {', '.join(others)}")


def analysis_time(results: Results) -> None:
    """A decoder of 32 layers: its graph is what the analysis reads, its widths do not matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from isofold.models.decoder import causal_language_model

    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    case = causal_language_model("llama, 32 layers", LlamaForCausalLM, config, "sdpa", 0)
    program = canonicalize(capture(case.module, case.args, dynamic_shapes=case.dynamic_shapes)).program
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        analyse(program)
        seconds.append(time.perf_counter() - started)
    results.sampled(
        f"analysis of 32 decoder layers, {program.operator_count} operators", seconds, "s", "<= 10"
    )


def fold_billion(rotation: str) -> None:
    """In a process of its own: prints seconds, peak bytes and bytes of the weights as JSON.

    rotation: `hadamard` runs the folds of the preset w4a8-rotate as the driver does, each verified in float64; `dense`
    folds gains and turns the residual stream by a random orthogonal matrix, which has no structure to use.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from isofold.models.decoder import causal_language_model

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    case = causal_language_model("llama 1B", LlamaForCausalLM, config, "sdpa", 0)
    program = canonicalize(capture(case.module, case.args, dynamic_shapes=case.dynamic_shapes)).program
    del case
    gc.collect()
    weights = program.weight_bytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if rotation == "hadamard":
        steps = fold_steps(PRESETS["w4a8-rotate"], None)
    else:
        matrix = random_orthogonal(config.hidden_size, torch.Generator().manual_seed(0))
        steps = [Step(fold_norm_affine), Step(TurnStream(matrix))]
    started, spent = time.perf_counter(), time.process_time()
    _, reports = run_steps(program, steps, consume=True)
    found = {
        "seconds": time.perf_counter() - started,
        "processor": time.process_time() - spent,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "weights": weights,
        "before": before,
        "error": max(report.error or 0.0 for report in reports),
        "turned": sum(len(report.applied) for report in reports if report.name == "fold_rotation"),
    }
    print(json.dumps(found))


class TurnStream:
    """`fold_rotation` of the widest orthogonal space by a given matrix, as a step of the driver."""

    name = "fold_rotation"

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def __call__(self, program: Program, **options: Any) -> PassResult:
        """Find the space and turn it."""
        spaces = [s for s in analyse(program).spaces if s.group == Group.ORTHOGONAL]
        stream = max(spaces, key=lambda space: space.size)
        return fold_rotation(program, rotations={stream.name: self.matrix})


def billion(results: Results, rotation: str) -> None:
    """Seconds and memory of folding a model of a billion parameters."""
    command = [sys.executable, str(HERE / "spaces.py"), "--billion", rotation]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    what = {"hadamard": "all folds of w4a8-rotate", "dense": "a dense rotation of the stream"}[rotation]
    if done.returncode != 0:
        results.add(f"{what}, a billion parameters", None, "s", "<= 180")
        results.note(
            f"the process that folds a billion parameters ended with {done.returncode}: {done.stderr[-300:]}"
        )
        return
    found = json.loads(done.stdout.strip().splitlines()[-1])
    title = f"{what}, {number(found['weights'] / 4e9)} billion parameters"
    results.add(f"{title}: verified folding", found["seconds"], "s", "<= 180")
    results.add(f"{title}: processor time", found["processor"], "s")
    results.add(
        f"{title}: peak memory over the weights' bytes", found["peak"] / found["weights"], "x", "<= 2"
    )
    results.add(f"{title}: largest relative error of a fold", found["error"], "", "<= 2e-5")
    results.note(
        f"{what}: peak of the whole process {found['peak'] / 2**30:.2f} GiB, weights "
        f"{found['weights'] / 2**30:.2f} GiB, peak before folding (model made and captured) "
        f"{found['before'] / 2**30:.2f} GiB"
    )


def write_table(page: Path, lines: list[str]) -> None:
    """Replace what stands between the markers of a page."""
    text = page.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    header = [
        "| model | spaces | gains folded | free scales | free shifts | error | what forbids more |",
        "|---|---|---|---|---|---|---|",
    ]
    beside = page.with_name(page.name + ".tmp")
    beside.write_text(head + "\n".join([BEGIN, *header, *lines, END]) + tail)
    beside.replace(page)


def body() -> int:
    """All models; one that fails is a row without a value and a note with its error."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--model", action="append", choices=registry.names(), help="only this one (repeatable)"
        )
        parser.add_argument("--docs", metavar="FILE", help="rewrite the table of this page")
        parser.add_argument("--billion", choices=("hadamard", "dense"), help=argparse.SUPPRESS)

    arguments = parse(__doc__, extra)
    if arguments.billion:
        fold_billion(arguments.billion)
        return 0
    results = Results("spaces")
    chosen = arguments.model or (QUICK if arguments.quick else registry.names())
    lines = []
    with Progress(transient=True) as progress:
        task = progress.add_task("models", total=len(chosen))
        for name in chosen:
            progress.update(task, description=name)
            try:
                lines.append(cover(results, registry.get(name)))
            # Whatever stops one model is its result; the others still count.
            except Exception as error:
                results.add(f"{name}: failed", None, "", BAR["float64"])
                results.note(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
            progress.advance(task)
    analysis_time(results)
    if not arguments.quick and not arguments.model:
        billion(results, "hadamard")
        billion(results, "dense")
    if arguments.docs:
        write_table(Path(arguments.docs), lines)
    met = [row["holds"] for row in results.rows if row["bar"]]
    results.add(f"bars met, of {number(len(met))}", sum(met), "")
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
