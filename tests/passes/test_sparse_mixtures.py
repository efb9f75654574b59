"""Mixtures: blocks in one layout and the values beside them in another are the matrix, chosen where they pay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import isofold
from isofold.compiler.capture import capture
from isofold.compiler.dialect.sparse_blocks import BLOCKS
from isofold.compiler.dialect.sparse_groups import GROUPS
from isofold.compiler.dialect.sparse_layouts import HELD
from isofold.compiler.dialect.sparse_packing import pack_sparse, unpack_sparse
from isofold.compiler.driver import run_steps
from isofold.compiler.graph import argument
from isofold.compiler.html_report import render_html
from isofold.compiler.passes import PassReport
from isofold.compiler.program import Program
from isofold.compiler.recipe import PRESETS, Recipe, Sparsity
from isofold.passes.pipeline import plan
from isofold.passes.sparse_candidates import Candidate, Rest, candidates
from isofold.passes.sparse_mixtures import SHARES, fastest_mixture, split, ways_to_store
from isofold.runtimes.onnx.export import export_onnx
from isofold.runtimes.onnx.oplib.build import library_path
from isofold.runtimes.onnx.session import open_session

pytestmark = pytest.mark.usefixtures("wide_rates")
OPS: Any = torch.ops.isofold
RECIPES = {"int8": "sparse-int8", "float32": "sparse-float32"}
DENSE = {"int8": "w8a8", "float32": "float32"}
PARTITIONS = [
    (layout, share, rest)
    for layout in (*BLOCKS, *GROUPS)
    for share in (SHARES if "x" in layout else (0.0,))
    for rest in ("bitmask", "windows")
    if set(HELD[layout]) & set(HELD[rest])
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixed(n: int, k: int, layout: str, blocks: float = 0.2, beside: float = 0.02) -> Tensor:
    """Normal values in blocks of a layout, and a few anywhere."""
    g = torch.Generator().manual_seed(n + k)
    if ":" in layout:
        some, of = map(int, layout.split(":"))
        there = (torch.rand(n, -(-k // of), of, generator=g).argsort(-1) < some).flatten(1)[:, :k]
    else:
        height, width = map(int, layout.split("x"))
        grid = torch.rand(-(-n // height), -(-k // width), generator=g) < blocks
        there = grid.repeat_interleave(height, 0).repeat_interleave(width, 1)[:n, :k]
    return random(n, k) * (there | (torch.rand(n, k, generator=g) < beside))


def codes(matrix: Tensor) -> Tensor:
    made = (matrix * 40).round().clamp(-127, 127).to(torch.int8)
    return made + ((made == 0) & (matrix != 0)).to(torch.int8)


def model_of(matrix: Tensor, *behind: nn.Module) -> nn.Module:
    linear = nn.Linear(matrix.shape[1], matrix.shape[0])
    with torch.no_grad():
        linear.weight.copy_(matrix)
        linear.bias.copy_(random(matrix.shape[0], seed=2))
    return nn.Sequential(linear, *behind).eval()


def compiled(model: nn.Module, recipe: Recipe, x: Tensor) -> tuple[Program, PassReport]:
    program = capture(model, (x,), None, None)
    after, reports = run_steps(program, plan(program, recipe))
    return after, next((r for r in reports if r.name == "extract_sparsity"), reports[-1])


def forced(kind: str) -> Recipe:
    asked = Sparsity(layout="mixture", gain=1e-3)
    return PRESETS[RECIPES[kind]].model_copy(update={"sparsity": asked})


@pytest.mark.parametrize(("layout", "share", "rest"), PARTITIONS)
@pytest.mark.parametrize(("n", "k"), [(16, 64), (37, 259), (1, 5), (50, 512)])
def test_the_parts_are_the_matrix_and_share_no_place(
    layout: str, share: float, rest: str, n: int, k: int
) -> None:
    floats = "float32" in HELD[layout]
    matrix = mixed(n, k, layout, beside=0.1)
    matrix = matrix if floats else codes(matrix)
    chosen = Candidate(layout, "float32" if floats else "int8", 1, 1, 1.0, Rest(rest, 1, share, 0.0))
    blocks, beside = split(matrix, chosen)
    assert not bool(((blocks != 0) & (beside != 0)).any())
    decoded = []
    for part, name in ((blocks, layout), (beside, rest)):
        packed = pack_sparse(part, name)
        decoded.append(unpack_sparse(name, packed.places, packed.values, packed.offsets, n, k))
        assert torch.equal(decoded[-1], part)
    assert torch.equal(decoded[0] + decoded[1], matrix)


@pytest.mark.parametrize("layout", ["16x4", "1x4", "16x1", "1:4", "2:4"])
@pytest.mark.parametrize("n", [64, 71])
def test_the_prediction_counts_what_is_stored(layout: str, n: int) -> None:
    matrix = mixed(n, 256, layout)
    value = "float32" if layout == "16x1" else "int8"
    matrix = matrix if value == "float32" else codes(matrix)
    found = fastest_mixture(matrix, value, 128)
    assert found is not None
    assert found.rest is not None
    parts = [
        pack_sparse(p, name) for p, name in zip(split(matrix, found), found.name.split(" + "), strict=True)
    ]
    assert parts[1].stored == found.rest.stored
    # A last panel that is not full is counted whole.
    assert parts[0].stored == pytest.approx(found.stored - found.rest.stored, abs=0 if n == 64 else 15 * 256)
    sizes = sum(part.nbytes for part in parts)
    assert found.size == pytest.approx(sizes, rel=0.3)


@pytest.mark.parametrize(("kind", "layout"), [("int8", "16x4"), ("float32", "16x1")])
def test_found_where_it_pays_and_not_in_scattered_zeros(kind: str, layout: str) -> None:
    matrix, x = mixed(1024, 1024, layout), random(128, 1024)
    after, report = compiled(model_of(matrix), PRESETS[RECIPES[kind]], x)
    (entry,) = report.applied
    rest = "windows" if kind == "int8" else "bitmask"
    assert entry.facts["layout"] == f"{layout} + {rest}"
    assert f"stored as {layout} + {rest} of {kind}" in entry.what
    assert min(entry.facts["candidates"], key=entry.facts["candidates"].get) == f"{layout} + {rest} {kind}"
    assert entry.facts["stored"] < entry.facts["break_even"] < 1
    assert entry.facts["saved_bytes"] == entry.facts["dense_bytes"] - entry.facts["sparse_bytes"] > 0
    first, second = (n for n in after.graph.nodes if "linear_sparse" in str(n.target))
    assert argument(second, "residual") is first
    assert (argument(first, "layout"), argument(second, "layout")) == (rest, layout)
    dense, _ = compiled(model_of(matrix), PRESETS[DENSE[kind]], x)
    assert torch.allclose(after(x), dense(x), rtol=1e-5, atol=1e-3)
    scattered = random(1024, 1024) * (random(1024, 1024, seed=1) > 0.84)
    _, report = compiled(model_of(scattered), PRESETS[RECIPES[kind]], x)
    assert "+" not in report.applied[0].facts["layout"]
    assert any("+" in name for name in report.applied[0].facts["candidates"])


class Behind(nn.Module):
    """A linear with an activation and a residual behind it."""

    def __init__(self, matrix: Tensor, activation: Callable[[Tensor], Tensor] | None, residual: bool) -> None:
        super().__init__()
        self.linear = model_of(matrix)
        self.activation, self.residual = activation, residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y = y if self.activation is None else self.activation(y)
        return x + y if self.residual else y


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, F.relu, F.gelu, gelu_tanh, F.silu])
def test_what_stands_behind_stays_behind_the_sum(
    kind: str, residual: bool, activation: Callable[[Tensor], Tensor] | None
) -> None:
    matrix, x = mixed(70, 70, "16x4" if kind == "int8" else "16x1", beside=0.05), random(3, 70)
    model = Behind(matrix, activation, residual).eval()
    after, report = compiled(model, forced(kind), x)
    assert "+" in report.applied[0].facts["layout"]
    assert report.error is not None
    assert report.error < 1e-6
    dense, _ = compiled(model, PRESETS[DENSE[kind]], x)
    assert torch.allclose(after(x), dense(x), atol=1e-5)


def test_two_readers_of_a_weight_share_its_parts() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = model_of(mixed(96, 96, "16x1"))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x).tanh())

    after, _ = compiled(Twice().eval(), forced("float32"), random(2, 96))
    values = [argument(n, "values") for n in after.graph.nodes if "linear_sparse" in str(n.target)]
    assert len(values) == 4
    assert len(set(values)) == 2


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("rows", [1, 40])
def test_an_artefact_runs_with_and_without_the_library(kind: str, rows: int, tmp_path: Path) -> None:
    matrix = mixed(200, 300, "16x4" if kind == "int8" else "16x1")
    model, x = model_of(matrix, nn.GELU()), random(rows, 300)
    after, report = compiled(model, forced(kind), x)
    assert "+" in report.applied[0].facts["layout"]
    path = tmp_path / "model.onnx"
    export_onnx(after, path, "weights.bin")
    expected = after(x).detach().numpy()
    for library in (None, library_path()):
        found = open_session(path, library=library).run(None, {"input_1": x.numpy()})[0]
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5


def test_the_report_says_mixture() -> None:
    made = isofold.compile(
        model_of(mixed(256, 512, "16x4")), (random(32, 512),), recipe=forced("int8"), measure=False
    )
    (row,) = made.report["sparsity"]
    assert row["layout"].startswith("16x4 + ")
    assert f"<td>{row['layout']}, int8</td>" in render_html(made.report)


class Gated(nn.Module):
    """A gated pair, whose two linears become one."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.gate, self.up = model_of(matrix), model_of(matrix.flip(0))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)


