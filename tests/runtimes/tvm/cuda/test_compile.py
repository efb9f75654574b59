"""Whole Relax modules: dialect calls become kernels, the rest is scheduled; cubins are embedded, and the same module
computes what the references do when the emulator runs it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm import ir, relax, tirx

from isofold.compiler.dialect import OPERATORS, packing
from isofold.compiler.errors import UnsupportedError
from isofold.runtimes.tvm.cuda import compile as cuda
from isofold.runtimes.tvm.cuda.device_module import creating, target_for
from isofold.runtimes.tvm.cuda.emulate import CPU, emulator_library
from isofold.runtimes.tvm.cuda.rewrite import EXTERN, is_tensor, read_description, rewrite_dialect
from isofold.runtimes.tvm.cuda.rows import ROW_LIMIT

from .emulated import CACHE

N, K, GROUP = 96, 256, 32


def description(name: str, present: set[str], attributes: dict[str, Any], wanted: str) -> str:
    """A dialect call's line, as the lowering writes it."""
    operator = OPERATORS[name]
    declared = operator.overload._schema.arguments

    def text(kind: str, value: Any) -> str:
        if kind == "float":
            return f"f:{float(value).hex()}"
        if kind in ("int", "bool"):
            return f"i:{int(value)}"
        return "l:" + ",".join(map(str, value)) if kind == "List[int]" else f"s:{value}"

    flags = "".join("01"[a.name in present] for a in declared if is_tensor(a))
    rest = [
        f"{a.name}={text(str(a.type), attributes.get(a.name, a.default_value))}"
        for a in declared
        if not is_tensor(a)
    ]
    return " ".join([operator.onnx_name, f"in={flags}", f"out={wanted}", *rest, "node=s:here"])


