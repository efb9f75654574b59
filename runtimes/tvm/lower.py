"""Program → Relax.

Not through TVM's own importer: torch already knows the size of every value as an expression of the inputs' sizes, so
results are described by index with exactly these sizes (`builder.py`), and nothing is inferred a second time. That is
also why every architecture keeps its dynamic batch and sequence.

The module has two functions. `main(inputs..., weights...)` is the model. `prepare(weights...)` computes once what
depends on weights alone (decoded weights that no kernel reads packed, tables); its results are the last arguments of
`main`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from tvm import IRModule, relax, te, tirx

from ...compiler.decompose import decompose
from ...compiler.editor import Editor
from ...compiler.errors import IsofoldError, UnsupportedError
from ...compiler.graph import place_of, value
from ...compiler.interface import input_names
from ...compiler.program import Program
from .builder import GETITEM, Builder, arguments, depends_on_symbols, dtype_name, fake
from .rules import RULES
from .symbols import Size, size_of, solve_for_symbol, symbols_of, to_tir, variable_name

MAIN, PREPARE = "main", "prepare"


@dataclass
class Lowered:
    """A Relax module and what its functions take.

    parameters: the program's tensors that the functions take → the name of the argument, the same in both functions and
    in the file of weights. weights: those that `main` takes behind the inputs. prepare: those that `prepare` takes; it
    returns `prepared` tensors, the last arguments of `main`. fallbacks: what runs in a way known to be slow.
    """

    module: IRModule
    weights: list[str]
    prepare: list[str]
    prepared: int
    parameters: dict[str, str]
    fallbacks: dict[str, list[str]] = field(default_factory=dict)


def lower(program: Program) -> Lowered:
    """The program as a Relax module. Raises UnsupportedError that lists every operator without a lowering."""
    program = _with_rules(program)
    _check(program)
    constant = _constant_nodes(program)
    bb = relax.BlockBuilder()
    b = Builder(bb, program.tensors)
    problems: list[tuple[fx.Node, IsofoldError]] = []
    roots = [n for n in program.graph.nodes if n in constant and any(u not in constant for u in _readers(n))]
    roots = [n for n in roots if n.op == "call_function" and isinstance(value(n), Tensor)]
    weights, prepare = _weight_order(program, constant)
    if roots:
        _emit_prepare(b, program, constant, roots, prepare, problems)
    _emit_main(b, program, constant, roots, weights, problems)
    if problems:
        raise _unsupported(problems)
    prepare = prepare if roots else []
    parameters = parameter_names([*weights, *prepare], input_names(program))
    return Lowered(bb.finalize(), weights, prepare, len(roots), parameters, dict(b.fallbacks))


def parameter_names(tensors: list[str], inputs: list[str]) -> dict[str, str]:
    """Names of arguments for tensors: theirs, where no input has it."""
    return {name: f"{name}_weight" if name in inputs else name for name in tensors}


def _with_rules(program: Program) -> Program:
    """The program with operators that have no rule in terms of those that have, as far as torch knows how."""
    waiting = [node for node in program.graph.nodes if _lacks_rule(node)]
    if not waiting:
        return program
    editor = Editor(program)
    waiting = [node for node in editor.graph.nodes if _lacks_rule(node)]
    while waiting:
        node = waiting.pop()
        if not node._erased:
            waiting.extend(made for made in decompose(editor, node) or () if _lacks_rule(made))
    return editor.finish()


def _lacks_rule(node: fx.Node) -> bool:
    known = node.target in RULES or node.target is GETITEM or not _is_tensor_valued(node)
    return node.op == "call_function" and not known


def _check(program: Program) -> None:
    """Raise UnsupportedError for operators that nothing lowers, all at once."""
    missing: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if _lacks_rule(node):
            missing.setdefault(str(node.target), []).append(str(place_of(node)))
        elif node.op in ("call_module", "call_method"):
            missing.setdefault(f"{node.op} {node.target}", []).append(str(place_of(node)))
    if missing:
        raise UnsupportedError(
            "The program has operators that are not lowered to TVM",
            where="; ".join(
                f"{name} at {places[0]} ({len(places)} uses)" for name, places in missing.items()
            ),
            hint="replace the operator in the model, or decompose it into ATen operators that are",
        )


def _is_tensor_valued(node: fx.Node) -> bool:
    """Arithmetic of sizes and assertions need no code: sizes are known as expressions."""
    found = value(node)
    if isinstance(found, (tuple, list)):
        return any(isinstance(v, Tensor) for v in found)
    return isinstance(found, Tensor)


def _unsupported(problems: list[tuple[fx.Node, IsofoldError]]) -> UnsupportedError:
    lines = [f"{node.target} at {place_of(node)}: {error.what}" for node, error in problems]
    first = problems[0][1]
    return UnsupportedError(
        "The program cannot be lowered to TVM",
        where="; ".join(lines),
        expected=first.expected,
        got=first.got,
        hint=first.hint,
    )


def _constant_nodes(program: Program) -> set[fx.Node]:
    """Nodes that depend on no input and have fixed sizes: tensors, and what is computed from them alone."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            found.add(node)
        elif node.op == "call_function" and _is_tensor_valued(node):
            sources = node.all_input_nodes
            if all(s in found for s in sources) and not depends_on_symbols(node):
                found.add(node)
    return found


