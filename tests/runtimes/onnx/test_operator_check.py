"""Operators of exported files on the program's own inputs: sharp agreement, and every kind of defect is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from isofold.compiler.differences import share_of_codes
from isofold.compiler.driver import run_steps
from isofold.compiler.errors import VerificationError
from isofold.compiler.graph import argument
from isofold.compiler.program import Program
from isofold.compiler.recipe import resolve
from isofold.compiler.registry import pipeline
from isofold.models import registry
from isofold.runtimes.onnx.export import export_onnx
from isofold.runtimes.onnx.operator_check import operator_differences

from ...captured import captured

Case = tuple[Program, registry.ModelCase, Path]
LINEARS = (
    torch.ops.isofold.linear_packed.default,
    torch.ops.isofold.quantize_linear_packed.default,
    torch.ops.isofold.linear_fp8.default,
)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    made: dict[tuple[str, str], Case] = {}

    def build(name: str, recipe: str) -> Case:
        if (name, recipe) not in made:
            case, plain = captured(name)
            program, _ = run_steps(plain, pipeline()(plain, resolve(recipe), None, False), verify=False)
            path = tmp_path_factory.mktemp(name) / "m.onnx"
            export_onnx(program, path, "m.data")
            made[name, recipe] = program, case, path
        return made[name, recipe]

    return build


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("bert", "w8a8"),
        ("t5", "w4a8"),
        ("bert", "fp8"),
        pytest.param("t5", "w8a8", marks=pytest.mark.slow),
        pytest.param("minilm", "w8a8", marks=pytest.mark.slow),
        pytest.param("minilm", "w4a8", marks=pytest.mark.slow),
        pytest.param("resnet", "w8a8", marks=pytest.mark.slow),
    ],
)
def test_every_operator_agrees_with_the_program_on_its_own_inputs(
    name: str, recipe: str, compressed: Callable[[str, str], Case], library: str
) -> None:
    program, case, path = compressed(name, recipe)
    before = sorted(path.parent.iterdir())
    for chosen in (Path(library), None):
        for args in (case.args, case.other_args):
            found = operator_differences(program, path, chosen, args)
            nodes = {d.node for d in found}
            linears = [n for n in program.graph.nodes if n.target in LINEARS]
            assert linears or name == "resnet"
            assert {node.name for node in linears} <= nodes
            assert max(d.error for d in found) < 1e-5
            assert max(d.steps for d in found) <= 1
            assert share_of_codes(found) <= 1e-3
    assert sorted(path.parent.iterdir()) == before


def _changed(path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    other = path.with_name("changed.onnx")
    onnx.save(model, str(other))
    return other


def test_a_changed_weight_shows_at_its_operator_alone(compressed: Callable[[str, str], Case]) -> None:
    program, _, path = compressed("bert", "w8a8")
    victim = program.graph.find_nodes(op="call_function", target=torch.ops.isofold.linear_packed.default)[2]

    def add_to_one_code(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.name == victim.name)
        tensor = next(t for t in model.graph.initializer if t.name == node.input[2])
        full = onnx.TensorProto.FromString(tensor.SerializeToString())
        onnx.external_data_helper.load_external_data_for_tensor(full, str(path.parent))
        codes = numpy_helper.to_array(full).copy()
        codes.reshape(-1)[0] ^= 4
        tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))

    found = operator_differences(program, _changed(path, add_to_one_code), None)
    assert {d.node for d in found if d.error > 1e-5} == {victim.name}


def test_a_wrong_quantizer_shows_in_its_codes(compressed: Callable[[str, str], Case]) -> None:
    program, _, path = compressed("bert", "w8a8")

    def shift(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == "NormQuantize")
        bias = next(t for t in model.graph.initializer if t.name == node.input[3])
        values = np.zeros(list(bias.dims), np.float32)
        bias.CopyFrom(numpy_helper.from_array(values, bias.name))

    found = operator_differences(program, _changed(path, shift), None)
    wrong = [d for d in found if d.steps > 1]
    assert {d.op for d in wrong} == {"NormQuantize"}
    assert share_of_codes(wrong) > 0.1


def test_codes_inside_an_operator_behind_a_transform_have_a_measured_bound(
    compressed: Callable[[str, str], Case], library: str
) -> None:
    program, _, path = compressed("llama", "w4a8-rotate")
    turned = {
        n.name
        for n in program.graph.nodes
        if n.target == torch.ops.isofold.quantize_linear_packed.default and argument(n, "hadamard")
    }
    assert len(turned) == 2
    victim = max(turned)

    def transform_otherwise(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.name == victim)
        orders = next(a for a in node.attribute if a.name == "hadamard")
        assert orders.ints[-1] > 2
        orders.ints[-1] //= 2

    for changed, wrong in ((None, set()), (transform_otherwise, {victim})):
        file = path if changed is None else _changed(path, changed)
        found = operator_differences(program, file, Path(library))
        assert {d.node for d in found if d.step} == turned
        assert all(0 < d.step < 0.05 for d in found if d.node in turned)
        # A hundredth of the codes may be off by one step.
        assert {d.node for d in found if d.error > max(1e-5, 0.1 * d.step)} == wrong


def test_an_operator_that_the_program_lacks_is_named(compressed: Callable[[str, str], Case]) -> None:
    program, _, path = compressed("bert", "w8a8")

    def rename(model: onnx.ModelProto) -> None:
        next(n for n in model.graph.node if n.op_type == "Attention").name = "stranger"

    with pytest.raises(VerificationError, match=r"operator that the program lacks(.|\n)*stranger"):
        operator_differences(program, _changed(path, rename), None)