def module_of(symbolic: bool) -> tvm.IRModule:
    """x → 2 x → quantized linear → (normed and quantized, softmax)."""
    lead = (
        [tirx.Var("batch", "int64"), tirx.IntImm("int64", 5)] if symbolic else [tirx.IntImm("int64", 1)] * 2
    )
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([*lead, K], "float32"))
    weights = [
        relax.Var("w", relax.TensorType([N // 16, K // 8, 16, 4], "uint8")),
        relax.Var("s", relax.TensorType([N // 16, K // GROUP, 16], "float16")),
        relax.Var("wsum", relax.TensorType([N], "float32")),
    ]
    linear = description(
        "quantize_linear_packed", {"x", "weight", "scale", "wsum"}, {"n": N, "k": K, "bits": 4, "group_size": GROUP,
        "scale_multiplier": 0.0625, "activation": "gelu", "gated": False}, "1",
    )  # fmt: skip
    norm = description("norm_quantize", {"x"}, {"eps": 1e-5, "kind": "rms", "align": 32}, "0111")
    with bb.function("main", [x, *weights]):
        with bb.dataflow():
            doubled = bb.emit(relax.op.multiply(x, relax.const(np.float32(2.0))))
            kind = relax.TensorType([*lead, N], "float32")
            y = bb.emit(relax.call_dps_packed("isofold_op", [ir.StringImm(linear), doubled, *weights], kind))
            kinds = [kind, relax.TensorType([*lead, N], "uint8"), relax.TensorType([*lead, 2], "float32")]
            normed = bb.emit(relax.call_dps_packed("isofold_op", [ir.StringImm(norm), y], kinds))
            parts = [bb.emit(relax.TupleGetItem(normed, i)) for i in (0, 1)]
            out = bb.emit_output(relax.Tuple([*parts, bb.emit(relax.op.nn.softmax(y))]))
        bb.emit_func_output(out)
    return bb.finalize()


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
def test_emulated_module_agrees_with_the_references(symbolic: bool) -> None:
    target = target_for("sm_80", CPU)
    with creating(emulator_library(CACHE)):
        executable = cuda.build(cuda.scheduled(module_of(symbolic), target), target, cuda_graphs=False)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int32).to(torch.int8)
    scale, _ = packing.storable_scale(torch.rand(N, K // GROUP) * 0.02 + 0.04, GROUP)
    packed = packing.pack_linear(codes, scale, None, 4, GROUP)
    assert packed.scale_multiplier == 0.0625
    for batch in (1, 2, 9) if symbolic else (1,):
        x = torch.randn(batch, 5, K) if symbolic else torch.randn(1, 1, K)
        given = [tvm.runtime.tensor(t.numpy()) for t in (x, packed.weight, packed.scale, packed.wsum)]
        normed, quantized, soft = (torch.from_numpy(r.numpy()) for r in machine["main"](*given))
        y = OPERATORS["quantize_linear_packed"].reference(
            2 * x, None, None, None, packed.weight, packed.scale, None, packed.wsum, None, None,
            N, K, 4, GROUP, 0.0625, "gelu", False,
        )  # fmt: skip
        _, expected, u, _ = OPERATORS["norm_quantize"].reference(y, None, None, None, None, 1e-5, "rms", 32)
        torch.testing.assert_close(normed, expected, rtol=1e-4, atol=1e-4)
        assert int((quantized.int() - u.int()).abs().max()) <= 1
        torch.testing.assert_close(soft, y.softmax(-1), rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_cubins_are_embedded(arch: str, tmp_path: Path) -> None:
    compiled = cuda.compile_module(module_of(False), arch)
    path = tmp_path / "model.so"
    compiled.executable.export_library(str(path))
    data = path.read_bytes()
    assert arch.encode() in data
    assert data.count(b"\x7fELF") >= 2
    assert b"blockIdx.x) *" not in data  # no source
    names = {r.kernel for r in compiled.resources}
    assert any("skinny_int4g32" in n for n in names)
    assert any("softmax" in n for n in names)
    facts = compiled.facts()
    assert facts["arch"] == arch
    assert not any(row["spill_bytes"] for row in facts["resources"])
    assert facts["kernels"] == len(names)


def test_static_modules_are_captured_in_graphs_and_symbolic_ones_are_not() -> None:
    for symbolic in (False, True):
        target = target_for("sm_80", CPU)
        with target, tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
            lowered = cuda.relax_pipeline()(cuda.scheduled(module_of(symbolic), target))
        assert ("cuda_graph.run_or_capture" in lowered["main"].script()) != symbolic


def test_descriptions_are_read_back() -> None:
    text = description("hadamard", {"x"}, {"orders": [12, 4], "transpose": True}, "1")
    operator, present, wanted, attributes, node = read_description(text)
    assert (operator.name, present, wanted, node) == ("hadamard", [True], [True], "here")
    assert attributes == {"orders": [12, 4], "transpose": 1}


def test_operator_without_kernels_is_named() -> None:
    with pytest.raises(UnsupportedError, match="The operator Unheard has no GPU kernels") as error:
        read_description("Unheard in=1 out=1 node=s:layer7")
    assert "layer7" in str(error.value)


def test_all_calls_that_no_kernel_takes_are_listed_at_once() -> None:
    width = ROW_LIMIT + 8
    attributes = {"eps": 1e-5, "kind": "rms", "align": 32, "orders": [], "transpose": False}
    norm = description("norm", {"x"}, attributes, "01")
    quantizer = description("quantize_activation", {"x"}, attributes, "11")
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([4, width], "float32"))
    kinds = [relax.TensorType([4, width], "uint8"), relax.TensorType([4, 2], "float32")]
    with bb.function("main", [x]):
        with bb.dataflow():
            y = bb.emit(relax.call_dps_packed(EXTERN, [ir.StringImm(norm), x], x.ty))
            out = bb.emit_output(bb.emit(relax.call_dps_packed(EXTERN, [ir.StringImm(quantizer), y], kinds)))
        bb.emit_func_output(out)
    with pytest.raises(UnsupportedError, match="do not take") as error:
        rewrite_dialect(bb.finalize())
    problem = f"here: A row of activations is too long for one block (at most {ROW_LIMIT}, got {width})"
    assert str(error.value).count(problem) == 2


def test_modules_without_the_dialect_are_left_alone() -> None:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([4], "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(bb.emit(relax.op.exp(x)))
        bb.emit_func_output(out)
    module = bb.finalize()
    ir.assert_structural_equal(rewrite_dialect(module), module)