def _readers(node: fx.Node) -> list[fx.Node]:
    return list(node.users)


def _weight_order(program: Program, constant: set[fx.Node]) -> tuple[list[str], list[str]]:
    """Tensors that `main` reads in the order of their first use, and those that `prepare` reads."""
    main: dict[str, None] = {}
    prepare: dict[str, None] = {}
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                (prepare if node in constant else main).setdefault(str(source.target))
    return list(main), list(prepare)


def _weight_variables(program: Program, names: list[str]) -> dict[str, relax.Var]:
    made = {}
    for name, argument in parameter_names(names, input_names(program)).items():
        tensor = program.tensors[name]
        kind = relax.TensorType([int(s) for s in tensor.shape], dtype_name(tensor.dtype))
        made[name] = relax.Var(argument, kind)
    return made


def _bind_weights(b: Builder, program: Program, variables: dict[str, relax.Var]) -> None:
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) in variables:
            b.values[node] = variables[str(node.target)]


def _emit_prepare(
    b: Builder, program: Program, constant: set[fx.Node], roots: list[fx.Node], names: list[str],
    problems: list[tuple[fx.Node, IsofoldError]],
) -> None:  # fmt: skip
    needed = _needed(roots)
    variables = _weight_variables(program, names)
    with b.bb.function(PREPARE, list(variables.values())):
        with b.bb.dataflow():
            _bind_weights(b, program, variables)
            for node in program.graph.nodes:
                if node in needed and node.op == "call_function":
                    _emit_node(b, node, problems)
            results = [b.values.get(node) for node in roots]
            if any(r is None for r in results):
                raise _unsupported(problems)
            out = b.bb.emit_output(relax.Tuple(results))
        b.bb.emit_func_output(out)