@pytest.mark.parametrize(
    ("model", "preset", "reason"),
    [
        (Gated(mixed(128, 256, "16x4")), "sparse-int8", "gated linears have no mixtures"),
        (model_of(mixed(128, 256, "16x4")), "sparse-int4", "no layout holds a part of it"),
        (model_of(mixed(128, 256, "16x1", beside=0)), "sparse-float32", "one layout holds all of it"),
    ],
)
def test_refusals(model: nn.Module, preset: str, reason: str) -> None:
    recipe = PRESETS[preset].model_copy(update={"sparsity": Sparsity(layout="mixture", gain=1e-3)})
    _, report = compiled(model.eval(), recipe, random(4, 256))
    assert not report.applied
    assert report.refused
    assert all(reason in entry.reason for entry in report.refused)


def test_ways_of_a_recipe() -> None:
    matrix = codes(mixed(64, 128, "16x4"))
    (only,) = ways_to_store(matrix, "int8", 8, "mixture")
    assert only.rest is not None
    assert ways_to_store(matrix, "int8", 8, "16x4") == candidates(matrix, "int8", 8, "16x4")
    assert all(way.rest is None for way in ways_to_store(matrix, "int8", 8, more_passes=-1))
    slower = fastest_mixture(matrix, "int8", 8, more_passes=1)
    assert slower is not None
    assert slower.nanoseconds > only.nanoseconds
