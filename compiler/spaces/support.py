"""Where values may be other than zero, whatever the inputs: an interpretation of the graph over {0, 1}.

    support(program) -> {node name: float tensor of zeros and ones}        0: certainly zero

A parameter's support is where it is not zero; an input's is everything. Products multiply supports, sums take the
larger one, contractions ask whether some term can be other than zero, functions with f(0) = 0 keep them, movements
move them. An operator without an entry may be other than zero everywhere. Shapes are those of the example inputs:
what is zero for one batch or length is zero for all, as only parameters decide it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..dialect import linear_grouped
from ..dialect.gated import gated
from ..dialect.rotary import rotary
from ..graph import argument, value
from ..program import Program

aten = torch.ops.aten

_KEEPS_ZERO = (
    aten.relu.default, aten.leaky_relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default,
    aten.abs.default, aten.neg.default, aten.elu.default, aten.hardswish.default, aten.mish.default, aten.erf.default,
    aten.sin.default, aten.expm1.default, aten.log1p.default, aten.sqrt.default, aten.square.default,
    aten.relu6.default, aten.dropout.default,
)  # fmt: skip
"""Functions of single numbers with f(0) = 0."""

_MOVES = (
    aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.reshape.default,
    aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.flatten.using_ints, aten.unflatten.int, aten.expand.default, aten.cat.default, aten.slice.Tensor,
    aten.narrow.default, aten.select.int, aten.stack.default, aten.clone.default, aten.contiguous.default,
    aten.alias.default, aten.flip.default, aten.repeat_interleave.self_int,
)  # fmt: skip
"""Every result is one of the operands' elements."""

_SUMS = (
    aten.linear.default, aten.matmul.default, aten.bmm.default, aten.conv1d.default, aten.conv2d.default,
    aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding, aten.convolution.default,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.mean.dim, aten.sum.dim_IntList,
    aten.cumsum.default, aten.avg_pool1d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default, aten.max_pool1d.default, aten.max_pool2d.default,
    aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
)  # fmt: skip
"""Sums of products with factors that are not negative on supports: zero exactly where every term is."""


