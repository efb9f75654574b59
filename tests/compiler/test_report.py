"""The report: rows and groups are what the passes did, times land on their layers, the page is whole and offline."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isofold.compiler.block_graph import block_graph
from isofold.compiler.capture import capture
from isofold.compiler.decoded_weights import decoded
from isofold.compiler.errors import ArtefactError
from isofold.compiler.frontend import prepare, report_of
from isofold.compiler.html_report import format_bytes, render_html, write_html
from isofold.compiler.report import FOLDS, add_profile, packed_bytes, packed_nodes, refused_groups
from isofold.compiler.svg import graph_svg, histogram_svg
from isofold.compiler.weight_histograms import BINS, weight_inside


class Block(nn.Module):
    """Attention with two heads: q, k and v read one value, so they may become one linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Residual block."""
        y = self.norm(x)
        q, k, v = (linear(y).unflatten(-1, (2, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Embedding, three alike blocks, head; and a weight too small to pack."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(Block(64) for _ in range(3))
        self.final = nn.LayerNorm(64)
        self.tiny = nn.Linear(64, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 `[batch, sequence]`."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.tiny(self.final(x))


@pytest.fixture(scope="module")
def lowered() -> Any:
    """Net through the passes of w4a8."""
    torch.manual_seed(0)
    return prepare(Net(), (torch.randint(0, 100, (2, 8)),), recipe="w4a8")


@pytest.fixture(scope="module")
def report(lowered: Any) -> dict[str, Any]:
    """Its report."""
    return report_of(lowered, "cpu")


def test_the_report_is_json(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report


def test_every_quantized_weight_has_a_row(report: dict[str, Any]) -> None:
    linears = {f"layers.{i}.{name}" for i in range(3) for name in ("q", "k", "v", "out")}
    assert {row["module"] for row in report["layers"]} >= linears | {"embed"}
    for row in report["layers"]:
        assert row["weight"] == f"{row['module']}.weight"
        assert row["bytes_before"] == 4 * row["shape"][0] * row["shape"][1]
        assert 0 < row["error"] < 0.2
        assert "test_report.py" in row["source"]


def test_rows_point_at_the_nodes_that_compute_them(lowered: Any, report: dict[str, Any]) -> None:
    names = {node.name for node in packed_nodes(lowered.program)}
    assert {row["packed"] for row in report["layers"]} == names


def test_bytes_of_rows_sum_to_those_of_the_packed_constants(lowered: Any, report: dict[str, Any]) -> None:
    total = sum(packed_bytes(lowered.program, node) for node in packed_nodes(lowered.program))
    assert sum(row["bytes_after"] for row in report["layers"]) == pytest.approx(
        total, abs=len(report["layers"])
    )


def test_merged_layers_share_their_node_by_rows(report: dict[str, Any]) -> None:
    by_node: dict[str, list[float]] = {}
    for row in report["layers"]:
        by_node.setdefault(row["packed"], []).append(row["share"])
    assert any(len(shares) == 3 for shares in by_node.values()), (
        "q, k and v were not merged: the test shows nothing"
    )
    for shares in by_node.values():
        assert sum(shares) == pytest.approx(1.0)


def test_refusals_are_grouped_by_reason() -> None:
    def place(module: str, reason: str) -> dict[str, Any]:
        return {"module": module, "node": "n", "source": None, "reason": reason}

    records = [
        {"pass": "a", "refused": [place("x", "small")]},
        {"pass": "b", "refused": [place("x", "odd"), place("y", "odd"), place("z", "small")]},
    ]
    groups = refused_groups(records)
    assert [(g["pass"], g["reason"], [p["module"] for p in g["places"]]) for g in groups] == [
        ("b", "odd", ["x", "y"]),
        ("a", "small", ["x"]),
        ("b", "small", ["z"]),
    ]


def test_what_stayed_float_is_in_the_report_with_its_reason(report: dict[str, Any]) -> None:
    reasons = [g["reason"] for g in report["refused"] for p in g["places"] if p["module"] == "tiny"]
    assert any("too small" in reason for reason in reasons)


def test_times_go_to_layers_by_their_share(report: dict[str, Any]) -> None:
    timed = json.loads(json.dumps(report))
    nodes = sorted({row["packed"] for row in timed["layers"]})
    profile = [{"name": name, "op": "PackedLinear", "microseconds": 30.0} for name in nodes]
    add_profile(timed, [*profile, {"name": "other", "op": "Add", "microseconds": 5.0}])
    assert sum(row["microseconds"] for row in timed["layers"]) == pytest.approx(30.0 * len(nodes))
    assert timed["profile"]["total_microseconds"] == 30.0 * len(nodes) + 5.0
    assert [entry["op"] for entry in timed["profile"]["by_type"]] == ["PackedLinear", "Add"]


def test_a_layer_whose_node_did_not_run_has_no_time(report: dict[str, Any]) -> None:
    timed = json.loads(json.dumps(report))
    add_profile(timed, [])
    assert all(row["microseconds"] is None for row in timed["layers"])
    render_html(timed)


def test_histograms_count_every_weight(lowered: Any, report: dict[str, Any]) -> None:
    assert 0 < len(report["histograms"]) <= 6
    errors = [entry["error"] for entry in report["histograms"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == max(row["error"] for row in report["layers"])
    for entry in report["histograms"]:
        weight = lowered.captured.tensors[f"{entry['module']}.weight"]
        assert len(entry["before"]) == len(entry["after"]) == BINS
        assert sum(entry["before"]) == sum(entry["after"]) == weight.numel()


def test_decoded_weights_are_the_captured_ones_within_their_error(
    lowered: Any, report: dict[str, Any]
) -> None:
    nodes = {node.name: node for node in packed_nodes(lowered.program)}
    for row in report["layers"]:
        weight = lowered.captured.tensors[row["weight"]].detach()
        found = weight_inside(decoded(lowered.program, nodes[row["packed"]]), weight)
        assert found is not None
        error = float((found - weight).square().mean().sqrt() / weight.square().mean().sqrt())
        assert error == pytest.approx(row["error"], rel=1e-3)


def test_a_weight_that_is_not_there_is_not_found() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, weight = torch.randn(64, 32, generator=generator), torch.randn(16, 32, generator=generator)
    assert weight_inside(matrix, weight) is None
    assert weight_inside(matrix[:8], weight) is None
    found = weight_inside(matrix, matrix[20:36])
    assert found is not None
    assert torch.equal(found, matrix[20:36])


def test_alike_blocks_are_drawn_once_and_containers_split(lowered: Any) -> None:
    graph = block_graph(lowered.captured, lowered.captured)
    blocks = {node["id"]: node for node in graph["nodes"]}
    assert blocks["layers.0"]["count"] == 3
    assert blocks["layers.0"]["modules"] == ["layers.0", "layers.1", "layers.2"]
    assert ["embed", "layers.0"] in graph["edges"]
    assert ["layers.0", "final"] in graph["edges"]
    assert ["tiny", "output"] in graph["edges"]
    counted = sum(node["operators_after"] for node in graph["nodes"])
    assert counted == lowered.captured.operator_count


def test_the_detail_shows_the_operators_of_one_block(lowered: Any, report: dict[str, Any]) -> None:
    detail = report["blocks"]["detail"]
    assert re.fullmatch(r"layers\.\d", detail["title"])
    labels = [node["label"] for node in detail["nodes"]]
    assert "linear_packed" in labels
    assert {node["kind"] for node in detail["nodes"]} >= {"packed", "dialect", "outside"}
    ids = {node["id"] for node in detail["nodes"]}
    assert all(a in ids and b in ids for a, b in detail["edges"])


def test_a_module_that_runs_before_and_after_its_children_is_two_blocks() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layers[0](x * 2))

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = Outer()

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(x)

    program = capture(Root(), (torch.randn(2, 4),))
    edges = block_graph(program, program)["edges"]
    assert ["outer", "outer.layers.0"] in edges
    assert ["outer.layers.0", "outer (end)"] in edges


class _Page(HTMLParser):
    """Collects what would leave the page, and checks that tags close."""

    VOID = frozenset({"meta", "br", "input", "link", "img", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [v for k, v in attrs if k in ("src", "href", "action") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_from_outside(report: dict[str, Any]) -> None:
    html = render_html(report)
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert page.outside == []
    assert "http" not in html.replace("http://www.w3.org", "")
    assert len(html) < 400_000
    for heading in (
        "Layers",
        "The model, block by block",
        "What ran",
        "What was left alone, and why",
        "Recipe",
    ):
        assert f"<h2>{heading}</h2>" in html
    assert html.count('<svg class="histogram"') == len(report["histograms"])
    assert html.count('<svg class="graph"') == 2


def test_text_of_users_is_escaped(report: dict[str, Any]) -> None:
    hostile = json.loads(json.dumps(report))
    hostile["layers"][0]["module"] = "a<script>alert(1)</script>"
    hostile["blocks"]["nodes"][0]["label"] = "<b>x</b>"
    place = {"module": "", "node": "n", "source": "x.py:1: a < b"}
    hostile["refused"].append({"pass": "p", "reason": "<i>", "places": [place]})
    html = render_html(hostile)
    assert "<script>alert" not in html
    assert "<b>x</b>" not in html
    assert "a &lt; b" in html


def test_a_recipe_that_quantizes_nothing_has_a_page() -> None:
    lowered = prepare(nn.Linear(8, 8), (torch.randn(2, 8),), recipe="float32")
    assert "The recipe quantized nothing." in render_html(report_of(lowered, "cpu"))


def test_the_page_is_written_whole_or_not_at_all(report: dict[str, Any], tmp_path: Path) -> None:
    assert write_html(report, tmp_path / "page.html").read_text() == render_html(report)
    with pytest.raises(ArtefactError, match="The output cannot be written"):
        write_html(report, tmp_path / "missing" / "page.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ArtefactError):
        write_html(report, tmp_path / "folder.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.html", "page.html"]


def test_the_drawing_puts_sources_above_and_survives_cycles() -> None:
    nodes = [{"id": name, "title": name, "kind": "block"} for name in "abcd"]
    svg = graph_svg(nodes, [["b", "a"], ["a", "c"], ["c", "d"], ["d", "c"]])
    texts = re.findall(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="middle">(\w)<', svg)
    heights = {title: float(y) for y, title in texts}
    assert heights["b"] < heights["a"] < heights["c"] < heights["d"]
    assert svg.count('class="edge"') == 4


def test_histogram_of_nothing_still_draws() -> None:
    assert "<svg" in histogram_svg(0.0, 0.0, [0] * 4, [0] * 4)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.54 kB")),
        *((999_600, "1000 kB"), (2.5e9, "2.5 GB"), (None, "-")),
    ],
)
def test_bytes_read_well(size: float | None, text: str) -> None:
    assert format_bytes(size) == text


@pytest.fixture(scope="module")
def folded() -> dict[str, Any]:
    """The report of Net through a recipe that turns, with online transforms."""
    torch.manual_seed(0)
    prepared = prepare(Net(), (torch.randint(0, 100, (2, 8)),), recipe="w4a8-rotate")
    return report_of(prepared, "cpu")


def test_a_fold_brings_the_spaces_of_the_canonical_program(folded: dict[str, Any]) -> None:
    assert json.loads(json.dumps(folded)) == folded
    spaces = folded["spaces"]
    assert spaces["summary"]["spaces"] == len(spaces["spaces"])
    assert spaces["summary"]["foldable"] == spaces["summary"]["gains"] == 4
    stream = spaces["spaces"][0]
    assert (stream["channels"], stream["group"]) == (64, "orthogonal that keeps the ones")
    assert "layer_norm" in stream["bound"]["why"]
    assert "test_report.py" in stream["bound"]["source"]
    assert {"general", "permutations"} <= {space["group"] for space in spaces["spaces"]}


def test_every_fold_has_a_row_with_its_error(folded: dict[str, Any]) -> None:
    rows = {row["pass"]: row for row in folded["folds"]}
    assert list(rows) == [name for name in FOLDS if name in rows]
    assert {"fold_norm_affine", "center_norms", "fold_rotation", "place_hadamards"} <= set(rows)
    assert len(rows["center_norms"]["applied"]) == 4
    for row in rows.values():
        assert row["guarantee"] in ("real", "bitwise")
        assert (row["error"] is None) == (not row["applied"])
        assert (row["error"] or 0) < 2e-5
        assert all(group["reason"] and group["places"] for group in row["refused"])


def test_the_page_shows_spaces_and_folds(folded: dict[str, Any]) -> None:
    page = render_html(folded)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page))
    assert "Channel spaces" in text
    assert "4 of 4 gains fold" in text
    assert "orthogonal that keeps the ones" in text
    for row in folded["folds"]:
        for group in row["refused"]:
            assert f"{row['pass']}: left alone" in text, group
    assert text.count("center_norms: applied") == 1


def test_times_land_on_the_transforms_at_run_time() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.gate(x)) * self.up(x))

    torch.manual_seed(0)
    prepared = prepare(Gated(), (torch.randn(2, 8, 64),), recipe="w4a8-rotate", verify=False)
    report = report_of(prepared, "cpu")
    rows = report["hadamards"]
    assert rows
    assert all(row["microseconds"] is None and row["orders"] for row in rows)
    add_profile(report, [{"name": row["node"], "op": "X", "microseconds": 7.0} for row in rows])
    assert all(row["microseconds"] == 7.0 for row in rows)
    text = re.sub(r"<[^>]*>", "", render_html(report))
    assert "Hadamard transforms at run time" in text
    assert "7 µs" in text


def test_a_recipe_without_folds_has_no_section(report: dict[str, Any]) -> None:
    assert report["spaces"] is None
    assert report["folds"] == []
    assert report["hadamards"] == []
    page = render_html(report)
    assert "Channel spaces" not in page
    assert ">Folds<" not in page
