"""A Program as an ONNX model in memory: torch.onnx for ATen, one node per dialect operator.

torch.onnx translates what ATen says; a dialect operator becomes one node `ai.isofold::Name` with the
operator's argument names as attributes, and its body (`functions.py`) is attached afterwards, because the
exporter's own inliner fails on functions that arrive with a translation.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset18, rewriter, values
from onnxscript.rewriter.rules.common import _no_op
from torch import fx
from torch.utils import _pytree as pytree

from ...compiler.decompose import decompose
from ...compiler.dialect import ONNX_DOMAIN, ONNX_VERSION, OPERATORS, Operator
from ...compiler.editor import Editor
from ...compiler.errors import UnsupportedError
from ...compiler.graph import argument, calls, module_path, place_of, shape
from ...compiler.interface import cache_facts, dimension_names, input_names, output_names
from ...compiler.program import Program
from .body import OPSET
from .functions import build_function

_ATTRIBUTES = {
    "int": onnx.defs.OpSchema.AttrType.INT,
    "bool": onnx.defs.OpSchema.AttrType.INT,
    "float": onnx.defs.OpSchema.AttrType.FLOAT,
    "str": onnx.defs.OpSchema.AttrType.STRING,
    "List[int]": onnx.defs.OpSchema.AttrType.INTS,
}
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
IR_VERSION = 10
"""ONNX IR version of exported files: the first with overloads of functions and metadata on nodes."""


def is_tensor(argument: Any) -> bool:
    """Whether an argument of a torch schema becomes an ONNX input (else it is an attribute)."""
    return str(argument.type) in ("Tensor", "Optional[Tensor]")


def tensor_arguments(operator: Operator) -> list[str]:
    """Names of the inputs of an operator's node, in order."""
    return [a.name for a in operator.overload._schema.arguments if is_tensor(a)]


def _op_schema(operator: Operator) -> onnx.defs.OpSchema:
    """The ONNX schema of a dialect operator, derived from its torch schema."""
    parameter, option = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.FormalParameterOption
    arguments = operator.overload._schema.arguments
    inputs = [
        parameter(
            a.name,
            f"T_{a.name}",
            param_option=option.Optional if str(a.type) == "Optional[Tensor]" else option.Single,
        )
        for a in arguments
        if is_tensor(a)
    ]
    results = range(len(operator.overload._schema.returns))
    outputs = [parameter(f"result_{i}", f"R_{i}") for i in results]
    tensors = [
        "tensor(float)",
        "tensor(float16)",
        "tensor(uint8)",
        "tensor(uint16)",
        "tensor(int8)",
        "tensor(int32)",
        "tensor(int64)",
        "tensor(bool)",
    ]
    return onnx.defs.OpSchema(
        operator.onnx_name,
        ONNX_DOMAIN,
        ONNX_VERSION,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[(p.type_str, tensors, "") for p in (*inputs, *outputs)],
        attributes=[
            onnx.defs.OpSchema.Attribute(a.name, _ATTRIBUTES[str(a.type)], "", required=True)
            for a in arguments
            if not is_tensor(a)
        ],
    )


def _attribute(argument: Any, given: Any) -> Any:
    kind = str(argument.type)
    if kind == "float":
        return float(given)
    if kind in ("int", "bool"):
        return int(given)
    # An empty list does not say what it is a list of.
    return ir.AttrInt64s(argument.name, given) if kind == "List[int]" else given


def _translation(operator: Operator) -> Callable[..., Any]:
    node = values.Op(values.Opset(ONNX_DOMAIN, ONNX_VERSION), operator.onnx_name, _op_schema(operator))
    arguments = operator.overload._schema.arguments

    def translate(*args: Any, **kwargs: Any) -> Any:
        given: dict[str, Any] = {a.name: a.default_value for a in arguments if a.has_default_value()}
        given |= dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        inputs = [given.get(a.name) for a in arguments if is_tensor(a)]
        attributes = {a.name: _attribute(a, given[a.name]) for a in arguments if not is_tensor(a)}
        return node(*inputs, **attributes)

    translate.__name__ = f"isofold_{operator.name}"
    return translate