class _Support(fx.Interpreter):
    """Runs a program on supports; integers and masks are computed as they are."""

    def __init__(self, program: Program, found: dict[str, Tensor]) -> None:
        super().__init__(program.graph_module)
        self.found = found

    def run_node(self, node: fx.Node) -> Any:
        """Also writes down what is a floating-point value."""
        result = super().run_node(node)
        if isinstance(result, Tensor) and result.is_floating_point() and node.op != "output":
            result = (result != 0).to(torch.float32)
            self.found[node.name] = result
        self.node = node
        return result

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Inputs may be anything."""
        given = super().placeholder(target, args, kwargs)
        return torch.ones_like(given) if _is_float(given) else given

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """One operator."""
        operands = [a for a in (*args, *kwargs.values()) if _is_float(a)]
        rule = _RULES.get(target)
        if rule is not None and (operands or target in _MOVES):
            return rule(target, args, kwargs)
        result = super().call_function(target, args, kwargs)
        return torch.ones_like(result) if _is_float(result) else result


def support(program: Program) -> dict[str, Tensor]:
    """See the module. Values of integers have no entry."""
    found: dict[str, Tensor] = {}
    flat = program.flatten_inputs(program.example_args, program.example_kwargs or {})
    with torch.no_grad():
        _Support(program, found).run(*flat, enable_io_processing=False)
    return found


def _is_float(given: Any) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point()


def _run(target: Any, args: Any, kwargs: Any) -> Any:
    return target(*args, **kwargs)


def _same(target: Any, args: Any, kwargs: Any) -> Tensor:
    result: Tensor = args[0]
    return result


def _sum(target: Any, args: Any, kwargs: Any) -> Tensor:
    first, second = (a if isinstance(a, Tensor) else torch.tensor(float(a != 0)) for a in args[:2])
    return torch.maximum((first != 0).float(), (second != 0).float())


def _product(target: Any, args: Any, kwargs: Any) -> Tensor:
    first, second = (a if isinstance(a, Tensor) else torch.tensor(float(a != 0)) for a in args[:2])
    return (first != 0).float() * (second != 0).float()


def _quotient(target: Any, args: Any, kwargs: Any) -> Tensor:
    second = args[1] if isinstance(args[1], Tensor) else torch.ones(())
    return args[0] * torch.ones_like(second) if isinstance(args[0], Tensor) else torch.ones_like(second)


def _gated(target: Any, args: Any, kwargs: Any) -> Tensor:
    return _product(target, args[:2], {})  # every activation of it is 0 at 0


def _clamp(target: Any, args: Any, kwargs: Any) -> Tensor:
    ends = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
    low, high = ends.get("min"), ends.get("max")
    keeps = all(not isinstance(end, Tensor) for end in (low, high)) and (low or 0) <= 0 <= (high or 0)
    return args[0] if keeps else torch.ones_like(args[0])


def _grouped_linear(target: Any, args: Any, kwargs: Any) -> Tensor:
    x, _, weight, bias = (*args, None)[:4]
    # Any expert may be chosen.
    result = torch.nn.functional.linear(x, (weight != 0).any(0).float())
    return result if bias is None else torch.maximum((result != 0).float(), (bias != 0).any(0).float())


def _embedding(target: Any, args: Any, kwargs: Any) -> Tensor:
    columns = (args[0] != 0).any(0).float()
    return columns.expand(*args[1].shape, -1)


def _rms_norm(target: Any, args: Any, kwargs: Any) -> Tensor:
    weight = args[2] if len(args) > 2 else kwargs.get("weight")
    return args[0] if weight is None else args[0] * (weight != 0)


def _layer_norm(target: Any, args: Any, kwargs: Any) -> Tensor:
    given = dict(zip(("input", "normalized_shape", "weight", "bias"), args, strict=False)) | kwargs
    result = torch.ones_like(given["input"])
    if given.get("weight") is not None:
        result = result * (given["weight"] != 0)
    return result if given.get("bias") is None else torch.maximum(result, (given["bias"] != 0).float())


def _attention(target: Any, args: Any, kwargs: Any) -> Tensor:
    q, v = args[0], args[2]
    values = v.amax(-2, keepdim=True)
    if values.shape[-3] != q.shape[-3]:
        values = values.repeat_interleave(q.shape[-3] // values.shape[-3], -3)
    return values.expand(*q.shape[:-1], v.shape[-1])


def _rotary(target: Any, args: Any, kwargs: Any) -> Tensor:
    x, cos, sin, *rest = args
    # A factor that no sum of two can cancel.
    return rotary.reference(x, torch.ones_like(cos), 3 * torch.ones_like(sin), *rest, **kwargs)


def _moved(target: Any, args: Any, kwargs: Any) -> Any:
    return target(*args, **kwargs)


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_KEEPS_ZERO, _same),
    **dict.fromkeys(_MOVES, _moved),
    **dict.fromkeys(_SUMS, _run),
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _sum,
    aten.mul.Tensor: _product,
    aten.div.Tensor: _quotient,
    gated.overload: _gated,
    aten.clamp.default: _clamp,
    linear_grouped.overload: _grouped_linear,
    aten.embedding.default: _embedding,
    aten.rms_norm.default: _rms_norm,
    aten.layer_norm.default: _layer_norm,
    aten.scaled_dot_product_attention.default: _attention,
    rotary.overload: _rotary,
}


def contracted(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """What a call sums products over: the operands and the dimension of each that is summed; empty for other calls."""
    target = node.target
    if target == aten.linear.default:
        return [(argument(node, "input"), -1), (argument(node, "weight"), 1)]
    if target == linear_grouped.overload:
        return [(argument(node, "input"), -1), (argument(node, "weight"), 2)]
    if target in (aten.matmul.default, aten.bmm.default):
        a, b = (n for n in node.args[:2] if isinstance(n, fx.Node))
        return [(a, -1), (b, -2)]
    if target == aten.scaled_dot_product_attention.default:
        return [(argument(node, "query"), -1), (argument(node, "key"), -1)]
    if target in _CONVOLUTIONS and int(argument(node, "groups")) == 1:
        transposed = target in _TRANSPOSED or (
            target == aten.convolution.default and argument(node, "transposed")
        )
        return [(argument(node, "input"), 1), (argument(node, "weight"), 0 if transposed else 1)]
    if target == aten.rms_norm.default and len(argument(node, "normalized_shape")) == 1:
        return [(argument(node, "input"), -1)]
    return []


_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.convolution.default, *_TRANSPOSED,
)  # fmt: skip


def nonzero_along(found: dict[str, Tensor], node: fx.Node, dim: int) -> Tensor:
    """bool `[size]`: which indices of a dimension may hold something other than zero."""
    held = found[node.name]
    rank = len(value(node).shape)
    others = [d for d in range(rank) if d != dim % rank]
    return held.amax(others) != 0 if others else held != 0
