"""What a custom operator computes, as a graph of ATen operators.

    ns::op(x, ...) with a kernel in Python  →  the ATen calls that the kernel makes of fake values of x

Libraries register operators for what they want to keep whole while a model is traced:
`torchao::quantize_affine`, `quantized_decomposed::quantize_per_tensor`, a user's `torch.library.custom_op`.
No runtime knows them, but the kernel that PyTorch would run on the CPU is often Python on ATen. It is called with the
fake values of a node, under a tracer, so that symbolic sizes stay symbols.

Side conditions, each with its reason where it fails: the operator changes none of its arguments, returns no view of
one and draws no random numbers; the kernel was registered from Python (where PyTorch's dispatcher says that it was:
compiled kernels would read memory that fake values do not have); it branches on no values and no dynamic sizes, makes
only ATen calls, through other custom operators where need be, and returns what the operator's own shape function says.
A kernel is taken for a function of its arguments, as PyTorch asks of it: what it reads elsewhere is read once, here.
A gradient registered for the operator is not kept.

Some of PyTorch's own rounding operators have kernels that cannot be read, and are taken by formula
(`rounding_formulas`).
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from .graph import value
from .rounding_formulas import FORMULAS

_KNOWN = ("aten", "prim", "prims", "isofold")
"""Namespaces of operators that stay."""
_COMPILED = re.compile(r"\.(c|cc|cpp|cxx|cu|cuh|h|hpp|mm)$")
_ON_THE_CPU = re.compile(r"^CPU: registered at (.+):\d+ \[", re.MULTILINE)
_MOST_LAYERS = 8
"""Custom operators inside custom operators, at most this deep."""

_ITEMS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)

Traced = fx.GraphModule | str
"""The graph of a call, whose placeholders are the node's `all_input_nodes`, or why there is none."""


class Kernels:
    """Graphs of calls. Equal calls (operator, numbers, shapes and types) are traced once."""

    def __init__(self) -> None:
        self._known: dict[Any, Traced] = {}

    def trace(self, node: fx.Node) -> Traced:
        """The graph of a call of an operator that `is_custom`, or the reason why it has none."""
        assert isinstance(node.target, torch._ops.OpOverload)
        inputs = {n: i for i, n in enumerate(node.all_input_nodes)}
        spelled = map_arg((node.args, node.kwargs), lambda n: f"%{inputs[n]}")
        key = (node.target, repr(spelled), tuple(_kind(value(n)) for n in inputs))
        if key not in self._known:
            self._known[key] = _trace(node)
        return self._known[key]


def is_custom(target: object) -> bool:
    """Whether a call's target is an operator to be replaced by what it computes."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target.namespace not in _KNOWN or target.name() in FORMULAS


def _kind(fake: Any) -> Any:
    """What of a value its trace depends on."""
    if isinstance(fake, Tensor):
        return str(fake.dtype), tuple(map(str, fake.shape)), str(fake.device)
    return str(fake)


def _trace(node: fx.Node) -> Traced:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    kernel = _kernel(target)
    if isinstance(kernel, str):
        return kernel
    inputs = list(node.all_input_nodes)
    fakes = [value(n) for n in inputs]
    if not all(isinstance(fake, (Tensor, torch.SymInt, torch.SymFloat, int, float)) for fake in fakes):
        return "it reads values that are neither tensors nor sizes"

    def call(*given: Any) -> Any:
        known = dict(zip(inputs, given, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
        return kernel(*args, **kwargs)

    inner: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
    for _ in range(_MOST_LAYERS):
        traced = _with_tracer(call, fakes, inner)
        if not isinstance(traced, str) and any(_mutates(n.target) for n in traced.graph.nodes):
            traced = _with_tracer(torch.func.functionalize(call, remove="mutations"), fakes, inner)
        if isinstance(traced, str):
            return traced
        if any(n.target in _ITEMS for n in traced.graph.nodes):
            return "its kernel takes numbers out of tensors (.item())"
        foreign = [
            n.target for n in traced.graph.nodes if n.op == "call_function" and not _is_plain(n.target)
        ]
        if not foreign:
            return _as_declared(traced, value(node))
        for each in foreign:
            found = _kernel(each) if is_custom(each) else "it is no operator of ATen"
            if isinstance(found, str):
                return f"its kernel calls {each}: {found}"
            inner[each] = found
    return f"its kernel calls custom operators more than {_MOST_LAYERS} deep"


def _with_tracer(call: Callable[..., Any], fakes: list[Any], inner: dict[Any, Any]) -> Traced:
    mode = next((f.fake_mode for f in fakes if isinstance(f, torch._subclasses.FakeTensor)), None)
    mode = mode or torch._subclasses.FakeTensorMode()
    guarded = mode.shape_env.error_on_new_guards() if mode.shape_env is not None else contextlib.nullcontext()
    try:
        with torch.no_grad(), mode, guarded:
            traced: fx.GraphModule = make_fx(
                call,
                decomposition_table=inner,
                tracing_mode="real",
                _allow_non_fake_inputs=True,
            )(*fakes)
    except Exception as error:  # whatever a user's kernel raises
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return f"its Python kernel cannot be traced: {type(error).__name__}: {text[:200]}"
    return traced


def _as_declared(traced: fx.GraphModule, declared: Any) -> Traced:
    made = pytree.tree_leaves(map_arg(_result(traced), value))
    wanted = pytree.tree_leaves(declared)
    if [_kind(leaf) for leaf in made] != [_kind(leaf) for leaf in wanted]:
        return f"its kernel returns {_words(made)}, and its shape function says {_words(wanted)}"
    return traced


def _result(traced: fx.GraphModule) -> Any:
    return next(n for n in reversed(traced.graph.nodes) if n.op == "output").args[0]


def _words(leaves: list[Any]) -> str:
    named = (
        f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
    )
    return ", ".join(named).replace("torch.", "")


def _mutates(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _is_plain(target: Any) -> bool:
    """Whether a traced call is ATen's, or arithmetic of sizes."""
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in _KNOWN and not is_custom(target)
    return target is operator.getitem or getattr(target, "__module__", "") in ("_operator", "math", "torch")


def _kernel(target: torch._ops.OpOverload) -> Callable[..., Any] | str:
    """What runs on the CPU, as a function that a tracer sees into, or why there is none."""
    if target.name() in FORMULAS:
        return FORMULAS[target.name()]
    schema = target._schema
    if schema.is_mutable:
        return "it changes its arguments"
    if any(part.alias_info is not None for part in (*schema.arguments, *schema.returns)):
        return "its result may share memory with its arguments"
    if torch.Tag.nondeterministic_seeded in target.tags:
        return "it draws random numbers"
    place = _ON_THE_CPU.search(torch._C._dispatch_dump_table(target.name()))
    if place is None:
        return "it has no kernel for the CPU"
    if _COMPILED.search(place[1]) or not (place[1].endswith(".py") or place[1].startswith("<")):
        return f"its kernel is compiled ({place[1]}), and says nothing about what it computes"
    held = torch.library.get_kernel(target, "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def call(*args: Any, **kwargs: Any) -> Any:
        return held.call_boxed(keys, *args, **kwargs)

    return call