def _rsub(x: Any, other: float, alpha: float = 1) -> Any:
    """`other - alpha x`. torch.onnx decomposes it into `sub(other, x)`, and fails on that where x is of integers."""
    if not x.dtype.is_floating_point() and isinstance(other, float):
        x = opset18.Cast(x, to=ir.DataType.FLOAT)
    scaled = x if alpha == 1 else opset18.Mul(x, opset18.CastLike(alpha, x))
    return opset18.Sub(opset18.CastLike(other, scaled), scaled)


def _ints(*values: int) -> Any:
    return opset18.Constant(value_ints=list(values))


def _repeat_interleave(x: Any, repeats: int, dim: int | None = None, output_size: Any = None) -> Any:
    """Each element `repeats` times in a row. torch.onnx repeats the whole instead where it has no dynamic sizes."""
    if dim is None:
        x, dim, rank = opset18.Reshape(x, _ints(-1)), 0, 1
    else:
        rank = len(x.shape)
        dim %= rank
    times = [repeats if d == dim + 1 else 1 for d in range(rank + 1)]
    spread = opset18.Tile(opset18.Unsqueeze(x, _ints(dim + 1)), _ints(*times))
    sizes = [_ints(-1)]
    if dim:
        sizes.insert(0, opset18.Shape(x, start=0, end=dim))
    if dim + 1 < rank:
        sizes.append(opset18.Shape(x, start=dim + 1))
    return opset18.Reshape(spread, sizes[0] if len(sizes) == 1 else opset18.Concat(*sizes, axis=0))


def _cumulative_product(x: Any, dim: int, dtype: Any = None) -> Any:
    """Products of the first 1, 2, 3, ... values, which ONNX has no operator for: each step doubles how many."""
    rank, size = len(x.shape), x.shape[dim % len(x.shape)]
    if not isinstance(size, int):
        raise TypeError("aten.cumprod along a dimension without a static size")
    axis, step = _ints(dim % rank), 1
    while step < size:
        head = opset18.Slice(x, _ints(0), _ints(step), axis)
        rest = opset18.Slice(x, _ints(step), _ints(size), axis)
        before = opset18.Slice(x, _ints(0), _ints(size - step), axis)
        x = opset18.Concat(head, opset18.Mul(rest, before), axis=dim % rank)
        step *= 2
    return x


_MENDED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.rsub.Scalar: _rsub,
    torch.ops.aten.repeat_interleave.self_int: _repeat_interleave,
    torch.ops.aten.cumprod.default: _cumulative_product,
}
"""Translations of ATen that torch.onnx lacks or does wrong."""


def to_onnx(program: Program) -> ir.Model:
    """The program as an ONNX model whose initializers still share the program's tensors.

    Inputs are named like the placeholders, outputs after the structure they are returned in, dynamic
    dimensions after the user's Dims where they had names. Raises UnsupportedError that lists every operator
    without a lowering.
    """
    exportable = _exportable(_without_projections(program))
    exported = exportable.to_exported_program()
    table: dict[Any, Any] = {operator.overload: _translation(operator) for operator in OPERATORS.values()}
    table |= _MENDED
    with _quiet(), _exact_rewriting():
        try:
            made = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=table,
                optimize=True,
                verbose=False,
            )
        except Exception as error:
            raise _explain(program, error) from error
    assert made is not None
    model: ir.Model = made.model
    _attach_bodies(model)
    _name_interface(model, program)
    _annotate(model, exportable)
    model.opset_imports.update({"": OPSET, ONNX_DOMAIN: ONNX_VERSION})
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "isofold", None
    model.metadata_props.clear()
    if program.caches:
        model.metadata_props["isofold.caches"] = json.dumps(cache_facts(program))
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    return model


def _without_projections(program: Program) -> Program:
    """The program with LSTMs whose hidden state is projected written out step by step: ONNX's have no projection."""
    lstm = torch.ops.aten.lstm.input

    def is_projected(node: fx.Node) -> bool:
        hidden, cell = argument(node, "hx")
        return bool((shape(hidden) or ())[-1] != (shape(cell) or ())[-1])

    if not any(is_projected(node) for node in calls(program.graph, lstm)):
        return program
    editor = Editor(program)
    for node in editor.calls(lstm):
        if is_projected(node):
            decompose(editor, node)
    return editor.finish()


