"""The driver: keeps passes to their guarantees, and says which pass broke them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from isofold.compiler.capture import capture
from isofold.compiler.driver import REAL_TOLERANCE, Step, relative_error, run_steps
from isofold.compiler.editor import Editor
from isofold.compiler.errors import VerificationError
from isofold.compiler.passes import Guarantee, Pass, define_pass
from isofold.compiler.program import Program


def program() -> Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), (torch.randn(3, 4),))


def scaling(guarantee: Guarantee, factor: float) -> Pass:
    """A pass that multiplies all biases."""

    @define_pass(guarantee)
    def scale_biases(editor: Editor, *, report: bool = True) -> None:
        for node in editor.calls(torch.ops.aten.linear.default):
            bias = editor.tensor(node.args[2])
            assert bias is not None
            node.update_arg(2, editor.constant((bias.double() * factor).float(), "scaled"))
            if report:
                editor.applied(node, "bias scaled")

    return scale_biases


def test_passes_within_their_guarantee_run_and_are_recorded() -> None:
    before = program()
    steps = [
        Step(scaling(Guarantee.BITWISE, 1.0)),
        Step(scaling(Guarantee.REAL, 1 + 1e-6)),
        Step(scaling(Guarantee.LOSSY, 2.0)),
    ]
    seen: list[str] = []
    after, reports = run_steps(before, steps, progress=seen.append)
    assert seen == ["scale_biases"] * 3
    assert reports[0].error == 0
    assert reports[1].error is not None
    assert 0 < reports[1].error < REAL_TOLERANCE
    assert reports[2].error is not None
    assert reports[2].error > 0.01
    assert [r["guarantee"] for r in after.records] == ["bitwise", "real", "lossy"]
    assert after.records[2]["applied"][0] == {
        "module": "0", "node": "linear", "source": after.records[2]["applied"][0]["source"], "what": "bias scaled",
    }  # fmt: skip
    assert not before.records


def test_tensors_go_as_they_are_replaced() -> None:
    alive: list[int] = []
    old: list[weakref.ref[torch.Tensor]] = []

    @define_pass(Guarantee.REAL)
    def set_all(editor: Editor) -> None:
        gc.disable()
        try:
            for name in list(editor.tensors):
                old.append(weakref.ref(editor.tensors[name]))
                editor.set_tensor(name, editor.tensors[name].clone())
                alive.append(sum(ref() is not None for ref in old))
        finally:
            gc.enable()
        editor.applied(next(editor.calls(torch.ops.aten.linear.default)), "copied")

    kept = program()
    names = set(kept.tensors)
    expected = kept.run_float64()
    run_steps(kept, [Step(set_all)])
    assert max(alive) == len(names)
    assert set(kept.tensors) == names
    alive.clear()
    old.clear()
    # Captured weights belong to the module as well; copies belong to the program alone.
    given, _ = run_steps(kept, [Step(set_all)])
    alive.clear()
    old.clear()
    after, reports = run_steps(given, [Step(set_all), Step(set_all)], consume=True)
    assert set(alive) == {0}
    assert not given.tensors
    assert [report.error for report in reports] == [0, 0]
    assert relative_error(expected, after.run_float64()) == 0
    # The result is the caller's: another run leaves it as it is.
    run_steps(after, [Step(set_all)])
    assert set(after.tensors) == names


@pytest.mark.parametrize(
    ("guarantee", "factor"),
    [(Guarantee.BITWISE, 1 + 1e-6), (Guarantee.REAL, 1 + 1e-3), (Guarantee.LOSSY, float("inf"))],
)
def test_a_pass_that_breaks_its_guarantee_is_named_with_place_and_history(
    guarantee: Guarantee, factor: float
) -> None:
    steps = [Step(scaling(Guarantee.REAL, 1.0)), Step(scaling(guarantee, factor))]
    with pytest.raises(VerificationError) as caught:
        run_steps(program(), steps)
    text = str(caught.value)
    assert "The pass scale_biases changed the program by more than it guarantees" in text
    assert "where: 0 (node linear)" in text
    assert "passes before it: scale_biases" in text
    run_steps(program(), steps, verify=False)


def test_relative_error() -> None:
    a = torch.tensor([1.0, -4.0])
    assert relative_error([a], [a + 0.4]) == pytest.approx(0.1)
    assert relative_error([a, 3], [a, 3]) == 0
    assert relative_error([a, 3], [a, 4]) == float("inf")
    assert relative_error([a], [a[:1]]) == float("inf")
    assert relative_error([a], [torch.tensor([1.0, torch.nan])]) == float("inf")
    assert relative_error([torch.zeros(2)], [torch.full((2,), 0.5)]) == 0.5
    masked = torch.tensor([1.0, -torch.inf])
    assert relative_error([masked], [masked.clone()]) == 0