def _needed(roots: list[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _emit_main(
    b: Builder, program: Program, constant: set[fx.Node], roots: list[fx.Node], names: list[str],
    problems: list[tuple[fx.Node, IsofoldError]],
) -> None:  # fmt: skip
    b.values.clear()
    inputs = _input_variables(b, program)
    variables = _weight_variables(program, names)
    prepared = [relax.Var(f"prepared{i}", b.type_of(root)) for i, root in enumerate(roots)]
    parameters = [*inputs, *variables.values(), *prepared]
    with b.bb.function(MAIN, parameters, attrs={"num_input": len(inputs)}):
        with b.bb.dataflow():
            _bind_weights(b, program, variables)
            b.values.update(zip(roots, prepared, strict=True))
            for node in program.graph.nodes:
                if node.op == "call_function" and node not in constant:
                    _emit_node(b, node, problems)
            if problems:
                raise _unsupported(problems)
            out = b.bb.emit_output(relax.Tuple([_result(b, r) for r in output_leaves(program)]))
        b.bb.emit_func_output(out)


def output_leaves(program: Program) -> list[fx.Node]:
    """The nodes that are returned, in order, repetitions included."""
    leaves = pytree.tree_leaves(program.output_node.args[0], is_leaf=lambda v: v is None)
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def _result(b: Builder, node: fx.Node) -> Any:
    """A returned value; a size becomes a tensor of one number, and what is no result of a call is copied."""
    found = value(node)
    if isinstance(found, Tensor):
        made = b.values[node]
        if node.op == "call_function":
            return made
        return b.kernel(
            node, lambda k: te.compute(k.shape(node), lambda *i: k.tensor(node)(*i), name="y"), "copy"
        )
    size = size_of(found)
    scalar = torch.empty((), dtype=torch.int64, device="meta")
    return b.kernel(
        node, lambda k: te.compute((), lambda *i: _as_int64(k.size(size)), name="y"), "size", [scalar]
    )


def _as_int64(size: Any) -> Any:
    return tirx.IntImm("int64", size) if isinstance(size, int) else size


def _input_variables(b: Builder, program: Program) -> list[relax.Var]:
    """Variables of the inputs; fills the table of symbols.

    A symbol that is an input's dimension is that dimension. One that occurs only in expressions, such as 32 s, comes
    from a dimension of its own: s = dimension / 32.
    """
    tensors = [node for node in program.placeholders if isinstance(value(node), Tensor)]
    known: dict[str, Any] = {}
    for node in tensors:
        for size in map(size_of, fake(node).shape):
            if not isinstance(size, int) and size.is_symbol and str(size) not in known:
                known[str(size)] = tirx.Var(variable_name(str(size)), "int64")
    shapes: dict[fx.Node, list[Any]] = {}
    extra: dict[str, Any] = {}
    for node in tensors:
        shape: list[Any] = []
        for size in map(size_of, fake(node).shape):
            missing = symbols_of(size) - set(known)
            solved = solve_for_symbol(size) if missing and not isinstance(size, int) else None
            if missing and solved is None:
                raise UnsupportedError(
                    "An input's size is an expression that does not determine its symbols",
                    where=node.name,
                    got=str(size),
                    hint="declare the dimension itself as dynamic",
                )
            if solved is not None:
                symbol, factor, rest = solved
                dimension = extra.setdefault(str(size), tirx.Var(f"{variable_name(symbol)}_size", "int64"))
                known[symbol] = tirx.floordiv(dimension - rest, factor)
            shape.append(extra.get(str(size), size))
        shapes[node] = shape
    b.symbols = known
    made = []
    for node in tensors:
        dims = [_dimension(b, size) for size in shapes[node]]
        variable = relax.Var(node.name, relax.TensorType(dims, dtype_name(fake(node).dtype)))
        b.values[node] = variable
        made.append(variable)
    return made


def _dimension(b: Builder, size: Size | Any) -> Any:
    if isinstance(size, int):
        return size
    return size if isinstance(size, tirx.Var) else to_tir(size, b._symbol)


def _emit_node(b: Builder, node: fx.Node, problems: list[tuple[fx.Node, IsofoldError]]) -> None:
    if not _is_tensor_valued(node):
        return
    sources = [s for s in node.all_input_nodes if isinstance(value(s), (Tensor, tuple, list))]
    if any(s not in b.values for s in sources):
        return  # behind one that failed
    if node.target is GETITEM:
        b.values[node] = b.values[node.args[0]][node.args[1]]  # type: ignore[index] # args of getitem
        return
    try:
        b.values[node] = RULES[node.target](b, node, arguments(node))
    except UnsupportedError as error:
        problems.append((node, error))
