"""Rules of ATen operators against torch, with dynamic sizes: one program for each family, run at two shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from isofold.compiler.capture import capture
from isofold.compiler.errors import UnsupportedError
from isofold.runtimes.tvm.executor import Executor
from isofold.runtimes.tvm.lower import lower

BATCH, LENGTH = Dim("batch", min=1, max=64), Dim("length", min=4, max=512)
Function = Callable[..., Tensor]


class Together(nn.Module):
    def __init__(self, functions: Sequence[Function]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(f(*inputs) for f in self.functions)


def signals(generator: torch.Generator, batch: int, channels: int, length: int) -> tuple[Tensor, Tensor]:
    """Values `[batch, channels, length]` and `[batch, channels, length, 7]`."""
    sizes = (batch, channels, length)
    return torch.randn(sizes, generator=generator), torch.randn((*sizes, 7), generator=generator)


def check(
    execute: Callable[..., Executor],
    functions: Sequence[Function],
    shapes: Sequence[tuple[Tensor, ...]],
    dynamic: Any,
    tolerance: float = 2e-6,
) -> None:
    module = Together(functions)
    executor = execute(capture(module, shapes[0], None, {"inputs": dynamic}))
    for inputs in shapes:
        expected = module(*inputs)
        got = executor.run([t.numpy() for t in inputs])
        for position, (want, have) in enumerate(zip(expected, got, strict=True)):
            assert tuple(want.shape) == have.shape, position
            assert str(want.dtype).removeprefix("torch.") == have.dtype.name, position
            if want.dtype.is_floating_point:
                scale = max(float(want.abs().nan_to_num(0, 0, 0).max()) if want.numel() else 0.0, 1.0)
                torch.testing.assert_close(
                    torch.from_numpy(np.array(have)), want, rtol=0, atol=tolerance * scale, equal_nan=True,
                    msg=f"function {position}",
                )  # fmt: skip
            else:
                assert np.array_equal(want.numpy(), have), position


def pair(batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return torch.randn(batch, length, 6, generator=generator), torch.randn(length, 6, generator=generator)


DYNAMIC = ({0: BATCH, 1: LENGTH}, {0: LENGTH})
SHAPES = [pair(2, 5), pair(3, 17)]


def test_arithmetic(execute: Callable[..., Executor]) -> None:
    functions: list[Function] = [
        lambda x, y: x + y, lambda x, y: torch.add(x, y, alpha=0.5), lambda x, y: 1 - x, lambda x, y: x * 3 - y,
        lambda x, y: x / (y * y + 1), lambda x, y: torch.div(x, 0.3, rounding_mode="floor"),
        lambda x, y: torch.div(x * 9, 2, rounding_mode="trunc"), lambda x, y: torch.remainder(x, 0.7),
        lambda x, y: torch.fmod(x, 0.7), lambda x, y: x**2 + y**3, lambda x, y: (x.abs() + 0.1) ** 0.37,
        lambda x, y: x.abs() ** 0.5, lambda x, y: torch.maximum(x, y), lambda x, y: torch.minimum(x, y),
        lambda x, y: x.clamp(-0.5, 0.5), lambda x, y: x.clamp_min(0.1), lambda x, y: x.clamp(max=0.2),
        lambda x, y: torch.addcmul(x, y, y, value=0.3), lambda x, y: torch.lerp(x, y, 0.3),
        lambda x, y: torch.atan2(x, y), lambda x, y: -x, lambda x, y: x.sign(), lambda x, y: x.reciprocal(),
    ]  # fmt: skip
    check(execute, functions, SHAPES, DYNAMIC, 1e-5)


def test_elementary_functions(execute: Callable[..., Executor]) -> None:
    functions: list[Function] = [
        lambda x, y: x.exp(), lambda x, y: (x.abs() + 0.1).log(), lambda x, y: (x.abs() + 0.1).rsqrt(),
        lambda x, y: x.abs().sqrt(), lambda x, y: (3 * x).sin(), lambda x, y: (3 * x).cos(), lambda x, y: x.tanh(),
        lambda x, y: x.sigmoid(), lambda x, y: x.erf(), lambda x, y: F.relu(x), lambda x, y: F.silu(x),
        lambda x, y: F.gelu(x), lambda x, y: F.gelu(x, approximate="tanh"), lambda x, y: F.softplus(9 * x),
        lambda x, y: F.leaky_relu(x, 0.1), lambda x, y: F.elu(x), lambda x, y: F.hardswish(3 * x),
        lambda x, y: F.hardsigmoid(3 * x), lambda x, y: F.mish(x), lambda x, y: (3 * x).floor(),
        lambda x, y: (3 * x).ceil(), lambda x, y: (3 * x).round(), lambda x, y: (3 * x).trunc(),
        lambda x, y: x.abs().log1p(), lambda x, y: F.glu(x, -1), lambda x, y: F.relu6(9 * x),
    ]  # fmt: skip
    check(execute, functions, SHAPES, DYNAMIC, 3e-6)


def test_comparison_and_selection(execute: Callable[..., Executor]) -> None:
    functions: list[Function] = [
        lambda x, y: x > y, lambda x, y: x <= 0.1, lambda x, y: x == x.round(), lambda x, y: x != 0,
        lambda x, y: (x > 0) & (y > 0), lambda x, y: (x > 0) | (y > 0), lambda x, y: (x > 0) ^ (y > 0),
        lambda x, y: ~(x > 0), lambda x, y: torch.logical_not(x > 0), lambda x, y: torch.where(x > y, x, y),
        lambda x, y: torch.where(x > 0, x, 0.5), lambda x, y: x.masked_fill(y > 0, -3.0),
        lambda x, y: (x > 0).to(torch.int64) + 2, lambda x, y: (4 * x).to(torch.int32), lambda x, y: x.to(torch.bool),
        lambda x, y: x.isnan(), lambda x, y: (x / 0).isinf(), lambda x, y: (x > 0) == (y > 0),
        lambda x, y: (4 * x).to(torch.int64) // 3, lambda x, y: (4 * x).to(torch.int64) % 3,
        lambda x, y: (4 * x).to(torch.int64) & 5, lambda x, y: (x > 0).any(-1), lambda x, y: (x > -1).all(1),
    ]  # fmt: skip
    check(execute, functions, SHAPES, DYNAMIC)


def test_views(execute: Callable[..., Executor]) -> None:
    functions: list[Function] = [
        lambda x, y: x.transpose(0, 1), lambda x, y: x.permute(2, 0, 1), lambda x, y: x.reshape(x.shape[0], -1),
        lambda x, y: x.unflatten(2, (2, 3)).transpose(1, 2), lambda x, y: x[:, :, 1:5:2], lambda x, y: x[:, -3:],
        lambda x, y: x[:, 0], lambda x, y: x[..., -1], lambda x, y: x.unsqueeze(1).expand(-1, 4, -1, -1),
        lambda x, y: y.expand(x.shape[0], -1, -1) + x, lambda x, y: torch.cat([x, x * 2, x[:, :1]], 1),
        lambda x, y: torch.cat([x[..., :4], x[..., 6:]], -1),
        lambda x, y: torch.stack([x, -x], 1), lambda x, y: x.split([2, 4], -1)[1], lambda x, y: x.chunk(3, -1)[2],
        lambda x, y: x.unbind(-1)[3], lambda x, y: F.pad(x, (1, 2, 0, 3)), lambda x, y: F.pad(x, (-1, 2), value=4.0),
        lambda x, y: F.pad(x, (2, 1), mode="reflect"), lambda x, y: F.pad(x, (2, 1), mode="replicate"),
        lambda x, y: x.repeat(2, 1, 3), lambda x, y: x.repeat_interleave(2, 2), lambda x, y: x.flip(1),
        lambda x, y: x.roll(2, 2), lambda x, y: x.tril(), lambda x, y: x.triu(1), lambda x, y: x.diff(dim=1),
        lambda x, y: x.movedim(0, 2), lambda x, y: y.t(), lambda x, y: x.unfold(2, 3, 2),
        lambda x, y: x.diagonal(dim1=1, dim2=2)[:, :2], lambda x, y: F.pad(x, (0, 0, 0, x.shape[1] % 4)),
    ]  # fmt: skip
    check(execute, functions, SHAPES, DYNAMIC)


def test_creation(execute: Callable[..., Executor]) -> None:
    functions: list[Function] = [
        lambda x, y: torch.arange(x.shape[1]) + y[:, 0], lambda x, y: torch.arange(2, x.shape[1] + 3, 2) * 1.5,
        lambda x, y: torch.ones_like(x) * y, lambda x, y: torch.zeros(x.shape[1], 3) + y[:, :1],
        lambda x, y: torch.full((x.shape[0], 2), 0.25) + x[:, 0, :2], lambda x, y: x.new_ones(x.shape[1]) + y[:, 0],
        lambda x, y: torch.linspace(-1, 2, 6) + y, lambda x, y: torch.eye(6) @ y[0], lambda x, y: x.new_zeros(()) + y,
        lambda x, y: torch.full_like(x, 7), lambda x, y: x * x.shape[1],
    ]  # fmt: skip
    check(execute, functions, SHAPES, DYNAMIC)


def test_reductions(execute: Callable[..., Executor]) -> None:
    functions: list[Function] = [
        lambda x, y: x.sum(), lambda x, y: x.sum((0, 2)), lambda x, y: x.mean(1, keepdim=True), lambda x, y: x.amax(-1),
        lambda x, y: x.amin((1, 2)), lambda x, y: x.max(), lambda x, y: x.max(1).values, lambda x, y: x.max(1).indices,
        lambda x, y: x.min(-1).indices, lambda x, y: x.argmax(1), lambda x, y: (x.round() * 0).argmax(-1),
        lambda x, y: x.var(-1), lambda x, y: x.std(1, correction=0, keepdim=True), lambda x, y: x.softmax(-1),
        lambda x, y: x.softmax(1), lambda x, y: x.log_softmax(-1), lambda x, y: x.logsumexp(1),
        lambda x, y: x.topk(3, -1).values, lambda x, y: x.topk(2, -1, largest=False).indices,
        lambda x, y: x.sort(1).values, lambda x, y: x.round().sort(dim=1, descending=True, stable=True)[1],
        lambda x, y: torch.zeros_like(x).scatter(-1, x.topk(2, -1).indices, 1.0),
        lambda x, y: x.scatter(-1, x[:, :2].topk(2, -1).indices, x[:, :2, :2] * 3),
        lambda x, y: x.cumprod(-1),
        lambda x, y: x.cumsum(1), lambda x, y: (x > 0).cumsum(-1), lambda x, y: torch.linalg.vector_norm(x, dim=-1),
        lambda x, y: torch.linalg.vector_norm(x, 1, dim=1), lambda x, y: F.layer_norm(x, (6,)),
        lambda x, y: F.rms_norm(x, (6,), y[0]), lambda x, y: F.group_norm(x.transpose(1, 2), 3, y[0, :6], y[1, :6]),
        lambda x, y: F.instance_norm(x.transpose(1, 2)),
    ]  # fmt: skip
    check(execute, functions, SHAPES, DYNAMIC, 1e-5)


def test_products(execute: Callable[..., Executor]) -> None:
    functions: list[Function] = [
        lambda x, y: x @ y.t(), lambda x, y: x @ y[0], lambda x, y: x.transpose(1, 2) @ x,
        lambda x, y: torch.bmm(x, x.transpose(1, 2)), lambda x, y: F.linear(x, y[:4], y[0, :4]),
        lambda x, y: torch.addmm(y[0, :4], y, y[:4].t(), beta=0.5, alpha=2), lambda x, y: torch.outer(y[0], y[1]),
        lambda x, y: torch.baddbmm(x[:, :, :1], x, x[:, :1].transpose(1, 2)), lambda x, y: torch.dot(y[0], y[1]),
    ]  # fmt: skip
    check(execute, functions, SHAPES, DYNAMIC, 1e-5)


def test_indexing(execute: Callable[..., Executor]) -> None:
    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(length)
        x = torch.randn(batch, length, 6, generator=generator)
        ids = torch.randint(0, min(length, 6), (batch, 4), generator=generator)
        return x, ids, torch.tensor([1, -1, 0])

    functions: list[Function] = [
        lambda x, i, j: F.embedding(i, x[0]), lambda x, i, j: x.gather(2, i[:, None, :].expand(-1, x.shape[1], -1)),
        lambda x, i, j: x[:, j], lambda x, i, j: x[:, :, j], lambda x, i, j: x[0, j[:, None], j],
        lambda x, i, j: x[:, j, :][..., j], lambda x, i, j: x.index_select(2, i[0]),
        lambda x, i, j: x[torch.arange(x.shape[0]), i[:, 0]], lambda x, i, j: x[torch.arange(x.shape[0])[:, None], i],
        lambda x, i, j: x.slice_scatter(x[:, :, :2] * 3, 2, 1, 3), lambda x, i, j: x.select_scatter(x[:, 0] * 2, 1, 2),
        lambda x, i, j: x[0].index_put((j,), x[0, :3] * 9), lambda x, i, j: x[0].index_put((i[0],), x[0, :4], True),
        lambda x, i, j: x[0, :, :4].scatter_add(0, i[:, :3], x[:, 0, :4]),
        lambda x, i, j: x[0].index_add(0, i[0], x[1, :4]),
        lambda x, i, j: x[0].scatter_reduce(0, i, x[:, 0, :4], "amax"),
        lambda x, i, j: x[0].scatter_reduce(0, i, x[:, 0, :4], "amin"),
    ]  # fmt: skip
    check(execute, functions, [inputs(2, 5), inputs(3, 9)], ({0: BATCH, 1: LENGTH}, {0: BATCH}, None))


def test_operators_without_a_rule_are_taken_apart(execute: Callable[..., Executor]) -> None:
    grid = torch.rand(1, 3, 4, 2) * 2 - 1
    functions: list[Function] = [
        lambda x, y: F.prelu(x, y[0, :1]), lambda x, y: F.celu(x), lambda x, y: F.cosine_similarity(x[0], y),
        lambda x, y: F.one_hot(x[:, 0].argmax(-1), 6), lambda x, y: F.cross_entropy(x[:, 0], x[:, 1].argmax(-1)),
        lambda x, y: F.grid_sample(x[:1, None], grid, align_corners=False), lambda x, y: F.pairwise_distance(x[0], y),
        lambda x, y: F.unfold(x[:, None, :, :], (2, 3)),
        lambda x, y: torch.einsum("bld,dn,bl->bn", x, y.t(), x[..., 0]),
    ]  # fmt: skip
    check(execute, functions, SHAPES[:1], (None, None), 1e-5)


def test_convolutions(execute: Callable[..., Executor]) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(*s, generator=generator) for s in ((8, 4, 3), (8, 1, 3), (4, 8, 4), (6, 4, 3, 3), (6,))
    ]
    one, depthwise, transposed, two, bias = weights
    longer = Dim("length", min=8, max=512)

    functions: list[Function] = [
        lambda x, z: F.conv1d(x, one, padding=1), lambda x, z: F.conv1d(x, one, stride=2, dilation=2),
        lambda x, z: F.conv1d(x, one, padding="same"), lambda x, z: F.conv1d(x.repeat(1, 2, 1), depthwise, groups=8),
        lambda x, z: F.conv_transpose1d(x, transposed, stride=2, padding=1),
        lambda x, z: F.conv_transpose1d(x, transposed, stride=3, output_padding=1),
        lambda x, z: F.conv2d(z, two, bias, padding=1), lambda x, z: F.conv2d(z, two, stride=(2, 1), padding=(0, 1)),
        lambda x, z: F.max_pool2d(z, 3, 2, 1), lambda x, z: F.avg_pool2d(z, 2),
        lambda x, z: F.adaptive_avg_pool2d(z, 1),
        lambda x, z: F.batch_norm(x, bias[:4] * 0, bias[:4].abs() + 1, bias[:4], bias[:4]),
        lambda x, z: F.pixel_shuffle(z, 2),
    ]  # fmt: skip
    check(
        execute,
        functions,
        [signals(generator, 2, 4, 9), signals(generator, 3, 4, 14)],
        ({0: BATCH, 2: longer}, {0: BATCH, 2: longer}),
        1e-5,
    )


def test_pooling_and_resizing(execute: Callable[..., Executor]) -> None:
    generator = torch.Generator().manual_seed(2)
    longer = torch.export.Dim("longer", min=5)

    functions: list[Function] = [
        lambda x, z: F.avg_pool2d(z, 3, 2, 1, count_include_pad=False),
        lambda x, z: F.avg_pool2d(z, 2, divisor_override=3), lambda x, z: F.avg_pool1d(x, 3, 1, 1),
        lambda x, z: F.adaptive_avg_pool2d(z, (3, 2)), lambda x, z: F.adaptive_avg_pool1d(x, 4),
        lambda x, z: F.interpolate(z, scale_factor=2, mode="bilinear"),
        lambda x, z: F.interpolate(z, size=(11, 5), mode="bilinear", align_corners=True),
        lambda x, z: F.interpolate(z, size=(5, 11), mode="bilinear"),
        lambda x, z: F.interpolate(z, scale_factor=(1.5, 0.75), mode="bilinear"),
        lambda x, z: F.interpolate(z, size=(9, 3), mode="bicubic"),
        lambda x, z: F.interpolate(z, scale_factor=2.5, mode="bicubic", align_corners=True),
        lambda x, z: F.interpolate(x, scale_factor=3, mode="linear"),
        lambda x, z: F.interpolate(z, scale_factor=2.5, mode="nearest"), lambda x, z: F.interpolate(x, size=5),
    ]  # fmt: skip
    check(
        execute,
        functions,
        [signals(generator, 2, 3, 9), signals(generator, 3, 3, 14)],
        ({0: BATCH, 2: longer}, {0: BATCH, 2: longer}),
        1e-5,
    )
    # What rounds up puts conditions on sizes, which are known here.
    functions = [
        lambda x, z: F.avg_pool2d(z, 3, 2, 1, ceil_mode=True), lambda x, z: F.max_pool2d(z, 3, 2, 1, ceil_mode=True),
        lambda x, z: F.avg_pool2d(z, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        lambda x, z: F.avg_pool2d(z, 2, 3, ceil_mode=True), lambda x, z: F.avg_pool1d(x, 3, 2, 1, True),
    ]  # fmt: skip
    check(
        execute,
        functions,
        [signals(generator, 2, 3, 9), signals(generator, 3, 3, 9)],
        ({0: BATCH}, {0: BATCH}),
        1e-5,
    )


def test_convolutions_with_rows_of_any_length(execute: Callable[..., Executor]) -> None:
    generator = torch.Generator().manual_seed(1)
    whole, strided, turned, depthwise = (
        torch.randn(*s, generator=generator)
        for s in ((32, 16, 3, 3), (32, 16, 2, 2), (16, 16, 3, 3), (16, 1, 5, 5))
    )
    bias = torch.randn(32, generator=generator)
    functions: list[Function] = [
        lambda z: F.conv2d(z, whole, bias, padding=1), lambda z: F.conv2d(z, whole[:, :, :1, :1], bias),
        lambda z: F.conv2d(z, strided, stride=2), lambda z: F.conv2d(z, whole, stride=(1, 3), padding=(0, 2)),
        lambda z: F.conv2d(z, depthwise, padding=2, groups=16),
        lambda z: F.conv_transpose2d(z, turned, stride=2, padding=1, output_padding=1),
    ]  # fmt: skip
    widths = (34, 4, 7, 16, 17, 31, 49)
    shapes = [(torch.randn(2, 16, 4 + width % 3, width, generator=generator),) for width in widths]
    free = {0: BATCH, 2: Dim("height", min=4, max=64), 3: LENGTH}
    check(execute, functions, shapes, (free,), 1e-5)


def test_results_without_elements(execute: Callable[..., Executor]) -> None:
    functions: list[Function] = [
        lambda x: x[:, :0] * 2, lambda x: (x[:, :0] * 2).sum(1), lambda x: torch.cat([x[:, :0] * 2, x + 1], 1),
        lambda x: (x[:, :0] + 1).unsqueeze(-1).expand(-1, -1, 7) * 3, lambda x: x[:, :0] @ torch.ones(0, 5),
    ]  # fmt: skip
    check(execute, functions, [(torch.randn(3, 6),), (torch.randn(5, 6),)], ({0: BATCH},))


def test_sizes_that_only_expressions_determine(execute: Callable[..., Executor]) -> None:
    half = Dim("half", min=1, max=64)
    module = Together([lambda x: x.reshape(x.shape[0], -1, 2).sum(-1), lambda x: x * x.shape[1]])
    inputs = [(torch.randn(2, 6),), (torch.randn(2, 10),)]
    executor = execute(capture(module, inputs[0], None, {"inputs": ({1: 2 * half},)}))
    for given in inputs:
        for want, have in zip(module(*given), executor.run([given[0].numpy()]), strict=True):
            torch.testing.assert_close(torch.from_numpy(np.array(have)), want)


def test_results_that_are_inputs_weights_sizes_or_repeated(execute: Callable[..., Executor]) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Buffer(torch.arange(3.0))

        def forward(self, x: Tensor) -> tuple[Any, ...]:
            y = x + 1
            return x, self.w, y, y, x.shape[0] * 2

    x = torch.randn(4, 3)
    got = execute(capture(Odd(), (x,), None, ({0: BATCH},))).run([torch.ones(5, 3).numpy()])
    assert [g.shape for g in got] == [(5, 3), (3,), (5, 3), (5, 3), ()]
    assert int(got[4]) == 10
    assert got[1].tolist() == [0, 1, 2]


def test_every_unsupported_operator_is_listed_with_its_place() -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.qr(x).Q + torch.special.bessel_j0(x)

    program = capture(Strange(), (torch.randn(3, 3),), None, None)
    with pytest.raises(UnsupportedError) as caught:
        lower(program)
    text = str(caught.value)
    assert "aten.linalg_qr.default at <root>" in text
    assert "aten.special_bessel_j0.default at <root>" in text
    assert "test_rules.py" in text


def test_what_a_rule_refuses_is_listed_with_its_place() -> None:
    class Refused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(x, x.shape[-1] - 2) + torch.linalg.vector_norm(x, 3.0)

    size = torch.export.Dim("size", min=4)
    program = capture(Refused(), (torch.randn(1, 2, 5, 5),), None, ({2: size, 3: size},))
    with pytest.raises(UnsupportedError) as caught:
        lower(program)
    text = str(caught.value)
    assert "Adaptive average pooling is lowered to sizes that are known" in text
    assert "This norm is not lowered" in text
    assert "test_rules.py" in text


def test_other_float_types_are_refused_for_the_op_library() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.isofold.hadamard(x, [4], False)

    program = capture(Half(), (torch.randn(2, 4).half(),), None, None)
    with pytest.raises(UnsupportedError, match="The op library computes in float32"):
        lower(program)
