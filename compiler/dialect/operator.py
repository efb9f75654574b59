"""Declaring a dialect operator: schema, meaning, shape, gradient and cost in one place.

An operator is a torch custom operator `isofold::name` whose PyTorch reference *is* its meaning. Runtimes
lower it under its ONNX name (domain `ai.isofold`) and are tested against the reference.

Gradients are those of the reference: backward recomputes it under autograd, so a program stays
differentiable at every level. An operator may give a `surrogate` to differentiate instead (rounding has a
straight-through gradient).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "isofold"
ONNX_DOMAIN = "ai.isofold"
ONNX_VERSION = 1

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Cost:
    """What one call must read, write and compute: bytes of weights, of activations, and operations."""

    weight_bytes: int
    activation_bytes: int
    operations: int


@dataclass(frozen=True)
class Operator:
    """One dialect operator."""

    name: str
    onnx_name: str
    schema: str
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    packed_argument: str | None
    """Name of the argument that holds packed weights, if any."""

    @property
    def overload(self) -> torch._ops.OpOverload:
        """What appears as `node.target` in graphs."""
        overload: torch._ops.OpOverload = getattr(torch.ops.isofold, self.name).default
        return overload


OPERATORS: dict[str, Operator] = {}


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the given tensors (fake tensors too, with symbolic sizes at their hints)."""
    return sum(int(t.numel()) * t.element_size() for t in tensors if t is not None)


def _differentiable(overload: torch._ops.OpOverload, reference: Callable[..., Any]) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.positions = [i for i, v in enumerate(inputs) if isinstance(v, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.positions))
        ctx.rest = [None if isinstance(v, Tensor) else v for v in inputs]

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        inputs = list(ctx.rest)
        for position, saved in zip(ctx.positions, ctx.saved_tensors, strict=True):
            wanted = ctx.needs_input_grad[position]
            inputs[position] = saved.detach().requires_grad_(wanted)
        with torch.enable_grad():
            outputs = reference(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        wanted_at = [i for i in ctx.positions if ctx.needs_input_grad[i]]
        result: list[Tensor | None] = [None] * len(inputs)
        if pairs and wanted_at:
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [inputs[i] for i in wanted_at],
                [g for _, g in pairs],
                allow_unused=True,
            )
            for position, gradient in zip(wanted_at, found, strict=True):
                result[position] = gradient
        return tuple(result)

    torch.library.register_autograd(overload, backward, setup_context=setup_context)


def operator(
    *,
    onnx_name: str,
    schema: str,
    shape: Callable[..., Any],
    cost: Callable[..., Cost],
    surrogate: Callable[..., Any] | None = None,
    packed_argument: str | None = None,
) -> Callable[[Callable[..., Any]], Operator]:
    """Declare the decorated reference function as `isofold::<its name>`.

    `schema` is `(arguments) -> results` in torch's schema language. `shape` is the fake function: same
    arguments, empty results. `cost` takes the same arguments. Results must not alias arguments.
    """

    def declare(reference: Callable[..., Any]) -> Operator:
        name = reference.__name__
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", shape, lib=_LIBRARY)
        declared = Operator(name, onnx_name, schema, reference, cost, packed_argument)
        _differentiable(declared.overload, surrogate or reference)
        OPERATORS[name] = declared
        return declared

    return declare


def operator_of(target: object) -> Operator | None:
    """The dialect operator that a node's target is, or None for ATen and everything else."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return OPERATORS.get(target._schema.name.split("::")[1])
    return None
