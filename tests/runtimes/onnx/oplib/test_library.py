"""The library itself: instruction sets, threads, concurrent runs, errors, shapes, what it needs to be loaded."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from isofold.compiler.dialect import OPERATORS

Run = Callable[..., list[Tensor]]
MakeModel = Callable[..., tuple[onnx.ModelProto, dict[str, np.ndarray]]]
Sessions = Callable[..., onnxruntime.InferenceSession]
HERE = Path(__file__).parent


def info(library: Path, isa: str | None) -> str:
    """`isofold_ops_info()` in a fresh process."""
    code = (
        "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).isofold_ops_info; f.restype = ctypes.c_char_p; "
        "print(f().decode())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ISOFOLD_ISA"}
    if isa is not None:
        environment["ISOFOLD_ISA"] = isa
    command = [sys.executable, "-c", code, str(library)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_info_names_the_instruction_set(library: Path) -> None:
    assert "isa=v3" in info(library, "v3")
    assert "isa=v" in info(library, None)
    assert "isa=v" in info(library, "")
    assert "ISOFOLD_ISA=v9 is not known; expected v3" in info(library, "v9")


def test_an_unknown_instruction_set_is_an_error_at_registration(library: Path) -> None:
    code = "import sys, onnxruntime; o = onnxruntime.SessionOptions(); o.register_custom_ops_library(sys.argv[1])"
    environment = {**os.environ, "ISOFOLD_ISA": "avx"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ISOFOLD_ISA=avx is not known" in done.stderr


@pytest.mark.skipif("ISOFOLD_ISA" in os.environ, reason="this is the run with a forced instruction set")
def test_every_operator_on_x86_64_v3() -> None:
    files = [
        str(p) for p in sorted(HERE.glob("test_*.py")) if p.name not in ("test_library.py", "test_build.py")
    ]
    environment = {**os.environ, "ISOFOLD_ISA": "v3"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_library_depends_on_libc_alone(library: Path) -> None:
    lines = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].rpartition("/")[2] for line in lines.splitlines()}
    assert not {n for n in names if "tvm" in n or "stdc++" in n or "python" in n}, names


def test_only_two_symbols_are_exported(library: Path) -> None:
    handle = ctypes.CDLL(str(library))
    assert hasattr(handle, "RegisterCustomOps")
    assert hasattr(handle, "isofold_ops_info")
    assert not hasattr(handle, "norm_rows_v3")


def _chain(width: int, length: int) -> onnx.ModelProto:
    """Two branches of attention and norm, `length` deep, added at the end."""
    nodes, last = [], {}
    for branch in "ab":
        value = "x"
        for i in range(length):
            normed, attended, flat = (f"{kind}_{branch}{i}" for kind in ("n", "t", "f"))
            nodes += [
                helper.make_node("Norm", [value], ["", normed], domain="ai.isofold", eps=1e-5, kind="layer"),
                helper.make_node("Reshape", [normed, "heads"], [f"{normed}_h"]),
                helper.make_node(
                    "Attention", [f"{normed}_h"] * 3, [attended], domain="ai.isofold", heads=4, kv_heads=4, q_start=0,
                    k_start=0, v_start=0, scale=0.2, causal=1, softcap=0.0,
                ),
                helper.make_node("Reshape", [attended, "flat"], [flat]),
            ]  # fmt: skip
            value = flat
        last[branch] = value
    nodes.append(helper.make_node("Add", list(last.values()), ["y"]))
    constants = [
        helper.make_tensor("heads", TensorProto.INT64, [4], [0, 0, 4, width // 4]),
        helper.make_tensor("flat", TensorProto.INT64, [3], [0, 0, width]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "S", width])
    graph = helper.make_graph(nodes, "chain", [x], [y], constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.isofold", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("parallel", [False, True])
def test_concurrent_runs_of_several_sessions_agree(session: Sessions, parallel: bool) -> None:
    model = _chain(64, 4)
    sessions = [session(model, threads=2, parallel=parallel) for _ in range(2)]
    feeds = [
        np.random.default_rng(i).standard_normal((2, 10 + 17 * i, 64)).astype(np.float32) for i in range(4)
    ]
    expected = [sessions[0].run(None, {"x": feed})[0] for feed in feeds]
    wrong: list[int] = []

    def work(worker: int) -> None:
        for i in range(12):
            which = (worker + i) % len(feeds)
            got = sessions[(worker + i) % 2].run(None, {"x": feeds[which]})[0]
            if not np.array_equal(got, expected[which]):
                wrong.append(worker)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_do_not_change_results(run_operator: Run) -> None:
    x = torch.randn(1, 300, 8, 32)
    arguments = [x, x, x, None, 8, 8, 0, 0, 0, 0.2, False, 0.0]
    one, two = (run_operator("attention", arguments, threads)[0] for threads in (1, 2))
    assert torch.equal(one, two)


def test_runs_do_not_leak(session: Sessions, make_model: MakeModel) -> None:
    x = torch.randn(1, 3, 64, 64)
    weight = torch.zeros(1, 8, 16, 4, dtype=torch.int8)
    arguments = [
        x, None, weight, torch.ones(1, 1, 16), torch.zeros(16), None, [3, 3], [1, 1], [1, 1], [1, 1], 16, "none",
    ]  # fmt: skip
    model, feeds = make_model("conv_packed", arguments, constants=("weight", "scale", "wsum"))
    runner = session(model, threads=2)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(50):
        runner.run(None, feeds)
    before = resident()
    for _ in range(500):  # a leak of the 12 KB sample alone would be 6 MB
        runner.run(None, feeds)
    assert resident() - before < 3 << 20


def test_shapes_are_inferred_with_symbols(session: Sessions, make_model: MakeModel) -> None:
    x = torch.randn(2, 5, 4, 16)
    arguments: list[Any] = [x, x, x, None, 4, 4, 0, 0, 0, 0.25, False, 0.0]
    shapes = {name: ["batch", "length", 4, 16] for name in "qkv"}
    model, _ = make_model("attention", arguments, shapes=shapes)
    assert session(model).get_outputs()[0].shape == ["batch", "length", 4, 16]
    model, _ = make_model("quantize_activation", [torch.randn(3, 20), None, 32], shapes={"x": ["rows", 20]})
    assert [o.shape for o in session(model).get_outputs()] == [["rows", 32], ["rows", 2]]
    model, _ = make_model("quantize_linear_packed", _quantizing(), shapes={"x": ["rows", 50]})
    assert session(model).get_outputs()[0].shape == ["rows", 40]
    image = torch.randn(1, 3, 8, 8)
    convolution = [
        image, None, torch.zeros(1, 8, 16, 4, dtype=torch.int8), torch.ones(1, 1, 16), torch.zeros(16), None, [3, 3],
        [2, 2], [1, 1], [1, 1], 10, "none",
    ]  # fmt: skip
    model, _ = make_model("conv_packed", convolution, shapes={"x": ["batch", 3, 8, 8]})
    assert session(model).get_outputs()[0].shape == ["batch", 10, 4, 4]


def _linear(**changes: Any) -> list[Any]:
    found: dict[str, Any] = {
        "u": torch.zeros(2, 64, dtype=torch.uint8),
        "params": torch.ones(2, 2),
        "weight": torch.zeros(3, 8, 16, 4, dtype=torch.uint8),
        "scale": torch.zeros(3, 2, 16, dtype=torch.float16),
        "zero": None,
        "wsum": torch.zeros(48),
        "bias": None,
        "residual": None,
        "n": 40,
        "k": 50,
        "bits": 4,
        "group_size": 32,
        "scale_multiplier": 1.0,
        "activation": "none",
        "gated": False,
    }
    return list({**found, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"u": torch.zeros(2, 32, dtype=torch.uint8)},
            r"input 0 \(u\): expected a last dimension of 64, got uint8 \[2, 32\]",
        ),
        (
            {"params": torch.ones(3, 2)},
            r"input 1 \(params\): expected float32 \[2, 2\], got float32 \[3, 2\]",
        ),
        (
            {"weight": torch.zeros(3, 8, 16, 4, dtype=torch.int8)},
            r"input 2 \(weight\): expected uint8 \[3, 8, 16, 4\], got int8",
        ),
        (
            {"weight": torch.zeros(2, 8, 16, 4, dtype=torch.uint8)},
            r"expected uint8 \[3, 8, 16, 4\], got uint8 \[2, 8, 16, 4\]",
        ),
        ({"scale": torch.zeros(3, 2, 16)}, r"input 3 \(scale\): expected float16 \[3, 2, 16\], got float32"),
        ({"wsum": torch.zeros(40)}, r"input 5 \(wsum\): expected float32 \[48\], got float32 \[40\]"),
        ({"bias": torch.zeros(48)}, r"input 6 \(bias\): expected float32 \[40\], got float32 \[48\]"),
        ({"residual": torch.zeros(2, 48)}, r"input 7 \(residual\): expected float32 \[2, 40\]"),
        ({"bits": 5}, r"attribute 'bits' is 5; expected 2, 3, 4 or 8"),
        ({"group_size": 20}, r"attribute 'group_size' is 20; expected 0 or a multiple of 32"),
        (
            {"activation": "swish"},
            r"attribute 'activation' is 'swish'; expected one of none, relu, gelu, gelu_tanh, silu",
        ),
        ({"n": 0}, r"attribute 'n' is 0; expected at least 1"),
    ],
)
def test_bad_linears_are_errors_that_say_why(
    run_operator: Run, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        run_operator("linear_packed", _linear(**changes))


def _grouped(**changes: Any) -> list[Any]:
    given: dict[str, Any] = {
        "u": torch.ones(2, 64, dtype=torch.uint8), "params": torch.ones(2, 2), "expert": torch.tensor([1, 0]),
        "weight": torch.zeros(3, 3, 8, 16, 4, dtype=torch.uint8),
        "scale": torch.zeros(3, 3, 2, 16, dtype=torch.float16),
        "zero": None, "wsum": torch.zeros(3, 48), "bias": torch.zeros(3, 40), "n": 40, "k": 50, "bits": 4,
        "group_size": 32, "scale_multiplier": 1.0,
    }  # fmt: skip
    return list({**given, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.ones(1, 2, 64, dtype=torch.uint8)}, r"input 0 \(u\): expected two dimensions"),
        ({"u": torch.ones(2, 50, dtype=torch.uint8)}, r"input 0 \(u\): expected a last dimension of 64"),
        (
            {"params": torch.ones(3, 2)},
            r"input 1 \(params\): expected float32 \[2, 2\], got float32 \[3, 2\]",
        ),
        ({"expert": torch.ones(3).long()}, r"input 2 \(expert\): expected int64 \[2\], got int64 \[3\]"),
        (
            {"weight": torch.zeros(3, 2, 8, 16, 4, dtype=torch.uint8)},
            r"input 3 \(weight\): expected uint8 \[3, 3, 8, 16, 4\], got uint8 \[3, 2, 8, 16, 4\]",
        ),
        (
            {"weight": torch.zeros(0, 3, 8, 16, 4, dtype=torch.uint8)},
            r"input 3 \(weight\): expected the matrices of at least one expert",
        ),
        (
            {"wsum": torch.zeros(2, 48)},
            r"input 6 \(wsum\): expected float32 \[3, 48\], got float32 \[2, 48\]",
        ),
        (
            {"bias": torch.zeros(3, 48)},
            r"input 7 \(bias\): expected float32 \[3, 40\], got float32 \[3, 48\]",
        ),
        ({"bits": 5}, r"attribute 'bits' is 5; expected 2, 3, 4 or 8"),
    ],
)
def test_bad_grouped_linears_are_errors_that_say_why(
    run_operator: Run, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match="GroupedPackedLinear: .*" + message):
        run_operator("linear_grouped_packed", _grouped(**changes))


def _quantizing(**changes: Any) -> list[Any]:
    quantizer = {"x": torch.ones(2, 50), "params": None, "pre_shift": None, "pre_scale": None}
    # Values follow names, as the linear's u and params are left out.
    names = [a.name for a in OPERATORS["linear_packed"].overload._schema.arguments]
    linear = dict(zip(names[2:], _linear()[2:], strict=True))
    return list({**quantizer, **linear, "input_bits": 8, "hadamard": [], **changes}.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 64)}, r"input 0 \(x\): expected a last dimension of 50, got float32 \[2, 64\]"),
        ({"x": torch.tensor(1.0)}, r"input 0 \(x\): expected a last dimension of 50, got float32 \[\]"),
        ({"params": torch.ones(2, 2)}, r"input 1 \(params\): expected float32 \[2\], got float32 \[2, 2\]"),
        (
            {"pre_shift": torch.ones(40)},
            r"input 2 \(pre_shift\): expected float32 \[50\], got float32 \[40\]",
        ),
        ({"pre_scale": torch.ones(1, 50)}, r"input 3 \(pre_scale\): expected float32 \[50\]"),
        ({"wsum": torch.zeros(40)}, r"input 7 \(wsum\): expected float32 \[48\], got float32 \[40\]"),
        ({"residual": torch.zeros(2, 50)}, r"input 9 \(residual\): expected float32 \[2, 40\]"),
        ({"input_bits": 3}, r"attribute 'input_bits' is 3; expected 4 or 8"),
        ({"bits": 5}, r"attribute 'bits' is 5; expected 2, 3, 4 or 8"),
        ({"hadamard": [4]}, r"expected a last dimension that is a multiple of 4, got float32 \[2, 50\]"),
        ({"hadamard": [6]}, r"'hadamard' has 6 at position 0; expected orders of known Hadamard"),
    ],
)
def test_bad_linears_with_their_quantizer_are_errors_that_say_why(
    run_operator: Run, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match="QuantizePackedLinear: .*" + message):
        run_operator("quantize_linear_packed", _quantizing(**changes))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "norm",
            [torch.ones(2, 8), torch.ones(8), None, None, 1e-5, "layer"],
            r"input 1 \(residual\): expected float32 \[2, 8\]",
        ),
        (
            "norm",
            [torch.ones(2, 8), None, torch.ones(7), None, 1e-5, "layer"],
            r"input 2 \(weight\): expected float32 \[8\]",
        ),
        (
            "quantize_activation",
            [torch.ones(2, 8), None, 32, torch.ones(7)],
            r"input 2 \(shift\): expected float32 \[8\], got float32 \[7\]",
        ),
        (
            "norm_quantize",
            [torch.ones(2, 8), None, None, None, None, 1e-5, "rms", 32, None, torch.ones(2, 8)],
            r"input 6 \(scale\): expected float32 \[8\]",
        ),
        ("norm", [torch.ones(2, 8), None, None, None, 1e-5, "batch"], r"expected one of layer, rms"),
        (
            "gated",
            [torch.ones(2, 8), torch.ones(2, 7), "silu"],
            r"input 1 \(up\): expected float32 \[2, 8\], got float32 \[2, 7\]",
        ),
        (
            "rotary",
            [torch.ones(1, 2, 3, 8), torch.ones(2, 3), torch.ones(2, 3), 2, -1, False],
            r"even last dimension",
        ),
        (
            "rotary",
            [torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), torch.ones(1, 2, 1, 8), 2, -1, False],
            r"broadcasts to",
        ),
        (
            "rotary",
            [torch.ones(1, 2, 3, 8), torch.ones(2, 1, 8), torch.ones(2, 1, 8), 3, -1, False],
            r"'head_dim_index' is 3",
        ),
        (
            "attention",
            [torch.ones(1, 2, 8)] * 3 + [None, 2, 2, 0, 0, 0, 1.0, False, 0.0],
            r"expected \[batch, sequence, heads, width\]",
        ),
        (
            "attention",
            [torch.ones(1, 2, 2, 8)] * 3 + [None, 4, 2, 0, 0, 0, 1.0, False, 0.0],
            r"at least 4 heads in dimension 2",
        ),
        (
            "attention",
            [torch.ones(1, 2, 4, 8)] * 3 + [None, 4, 3, 0, 0, 0, 1.0, False, 0.0],
            r"not a multiple of attribute 'kv_heads'",
        ),
        (
            "attention",
            [torch.ones(1, 2, 2, 8)] * 3 + [torch.ones(3, 2), 2, 2, 0, 0, 0, 1.0, False, 0.0],
            r"\(mask\): expected a shape that broadcasts to float32 \[1, 2, 2, 2\]",
        ),
    ],
)
def test_bad_inputs_are_errors_that_say_why(
    run_operator: Run, name: str, arguments: list[Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        run_operator(name, arguments)


def test_a_missing_attribute_is_an_error(session: Sessions, make_model: MakeModel) -> None:
    model, _ = make_model("gated", [torch.ones(2, 8), torch.ones(2, 8), "silu"])
    del model.graph.node[0].attribute[:]
    with pytest.raises(Exception, match=r"attribute .activation. .* is missing"):
        session(model)


def test_the_library_covers_every_operator_that_reaches_onnx(
    session: Sessions, make_model: MakeModel
) -> None:
    only_ir = {"quantize_dequantize", "dequantize_weight"}  # lowered to others, never packed
    for name, operator in OPERATORS.items():
        if name in only_ir:
            continue
        node = helper.make_node(operator.onnx_name, [], [], domain="ai.isofold")
        graph = helper.make_graph([node], "g", [], [])
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.isofold", 1)]
        with pytest.raises(Exception) as error:  # noqa: PT011 - the text is what matters
            session(helper.make_model(graph, opset_imports=opsets, ir_version=10))
        assert "not a registered function/op" not in str(error.value), operator.onnx_name


def test_widths_other_than_four_and_eight_are_an_error(run_operator: Run) -> None:
    with pytest.raises(Exception, match="attribute 'bits' is 3; expected 4 or 8"):
        run_operator("quantize_activation", [torch.ones(2, 8), None, 32], attributes={"bits": 3})