def _exportable(program: Program) -> Program:
    """The program with plain tensors for parameters, and without results that are constants.

    torch lays out an attention's result by whether a gradient is wanted, and decomposes reshapes by that layout;
    torch.onnx traces twice, with and without gradients, and the two must agree. Numbers and strings that are returned
    are in the structure of the results, and torch.onnx fails on them.
    """
    tensors = {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in program.tensors.items()}
    graph = program.graph
    returned = pytree.tree_leaves(program.output_node.args[0], is_leaf=lambda v: v is None)
    nodes = [leaf for leaf in returned if isinstance(leaf, fx.Node)]
    if len(nodes) < len(returned):
        graph = program.copy_graph()
        own = {node.name: node for node in graph.nodes}
        output = next(node for node in reversed(graph.nodes) if node.op == "output")
        output.args = (tuple(own[node.name] for node in nodes),)
        codegen = graph._codegen
        assert isinstance(codegen, fx.graph._PyTreeCodeGen)
        flat = pytree.tree_structure((0,) * len(nodes))
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=flat)
    return Program(
        graph,
        tensors,
        program.example_args,
        program.example_kwargs,
        program.dynamic_shapes,
        program.records,
        program.caches,
    )


@contextmanager
def _quiet() -> Any:
    """torch.onnx reports missing optional packages and progress on its own; neither concerns the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _exact_rewriting() -> Iterator[None]:
    """onnxscript's rewriting without its rules for arithmetic that changes nothing.

    They compare constants with a tolerance: `x / (norm + 1e-12)` would lose its epsilon, and be NaN at zero. What is
    exactly x + 0 or 1 x is gone from programs already.
    """
    known = rewriter._DEFAULT_REWRITE_RULES
    inexact = {id(rule) for rule in _no_op.rules}
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in known if id(rule) not in inexact)
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = known


def _explain(program: Program, error: Exception) -> UnsupportedError:
    """Every operator that torch.onnx knows no translation for, with the places that use it."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    missing: dict[str, list[str]] = {}
    registry = ONNXRegistry.from_torchlib(OPSET)
    decomposable = torch.export.default_decompositions()
    for node in program.graph.nodes:
        target = node.target
        if (
            isinstance(target, torch._ops.OpOverload)
            and target.namespace != "isofold"
            and target._schema.returns  # assertions return nothing, and the exporter drops them
            and not registry.is_registered(target)
            and target not in decomposable
        ):
            missing.setdefault(str(target), []).append(str(place_of(node)))
    cause: BaseException = error
    texts = [str(error)]
    while cause.__cause__ is not None:
        cause = cause.__cause__
        texts.append(str(cause))
    places = [f"{name} at {uses[0]} ({len(uses)} uses)" for name, uses in missing.items()]
    if not places:
        places = [place for text in texts if (place := _executed(text))][:1]
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return UnsupportedError(
        "The program cannot be written as ONNX",
        where="; ".join(places) or None,
        got=f"{type(cause).__name__}: {lines[0] if lines else ''}",
        hint="replace the operator in the model, or decompose it into ATen operators that ONNX has",
    )


def _executed(text: str) -> str | None:
    """The operator and the user's line that torch.fx names in an error, as `aten.sub.Tensor at file.py:12`."""
    node = re.search(r"While executing %\S+.*?target=(?:torch\.ops\.)?([\w.]+)", text)
    frames = [(file, line) for file, line in _FRAME.findall(text) if "/torch/" not in file]
    if node is None:
        return None
    return f"{node[1]} at {':'.join(frames[-1])}" if frames else node[1]


