"""Programs as ONNX files: names, dynamic shapes, layout of the data file, determinism, failures."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from isofold.compiler.capture import capture
from isofold.compiler.differences import relative_difference
from isofold.compiler.errors import ArtefactError, InputError, UnsupportedError, VerificationError
from isofold.compiler.program import Program
from isofold.runtimes.onnx import check, export, translate
from isofold.runtimes.onnx.export import export_onnx

from .operator_cases import _Random, packed


class Packed(nn.Module):
    """Two packed linears of different signature and a float one, with a structured result."""

    def __init__(self) -> None:
        super().__init__()
        random = _Random(0)
        for name, (rows, columns, bits) in {"a": (300, 256, 4), "b": (40, 300, 8)}.items():
            matrix = packed(random, rows, columns, bits, 32, zero=False)
            for part in ("weight", "scale", "wsum"):
                self.register_buffer(f"{name}_{part}", getattr(matrix, part))
            setattr(self, f"{name}_multiplier", matrix.scale_multiplier)
        self.bias = nn.Parameter(random.normal(300))
        torch.manual_seed(0)
        self.head = nn.Linear(40, 3)

    def forward(self, x: Tensor, *, shift: Tensor) -> dict[str, Any]:
        call = torch.ops.isofold
        u, params = call.quantize_activation(x, None, 32)
        wide = call.linear_packed(
            u, params, self.a_weight, self.a_scale, None, self.a_wsum, self.bias, None,
            300, 256, 4, 32, self.a_multiplier, "relu", False,
        )  # fmt: skip
        narrow = call.linear_packed_float(
            wide,
            self.b_weight,
            self.b_scale,
            None,
            None,
            None,
            40,
            300,
            8,
            32,
            self.b_multiplier,
            "none",
            False,
        )
        return {
            "x": x,
            "pair": (self.head(narrow) + shift, [narrow, None]),
            "count": x.shape[0],
            "again": narrow,
        }


def program_of_packed() -> Program:
    batch = Dim("batch", min=1, max=64)
    arguments = (_Random(1).normal(4, 256),)
    return capture(Packed().eval(), arguments, {"shift": torch.ones(3)}, {"x": {0: batch}, "shift": None})


@pytest.fixture(scope="module")
def packed_program() -> Program:
    return program_of_packed()


@pytest.fixture(scope="module")
def exported(packed_program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    export_onnx(packed_program, path, "weights.bin")
    return path


def test_file_passes_the_checker_and_names_everything(exported: Path) -> None:
    onnx.checker.check_model(str(exported), full_check=True)
    graph = onnx.load(exported, load_external_data=False).graph
    assert [i.name for i in graph.input] == ["x", "shift"]
    assert [o.name for o in graph.output] == ["x_out", "pair_0", "pair_1_0", "count", "again"]
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == ["batch", 256]
    typed = {v.name for v in (*graph.value_info, *graph.output)}
    assert {name for node in graph.node for name in node.output} <= typed


def test_types_of_initializers_are_written_once(exported: Path) -> None:
    graph = onnx.load(str(exported), load_external_data=False).graph
    assert graph.initializer
    assert graph.value_info
    assert {t.name for t in graph.initializer}.isdisjoint(v.name for v in graph.value_info)


def test_dialect_nodes_keep_the_names_of_the_program(exported: Path, packed_program: Program) -> None:
    graph = onnx.load(exported, load_external_data=False).graph
    ours = {node.name for node in graph.node if node.domain == "ai.isofold"}
    assert ours == {n.name for n in packed_program.graph.nodes if str(n.target).startswith("isofold.")}


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("native", [False, True])
def test_results_are_the_programs(
    exported: Path, packed_program: Program, batch: int, native: bool, library: str
) -> None:
    options = onnxruntime.SessionOptions()
    if native:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(str(exported), options, providers=["CPUExecutionProvider"])
    x = _Random(2).normal(batch, 256)
    got = session.run(None, {"x": x.numpy(), "shift": np.ones(3, np.float32)})
    with torch.no_grad():
        want = packed_program(x, shift=torch.ones(3))
    flat = [want["x"], want["pair"][0], want["pair"][1][0], np.array(want["count"]), want["again"]]
    assert relative_difference([np.asarray(w) for w in flat], got) < 1e-3


def test_numbers_minus_tensors_keep_their_types(tmp_path: Path) -> None:
    class Minus(nn.Module):
        def forward(self, mask: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            return 1.0 - mask, 3 - mask, torch.rsub(x, 3, alpha=2), torch.rsub(mask, 0.5, alpha=4)

    given = (torch.tensor([[1, 0], [7, 1]]), torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))
    export_onnx(capture(Minus(), given), tmp_path / "m.onnx", "m.data")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    feeds = dict(zip([i.name for i in session.get_inputs()], (t.numpy() for t in given), strict=True))
    for found, wanted in zip(session.run(None, feeds), Minus()(*given), strict=True):
        assert torch.from_numpy(found).dtype == wanted.dtype
        assert torch.equal(torch.from_numpy(found), wanted)


def _run(model: nn.Module, x: Tensor, folder: Path) -> list[Tensor]:
    export_onnx(capture(model, (x,)), folder / "m.onnx", "m.data")
    session = onnxruntime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    return [torch.from_numpy(r) for r in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def test_small_constants_are_kept(tmp_path: Path) -> None:
    class Small(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x / (x.abs() + 1e-12), x * 1.000001, x - 1e-9

    x = torch.tensor([0.0, 0.0, 1.0, 3.0])
    for found, wanted in zip(_run(Small(), x, tmp_path), Small()(x), strict=True):
        assert torch.equal(found, wanted)


def test_repetition_and_products_of_prefixes(tmp_path: Path) -> None:
    class Repeated(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (
                x.repeat_interleave(3, 1),
                x.repeat_interleave(2),
                x.repeat_interleave(2, -1),
                x.cumprod(-1),
            )

    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    for found, wanted in zip(_run(Repeated(), x, tmp_path), Repeated()(x), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_projected_lstm_is_written_out(tmp_path: Path) -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 8, proj_size=3, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y, (hidden, cell) = self.lstm(x)
            return y, hidden, cell

    model, x = Projected(), torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for found, wanted in zip(_run(model, x, tmp_path), model(x), strict=True):
            torch.testing.assert_close(found, wanted)


def test_results_that_are_constants_are_left_to_the_structure(tmp_path: Path) -> None:
    class Constants(nn.Module):
        def forward(self, x: Tensor) -> tuple[Any, ...]:
            return 5, x + 1, "text", x.shape[0], None

    x = torch.randn(2, 3)
    (found,) = _run(Constants(), x, tmp_path)
    assert torch.equal(found, x + 1)


def test_large_tensors_are_aligned_and_hold_the_packed_bytes(exported: Path, packed_program: Program) -> None:
    data = exported.with_name("weights.bin").read_bytes()
    external = {
        t.name: {e.key: e.value for e in t.external_data}
        for t in onnx.load(exported, load_external_data=False).graph.initializer
        if t.external_data
    }
    for name in ("a_weight", "b_weight"):
        where = external[name]
        offset, length = int(where["offset"]), int(where["length"])
        assert where["location"] == "weights.bin"
        assert offset % 64 == 0
        tensor = packed_program.parameters[name]
        assert data[offset : offset + length] == tensor.numpy().tobytes()
    sizes = {name: packed_program.parameters[name].numel() for name in ("a_weight", "b_weight")}
    assert sizes["a_weight"] < export._PAGED_FROM  # aligned to a cache line; the page case is below


def test_tensors_of_many_pages_start_at_a_page(tmp_path: Path) -> None:
    program = capture(nn.Embedding(500, 64), (torch.tensor([1]),))
    export_onnx(program, tmp_path / "m.onnx", "m.data")
    tensors = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer
    offsets = [int(e.value) for t in tensors for e in t.external_data if e.key == "offset"]
    assert offsets
    assert all(offset % 4096 == 0 for offset in offsets)


def test_same_program_gives_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    export_onnx(program_of_packed(), tmp_path / "model.onnx", "weights.bin")
    for name in ("model.onnx", "weights.bin"):
        assert (tmp_path / name).read_bytes() == exported.with_name(name).read_bytes()


def test_operators_without_translation_are_listed_with_their_place(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(x) + torch.special.bessel_j0(x)[0]

    with pytest.raises(UnsupportedError) as caught:
        export_onnx(capture(Odd(), (torch.eye(3),)), tmp_path / "m.onnx", "m.data")
    assert "The program cannot be written as ONNX" in str(caught.value)
    assert "bessel_j0" in str(caught.value)
    assert "test_export.py" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_an_operator_that_torch_cannot_translate_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Minus(nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            return 1.0 - mask

    monkeypatch.setattr(translate, "_MENDED", {})
    with pytest.raises(UnsupportedError) as caught:
        export_onnx(capture(Minus(), (torch.ones(2, dtype=torch.int64),)), tmp_path / "m.onnx", "m.data")
    line = Minus.forward.__code__.co_firstlineno + 1
    assert f"where: aten.sub.Tensor at {__file__}:{line}\n" in str(caught.value)


@pytest.mark.parametrize(
    ("code", "text"), [(errno.ENOSPC, "there is no space left"), (errno.EACCES, "permission denied")]
)
def test_failed_writes_leave_nothing_behind(
    packed_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(export, "_bytes_of", fail)
    with pytest.raises(ArtefactError, match=text):
        export_onnx(packed_program, tmp_path / "m.onnx", "m.data")
    assert os.listdir(tmp_path) == []


def test_too_little_memory_is_refused_before_work_starts(
    packed_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(InputError, match="Not enough memory for the export to ONNX"):
        export_onnx(packed_program, tmp_path / "m.onnx", "m.data")


def test_packed_weights_stay_packed_with_the_library(
    packed_program: Program, tmp_path: Path, library: str
) -> None:
    made = export_onnx(packed_program, tmp_path / "m.onnx", "m.data")
    facts = check.check_packed(made.model, tmp_path / "m.onnx", Path(library))
    assert facts["packed_nodes"] == 2
    kept, constants = check.optimized_graph(tmp_path / "m.onnx", Path(library))
    assert constants < 2 * facts["packed_bytes"]
    assert {source for _, source in kept} >= {"a_weight", "b_weight"}
    # Without the library they do grow, by exactly what the facts say.
    kept, grown = check.optimized_graph(tmp_path / "m.onnx", None)
    assert not kept
    expected = facts["without_library"]["float_bytes"]
    assert expected == 4 * (300 * 256 + 40 * 300)
    assert expected <= grown <= expected + constants


def test_a_weight_that_grew_back_is_an_error_that_names_the_node(
    packed_program: Program, tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = export_onnx(packed_program, tmp_path / "m.onnx", "m.data")
    stock = check.optimized_graph(tmp_path / "m.onnx", None)
    monkeypatch.setattr(check, "optimized_graph", lambda *_: stock)
    with pytest.raises(VerificationError) as caught:
        check.check_packed(made.model, tmp_path / "m.onnx", Path(library))
    assert "grew back to float" in str(caught.value)
    assert "linear_packed (PackedLinear" in str(caught.value)
    assert "linear_packed_float (PackedLinearFloat" in str(caught.value)


def test_wrong_results_are_an_error(packed_program: Program, tmp_path: Path) -> None:
    export_onnx(packed_program, tmp_path / "m.onnx", "m.data")
    data = bytearray((tmp_path / "m.data").read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    (tmp_path / "m.data").write_bytes(data)
    with pytest.raises(VerificationError, match="does not compute what the program computes"):
        check.check_results(packed_program, tmp_path / "m.onnx", None)
