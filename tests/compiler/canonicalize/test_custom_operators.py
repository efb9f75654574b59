"""Custom operators become what their Python kernels compute, with dynamic sizes, places and float64 runs kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.library import Library, custom_op, register_fake

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.graph import module_path, source_line
from isofold.compiler.python_kernel import Kernels

DECOMPOSED = torch.ops.quantized_decomposed


@pytest.fixture
def operator() -> Iterator[Callable[..., Any]]:
    """`operator(schema, kernel, fake=None, key="CompositeExplicitAutograd", tags=())`: a new operator for one test."""
    libraries: list[Library] = []

    def define(
        schema: str,
        kernel: Callable[..., Any],
        fake: Callable[..., Any] | None = None,
        key: str = "CompositeExplicitAutograd",
        tags: Any = (),
    ) -> Any:
        library = Library("isofold_test", "FRAGMENT")
        libraries.append(library)
        name = schema.split("(")[0]
        library.define(schema, tags=tags)
        library.impl(name, kernel, key)
        if key != "CompositeImplicitAutograd":
            register_fake(f"isofold_test::{name}", fake or (lambda x, *_: torch.empty_like(x)), lib=library)
        return getattr(torch.ops.isofold_test, name)

    yield define
    for library in libraries:
        library._destroy()


def _strict(x: Tensor, step: float) -> Tensor:
    assert x.dtype == torch.float32
    return torch.round(x / step) * step


@pytest.mark.parametrize("key", ["CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd"])
def test_a_kernel_in_python_is_read(key: str, operator: Any, canonical: Any, of: Any) -> None:
    strict = operator("strict(Tensor x, float step) -> Tensor", _strict, key=key)
    found = canonical(of(lambda x: strict(x, 0.25)), torch.randn(3, 8))
    assert found.text == (
        "%0 = div.Tensor(inputs_0, 0.25)\n%1 = round(%0)\n%2 = mul.Tensor(%1, 0.25)\nreturn [%2]"
    )
    assert "isofold_test.strict.default is what its kernel computes" in found.applied


def test_custom_op_of_custom_op_with_two_results_constants_and_writes(
    operator: Any, canonical: Any, of: Any
) -> None:
    inner = operator("inner(Tensor x, float step) -> Tensor", _strict)

    def kernel(x: Tensor, *, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        y = inner(x, 0.5)
        y += torch.tensor([1.0, 2.0])
        y[:, 0] = shift
        return y, y.amax(-1, keepdim=True)

    def fake(x: Tensor, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty((x.shape[0], 1))

    both = operator("both(Tensor x, *, float shift=1.0) -> (Tensor, Tensor)", kernel, fake)
    function = lambda x: both(x, shift=3.0)[0] - both(x)[1]  # noqa: E731
    found = canonical(of(function), torch.randn(3, 2), dynamic_shapes=(({0: Dim("rows")},),))
    assert "isofold_test" not in found.text
    assert found.refused == []
    x = torch.randn(5, 2)
    torch.testing.assert_close(found.program(x), function(x))


def test_decorated_operators_keep_dynamic_sizes_and_places() -> None:
    @custom_op("isofold_test::grouped", mutates_args=())
    def grouped(x: Tensor, size: int) -> Tensor:
        groups = x.reshape(x.shape[0], -1, size)
        step = groups.abs().amax(-1, keepdim=True) / 127
        return (torch.round(groups / step) * step).reshape(x.shape)

    @grouped.register_fake
    def _(x: Tensor, size: int) -> Tensor:
        return torch.empty_like(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Sequential(Rounding())

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x)

    class Rounding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.isofold_test.grouped(x, 4)

    program = capture(Model(), (torch.randn(6, 8),), dynamic_shapes=({0: Dim("rows")},))
    after, (report,) = run_steps(program, [Step(canonicalize)])
    assert report.error == 0.0
    (rounding,) = after.graph.find_nodes(op="call_function", target=torch.ops.aten.round.default)
    assert module_path(rounding) == "inside.0"
    assert "isofold_test.grouped" in (source_line(rounding) or "")
    x = torch.randn(3, 8)
    assert torch.equal(after(x), grouped(x, 4))


def _branching(x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] > 4 else x


def _data(x: Tensor) -> Tensor:
    return x * 2 if bool((x > 0).all()) else x


def _in_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy().round())


REFUSED = {
    "values": ("f(Tensor x) -> Tensor", _data, "its Python kernel cannot be traced"),
    "sizes": ("f(Tensor x) -> Tensor", _branching, "its Python kernel cannot be traced"),
    "numpy": ("f(Tensor x) -> Tensor", _in_numpy, "its Python kernel cannot be traced"),
    "numbers": ("f(Tensor x) -> Tensor", lambda x: x * x.amax().item(), "numbers out of tensors"),
    "type": ("f(Tensor x) -> Tensor", lambda x: x.double(), "its kernel returns float64 [s"),
    "inside": ("f(Tensor x) -> Tensor", lambda x: torch.ops.isofold_test.g(x) + 1, "cannot be traced"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_stays_with_the_reason(case: str, operator: Any, canonical: Any, of: Any) -> None:
    schema, kernel, reason = REFUSED[case]
    operator("g(Tensor x) -> Tensor", _data)
    function = operator(schema, kernel)
    model, x = of(lambda x: function(x) + 1), torch.randn(6, 8)
    program = capture(model, (x,), dynamic_shapes=(({0: Dim("rows")},),))
    after, (report,) = run_steps(program, [Step(canonicalize)])
    (entry,) = [entry for entry in report.refused if "isofold_test" in entry.reason]
    assert reason in entry.reason
    assert "(s" in str(after.placeholders[0].meta["val"].shape).replace("Size([", "(")
    for rows in (6, 3):
        assert torch.equal(after(x[:rows]), model(x[:rows]))


def _call(target: Any, *arguments: Any) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    with torch._subclasses.FakeTensorMode():
        x.meta["val"] = torch.empty(4, 8)
    return graph.call_function(target, (x, *arguments))


def test_operators_that_are_never_read(operator: Any) -> None:
    write = operator("write(Tensor(a!) x) -> ()", lambda x: None)
    view = operator("view(Tensor(a) x) -> Tensor(a)", lambda x: x[:1])
    draw = operator("draw(Tensor x) -> Tensor", torch.rand_like, tags=torch.Tag.nondeterministic_seeded)
    elsewhere = operator("elsewhere(Tensor x) -> Tensor", lambda x: x, key="CUDA")
    compiled = torch.ops.quantized.embedding_bag_byte_unpack
    kernels = Kernels()
    reasons = [kernels.trace(_call(op.default)) for op in (write, view, draw, elsewhere, compiled)]
    assert reasons[:4] == [
        "it changes its arguments",
        "its result may share memory with its arguments",
        "it draws random numbers",
        "it has no kernel for the CPU",
    ]
    assert isinstance(reasons[4], str)
    assert reasons[4].startswith("its kernel is compiled (")


def test_float64_runs_of_an_operator_that_neither_is_read_nor_takes_float64(operator: Any, of: Any) -> None:
    def kernel(x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return x * x.amax().item()

    stubborn = operator("stubborn(Tensor x) -> Tensor", kernel)
    x = torch.randn(3, 8)
    program = capture(of(lambda x: stubborn(x * 2) + 1), (x,))
    (got,) = program.run_float64()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, (kernel(x * 2) + 1).double())


def _static(x: Tensor) -> Tensor:
    codes = DECOMPOSED.quantize_per_tensor(x, 0.03, 3, -128, 127, torch.int8)
    return DECOMPOSED.dequantize_per_tensor(codes, 0.03, 3, -128, 127, torch.int8)


def _one_range(x: Tensor) -> Tensor:
    scale, zero = DECOMPOSED.choose_qparams(x, 0, 255, 1e-6, torch.uint8)
    codes = DECOMPOSED.quantize_per_tensor(x, scale, zero, 0, 255, torch.uint8)
    return DECOMPOSED.dequantize_per_tensor(codes, scale, zero, 0, 255, torch.uint8)


def _one_symmetric_range(x: Tensor) -> Tensor:
    scale, zero = DECOMPOSED.choose_qparams_symmetric(x, -128, 127, 1e-6, torch.int8)
    codes = DECOMPOSED.quantize_per_tensor(x, scale, zero, -128, 127, torch.int8)
    return DECOMPOSED.dequantize_per_tensor(codes, scale, zero, -128, 127, torch.int8)


def _per_token(x: Tensor) -> Tensor:
    scale, zero = DECOMPOSED._choose_qparams_per_token_asymmetric_impl(x, torch.int8)
    codes = DECOMPOSED.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    return DECOMPOSED.dequantize_per_token(codes, scale, zero, -128, 127, torch.int8, torch.float32)


def _qat(x: Tensor) -> Tensor:
    scale, zero = torch.linspace(0.01, 0.1, 8), torch.zeros(8, dtype=torch.int32)
    x = torch.fake_quantize_per_channel_affine(x, scale, zero, 1, -128, 127)
    return torch.fake_quantize_per_tensor_affine(x, 0.03, 128, 0, 255)


@pytest.mark.parametrize("function", [_static, _one_range, _one_symmetric_range, _per_token, _qat])
@pytest.mark.parametrize("dynamic", [False, True])
def test_operators_of_torch(function: Any, dynamic: bool, canonical: Any, of: Any) -> None:
    x = torch.randn(5, 8)
    x[0, 0] = 9.0  # clamped where the range is fixed
    found = canonical(of(function), x, dynamic_shapes=(({0: Dim("rows")},),) if dynamic else None)
    assert "quantize" not in found.text
    assert "torch.int" not in found.text
    assert "torch.uint" not in found.text
    if dynamic:
        more = torch.randn(7, 8)
        torch.testing.assert_close(found.program(more), function(more))


def test_the_text_of_a_static_pair(canonical: Any, of: Any) -> None:
    assert canonical(of(_static), torch.randn(5, 8)).text == (
        "%0 = mul.Tensor(inputs_0, 33.33333)\n"
        "%1 = round(%0)\n"
        "%2 = add.Tensor(%1, 3)\n"
        "%3 = clamp(%2, -128, 127)\n"
        "%4 = sub.Tensor(%3, 3)\n"
        "%5 = mul.Tensor(%4, 0.03)\n"
        "return [%5]"
    )