def _attach_bodies(model: ir.Model) -> None:
    """One function per operator and signature; nodes name theirs in `overload`."""
    by_onnx_name = {operator.onnx_name: operator for operator in OPERATORS.values()}
    bodies: dict[str, dict[bytes, ir.Function]] = {}
    for node in model.graph.all_nodes():
        if node.domain != ONNX_DOMAIN:
            continue
        operator = by_onnx_name[node.op_type]
        names = tensor_arguments(operator)
        actual = [*node.inputs, *[None] * (len(names) - len(node.inputs))]
        inputs = dict(zip(names, actual, strict=True))
        function = build_function(operator.name, inputs, list(node.attributes.values()))
        known = bodies.setdefault(operator.name, {})
        key = ir.serde.serialize_function(function).SerializeToString(deterministic=True)
        if key not in known:
            function.overload = str(len(known)) if known else ""
            known[key] = function
            model.functions[function.identifier()] = function
        node.overload = known[key].overload


def _name_interface(model: ir.Model, program: Program) -> None:
    """Names of inputs, outputs and dynamic dimensions."""
    graph = model.graph
    produced = {value for node in graph for value in node.outputs}
    seen: set[ir.Value] = set()
    for position, output in enumerate(graph.outputs):
        if (
            output in seen or output not in produced
        ):  # an input, a constant or a result that is returned twice
            copied = ir.node("Identity", [output])
            copied.outputs[0].type, copied.outputs[0].shape = output.type, output.shape
            graph.append(copied)
            graph.outputs[position] = copied.outputs[0]
        seen.add(output)
    inputs = input_names(program)
    outputs = [f"{name}_out" if name in inputs else name for name in output_names(program)]
    wanted = {*inputs, *outputs}
    interface = [*graph.inputs, *graph.outputs]
    others = [v for node in graph.all_nodes() for v in node.outputs] + list(graph.initializers.values())
    for value_ in others:
        if value_.name in wanted and not any(value_ is v for v in interface):
            value_.name = f"{value_.name}_inner"
    for position, value_ in enumerate(interface):
        value_.name = f"interface_{position}"  # all names are free before any is taken
    for value_, name in zip(interface, [*inputs, *outputs], strict=True):
        value_.name = name
    sizes = {
        str(v.name): [d if isinstance(d, int) else d.value for d in v.shape]
        for v in graph.inputs
        if v.shape is not None
    }
    renames = dimension_names(program, sizes)
    for value_ in _values(graph):
        if value_.shape is not None:
            value_.shape = ir.Shape([_rename(d, renames) for d in value_.shape])


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(v for node in graph.all_nodes() for v in node.outputs)]


def _rename(dimension: Any, names: Mapping[str, str]) -> Any:
    if isinstance(dimension, int) or dimension.value is None:
        return dimension
    return ir.SymbolicDim(re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), str(dimension.value)))


def _annotate(model: ir.Model, program: Program) -> None:
    """Name nodes after the program's, keep their module path, and drop torch's own metadata.

    A dialect operator's node has the name of its node in the program (profiles and reports join on it); the
    nodes that one ATen operator became are `name/OpType`, numbered where that repeats.
    """
    own = {node.name: node for node in program.graph.nodes}
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        source = own.get(_program_node(node, id(program.graph)) or "")
        origin = source.name if source is not None else ""
        if node.domain == ONNX_DOMAIN:
            name = origin or str(node.op_type)
            for output in node.outputs:
                if node.op_type == "NormQuantize" and not output.uses() and not output.is_graph_output():
                    output.name = ""
        else:
            name = f"{origin}/{node.op_type}" if origin else str(node.op_type)
        seen = counts.get(name, 0)
        counts[name] = seen + 1
        node.name = f"{name}_{seen}" if seen else name
        node.metadata_props.clear()
        path = module_path(source) if source is not None else ""
        if path:
            node.metadata_props["module"] = path
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for input_ in model.graph.inputs:
        input_.metadata_props.clear()


def _program_node(node: ir.Node, graph_id: int) -> str | None:
    """Name of the program's node that an ONNX node came from: torch records the chain of graphs it went through."""
    made_of = node.meta.get("node")
    sources = made_of.meta.get("from_node") if made_of is not None else None
    while sources:
        if sources[-1].graph_id == graph_id:
            name: str = sources[-1].name
            return name
        sources = sources[-1].from_node
    return None
