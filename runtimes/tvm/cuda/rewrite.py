"""Calls of the dialect in a Relax module → calls of the GPU's kernels.

The lowering (`runtimes/tvm/lower.py`) leaves a dialect operator as

    call_dps_packed("isofold_op", ("QuantizeActivation in=1011 out=11 align=i:32 ... node=s:NAME", tensors...), types)

with the tensors that `in` says are there and the results that `out` says are wanted. For CUDA each becomes what its
plan says: reshapes to views (no copies), tables as constants, a `call_tir` for each stage, and a reshape of the
results. Memory between stages is thereby planned with everything else, and captured in CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from ....compiler.dialect import OPERATORS, Operator
from ....compiler.errors import UnsupportedError
from .operators import EMITTERS
from .plan import Call, Operand, Plan

EXTERN = "isofold_op"
"""Name of the extern function in calls of dialect operators."""

_BY_ONNX_NAME = {operator.onnx_name: operator for operator in OPERATORS.values()}


def rewrite_dialect(module: tvm.IRModule) -> tvm.IRModule:
    """The module with every dialect call as calls of kernels.

    Raises UnsupportedError that lists every call whose sizes no kernel takes, with the node's name.
    """
    writer = _Writer(module)
    for variable, function in list(module.functions_items()):
        if isinstance(function, relax.Function):
            writer.builder_.update_func(variable, writer.visit_expr(function))
    if writer.problems:
        raise UnsupportedError(
            "The program has operators that the GPU kernels do not take",
            where="; ".join(f"{node}: {why}" for node, why in writer.problems),
            hint="target tvm-cpu and target cpu have kernels for all of them",
        )
    return writer.builder_.get()


def _is_dialect(call: relax.Call) -> bool:
    return bool(
        call.op == tvm.ir.Op.get("relax.call_dps_packed") and str(call.args[0].global_symbol) == EXTERN
    )


def _description(call: relax.Call) -> tuple[Operator, Call, list[bool], str]:
    """A dialect call as emitters take it, the results that are wanted, and the node's name."""
    text, *tensors = call.args[1].fields
    operator, present, wanted, attributes, node = read_description(str(text.value))
    return operator, call_of(operator, present, wanted, attributes, [t.ty for t in tensors]), wanted, node


def read_description(text: str) -> tuple[Operator, list[bool], list[bool], dict[str, Any], str]:
    """Operator, tensors that are there, results that are wanted, attributes, and the node's name."""
    name, *words = text.split(" ")
    facts = dict(word.split("=", 1) for word in words)
    operator = _BY_ONNX_NAME.get(name)
    if operator is None:
        raise UnsupportedError(
            f"The operator {name} has no GPU kernels",
            where=facts.get("node", ""),
            expected=", ".join(sorted(EMITTERS)),
        )
    flags = [[c == "1" for c in facts.pop(key)] for key in ("in", "out")]
    node = facts.pop("node", "s:").removeprefix("s:")
    return operator, flags[0], flags[1], {key: _attribute(v) for key, v in facts.items()}, node


def _attribute(text: str) -> Any:
    kind, _, rest = text.partition(":")
    if kind == "f":
        return float.fromhex(rest)
    if kind == "i":
        return int(rest)
    if kind == "l":
        return [int(v) for v in rest.split(",")] if rest else []
    return rest


def is_tensor(argument: Any) -> bool:
    """Whether an argument of a torch schema is a tensor (else it is an attribute)."""
    return str(argument.type) in ("Tensor", "Optional[Tensor]")


def call_of(
    operator: Operator, present: list[bool], wanted: list[bool], attributes: dict[str, Any], types: list[Any]
) -> Call:
    """A call as emitters take it; types: Relax types of the tensors that are there."""
    names = [a.name for a in operator.overload._schema.arguments if is_tensor(a)]
    operands: dict[str, Operand | None] = dict.fromkeys(names)
    left = iter(types)
    for name, there in zip(names, present, strict=True):
        if there:
            operands[name] = operand_of(next(left))
    return Call(operands, attributes, frozenset(i for i, w in enumerate(wanted) if w))


def operand_of(kind: Any) -> Operand:
    """Shape and type of a Relax tensor."""
    shape = tuple(int(s) if isinstance(s, (int, tirx.IntImm)) else s for s in kind.shape)
    return Operand(shape, str(kind.dtype))


@mutator
class _Writer(PyExprMutator):
    """Writes the plans; problems: (node, why) of every call that has none."""

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self.problems: list[tuple[str, str]] = []

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        """Rewrite one call, or leave it."""
        call = super().visit_call_(call)
        if not _is_dialect(call):
            return call
        operator, description, wanted, node = _description(call)
        tensors = call.args[1].fields[1:]
        try:
            plan = EMITTERS[operator.name](description)
        except UnsupportedError as error:
            self.problems.append((node, f"{error.what} ({error.expected}, got {error.got})"))
            return call
        names = [name for name, operand in description.operands.items() if operand is not None]
        results = emit_plan(self.builder_, plan, dict(zip(names, tensors, strict=True)), node)
        kinds = call.ty_args[0]
        kinds = list(kinds.fields) if isinstance(kinds, relax.TupleType) else [kinds]
        made = [r for r, w in zip(results, wanted, strict=True) if w]
        shaped = [self._shaped(r, kind) for r, kind in zip(made, kinds, strict=True)]
        return shaped[0] if len(shaped) == 1 else relax.Tuple(shaped)

    def _shaped(self, result: Any, kind: Any) -> Any:
        return self.builder_.emit(relax.op.reshape(result, relax.ShapeExpr(list(kind.shape))))


def emit_plan(builder: relax.BlockBuilder, plan: Plan, tensors: dict[str, Any], node: str) -> list[Any]:
    """Emit a plan's calls; the values of its results (None where it makes none), flat as the kernels write them."""
    values: dict[str, Any] = {}

    def size(s: int | str) -> Any:
        return tirx.IntImm("int64", s) if isinstance(s, int) else plan.symbols[s]

    for name, shape in plan.views.items():
        source = tensors[name.partition("@")[0]]
        values[name] = builder.emit(relax.op.reshape(source, relax.ShapeExpr([size(s) for s in shape])))
    for name, table in plan.constants.items():
        values[name] = relax.const(table)
    for stage in plan.stages:
        place = builder.add_func(stage.function.without_attr("global_symbol"), stage.name)
        types = [relax.TensorType([size(s) for s in t.shape], t.dtype) for t in stage.outputs]
        inputs = relax.Tuple([values[n] for n in stage.inputs])
        made = builder.emit(
            relax.call_tir(place, inputs, types if len(types) > 1 else types[0]), name_hint=node or "y"
        )
        for i, tensor in enumerate(stage.outputs):
            values[tensor.name] = builder.emit(relax.TupleGetItem(made, i)) if len(types) > 1 else made
    return [None if name is None else values.get(name, tensors.get(name)) for name in plan.results]
