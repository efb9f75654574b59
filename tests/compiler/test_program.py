"""Program: runs like the module, is never changed, goes through `.pt2` and back, checks its inputs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from isofold.compiler.capture import capture
from isofold.compiler.editor import Editor
from isofold.compiler.errors import ArtefactError, InputError
from isofold.compiler.passes import Guarantee, define_pass
from isofold.compiler.program import Program

OPS: Any = torch.ops.isofold


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 6)

    def forward(self, ids: Tensor, scale: Tensor, *, shift: Tensor) -> dict[str, Tensor]:
        hidden = self.linear(self.table(ids)) * scale
        return {"hidden": hidden, "sum": hidden.sum(1) + shift}


ARGS = (torch.tensor([[1, 2, 3], [4, 5, 10]]), torch.tensor(2.0))
KWARGS = {"shift": torch.ones(6)}


@pytest.fixture(scope="module")
def program() -> Program:
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=2, max=64)
    return capture(Model().eval(), ARGS, KWARGS, {"ids": {0: batch, 1: length}, "scale": None, "shift": None})


def equal(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-6) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=tolerance) for k in a)


def test_it_runs_like_the_module_at_other_sizes(program: Program) -> None:
    ids = torch.randint(0, 11, (5, 9))
    assert equal(program(ids, ARGS[1], **KWARGS), Model().eval()(ids, ARGS[1], **KWARGS))


def test_it_is_differentiable(program: Program) -> None:
    weight = program.parameters["linear.weight"]
    loss = program(*ARGS, **KWARGS)["hidden"].square().sum()
    (gradient,) = torch.autograd.grad(loss, [weight])
    model = Model().eval()
    model(*ARGS, **KWARGS)["hidden"].square().sum().backward()
    assert model.linear.weight.grad is not None
    assert torch.allclose(gradient, model.linear.weight.grad, rtol=1e-5)


def test_float64_is_more_precise_than_float32(program: Program) -> None:
    exact = Model().eval().double()(ARGS[0], ARGS[1].double(), shift=KWARGS["shift"].double())
    for got, expected in zip(program.run_float64(), exact.values(), strict=True):
        assert got.dtype == torch.float64
        assert torch.allclose(got, expected, rtol=1e-14, atol=1e-14)


def test_observing_sees_every_value_and_changes_nothing(program: Program) -> None:
    seen: dict[str, Any] = {}
    result = program.run_observed(lambda node, found: seen.update({node.name: found}), ARGS, KWARGS)
    assert equal(result, program(*ARGS, **KWARGS))
    assert set(seen) == {node.name for node in program.graph.nodes}


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((ARGS[0][0], ARGS[1]), KWARGS, r"ids: expected shape \[.*\], got \[3\]"),
        ((ARGS[0].float(), ARGS[1]), KWARGS, r"ids: expected torch.int64, got torch.float32"),
        (
            (ARGS[0].float(), torch.ones(2)),
            {"shift": torch.ones(7)},
            r"ids: .*; scale: .*; shift: expected shape \[6\], got \[7\]",
        ),
        ((ARGS[0], 2.0), KWARGS, r"scale: expected a tensor, got float"),
        ((ARGS[0],), KWARGS, "do not have the structure"),
        (ARGS, {}, "do not have the structure"),
        (ARGS, {"shfit": torch.ones(6)}, "do not have the structure"),
    ],
)
def test_wrong_inputs_are_listed_all_at_once(program: Program, args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        program(*args, **kwargs)


def quantized(program: Program) -> Program:
    """The linear on int8 codes, so that files hold our operators."""

    @define_pass(Guarantee.LOSSY)
    def quantize(editor: Editor) -> None:
        for node in editor.calls(torch.ops.aten.linear.default):
            weight = editor.tensor(node.args[1])
            assert weight is not None
            scale = weight.abs().amax(1, keepdim=True) / 127
            codes = editor.constant((weight / scale).round().to(torch.int8), "linear.codes")
            node.update_arg(
                1,
                editor.call(
                    OPS.dequantize_weight.default,
                    codes,
                    editor.constant(scale, "linear.scale"),
                    None,
                    0,
                    like=node,
                ),
            )
            node.update_arg(
                0, editor.call(OPS.quantize_dequantize.default, node.args[0], None, "token", like=node)
            )
            editor.applied(node, "codes")

    return quantize(program).program.with_record({"pass": "quantize", "applied": []})


def test_pt2_round_trip_with_our_operators_records_and_dynamic_shapes(
    program: Program, tmp_path: Path
) -> None:
    before = quantized(program)
    before.save(tmp_path / "model.pt2")
    assert os.listdir(tmp_path) == ["model.pt2"]
    after = Program.load(tmp_path / "model.pt2")
    assert after.records == before.records
    ours = {"isofold.dequantize_weight.default", "isofold.quantize_dequantize.default"}
    assert ours <= {str(n.target) for n in after.graph.nodes}
    for ids in (ARGS[0], torch.randint(0, 11, (4, 7))):
        assert equal(after(ids, ARGS[1], **KWARGS), before(ids, ARGS[1], **KWARGS))
    stored = {t.dtype for t in after.parameters.values()}
    assert torch.int8 in stored
    assert not any(t.shape == (6, 6) and t.dtype == torch.float32 for t in after.parameters.values())


def test_files_that_cannot_be_read_or_written_are_errors_that_name_them(
    program: Program, tmp_path: Path
) -> None:
    with pytest.raises(ArtefactError, match=r"no such file\n  where: .*missing.pt2"):
        Program.load(tmp_path / "missing.pt2")
    program.save(tmp_path / "whole.pt2")
    data = (tmp_path / "whole.pt2").read_bytes()
    (tmp_path / "cut.pt2").write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtefactError, match=r"not a readable .pt2 archive\n  where: .*cut.pt2"):
        Program.load(tmp_path / "cut.pt2")
    with pytest.raises(ArtefactError, match=r"cannot be written\n  where: .*no/such"):
        program.save(tmp_path / "no" / "such" / "folder.pt2")


def test_an_editor_changes_a_copy(program: Program) -> None:
    nodes = [(n.name, n.op, str(n.target), str(n.args)) for n in program.graph.nodes]
    tensors = {name: (t.data_ptr(), t._version) for name, t in program.parameters.items()}
    after = quantized(program)
    assert [(n.name, n.op, str(n.target), str(n.args)) for n in program.graph.nodes] == nodes
    assert {name: (t.data_ptr(), t._version) for name, t in program.parameters.items()} == tensors
    assert "linear.weight" in program.tensors
    assert "linear.weight" not in after.tensors
    assert after.tensors["table.weight"] is program.tensors["table.weight"]


def test_an_editor_makes_names_unique_and_erases_what_only_the_old_node_needed(program: Program) -> None:
    editor = Editor(program)
    names = [editor.name_of(editor.constant(torch.ones(1), "linear.bias")) for _ in range(2)]
    assert names == ["linear.bias_1", "linear.bias_2"]
    (node,) = editor.calls(torch.ops.aten.linear.default)
    x = node.args[0]
    assert isinstance(x, fx.Node)
    editor.replace(node, x)
    assert node._erased
    assert not any(n.op == "get_attr" and n.target == "linear.weight" for n in editor.graph.nodes)
    assert "linear.weight" not in editor.finish().tensors
