"""`Program`: a captured model as an FX graph of ATen and isofold operators, with its tensors.

A program is a value: nothing changes it after it was made. Passes take one and return another
(`Editor`), sharing every tensor they did not replace. It stays runnable (call it like the module),
differentiable (`parameters`), and storable (`save`, `.pt2`).
"""

from __future__ import annotations

import copy
import json
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.node import map_arg
from torch.nn.functional import linear
from torch.utils import _pytree as pytree

from . import dialect as _dialect  # registers the operators that graphs and files may contain
from .artefact import replacing
from .coded_cache import CodedCache, decoded
from .dialect.grouped_rows import by_expert
from .errors import ArtefactError, InputError
from .graph import value
from .python_kernel import Kernels, is_custom
from .threads import one_thread

_RECORD_FILE = "isofold.json"
assert _dialect.OPERATORS
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LARGE = 1 << 20
"""Elements of a weight above which it is widened in parts."""
_SMALL, _FEW = 1 << 22, 1 << 15
"""Elements of weights and of inputs below which a run in float64 takes one thread."""


class Program:
    """A model as a graph.

    graph: ATen and `isofold` operators; every `get_attr` node's target is a key of `tensors`, and no two
    keys hold the same storage (tied weights are one entry).
    example_args, example_kwargs: inputs that the graph runs on (also what verification uses).
    dynamic_shapes: as torch.export takes them, or None for static shapes.
    records: one JSON-like dictionary for each pass that made this program from the captured one.
    caches: inputs and outputs that were floats in the captured module and are codes here, in the order of the outputs.
    expendable: whether nothing reads this program any more after the next pass, which may then free its tensors as it
        replaces them. Only what made a program may say so (the driver does, of those between two passes).
    """

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Mapping[str, Any],
        example_args: Sequence[Any],
        example_kwargs: Mapping[str, Any] | None = None,
        dynamic_shapes: Any = None,
        records: Iterable[Mapping[str, Any]] = (),
        caches: Iterable[CodedCache] = (),
    ) -> None:
        self.graph = graph
        used = {node.target for node in graph.nodes if node.op == "get_attr"}
        self.tensors: dict[str, Any] = {name: t for name, t in tensors.items() if name in used}
        self.example_args = tuple(example_args)
        self.example_kwargs = dict(example_kwargs or {})
        self.dynamic_shapes = dynamic_shapes
        self.records = tuple(dict(r) for r in records)
        self.caches = tuple(caches)
        self.expendable = False

    @cached_property
    def graph_module(self) -> fx.GraphModule:
        """The program as a `torch.fx.GraphModule` that shares its tensors."""
        module = fx.GraphModule(dict(self.tensors), self.graph, class_name="Program")
        module.recompile()
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph; arguments and results are the captured module's."""
        self.check_inputs(args, kwargs)
        return self.graph_module(*args, **kwargs)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All tensors by name: the weights and buffers of the captured module and what passes made of them."""
        return {name: t for name, t in self.tensors.items() if isinstance(t, Tensor)}

    @property
    def placeholders(self) -> list[fx.Node]:
        """Input nodes, in the order of the flattened arguments."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output_node(self) -> fx.Node:
        """The node that returns the results."""
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes whose values are returned, flattened."""
        return [node for node in pytree.tree_leaves(self.output_node.args[0]) if isinstance(node, fx.Node)]

    @property
    def operator_count(self) -> int:
        """Nodes that compute something; taking one of several results is not counted."""
        return sum(
            node.op.startswith("call") and node.target is not operator.getitem for node in self.graph.nodes
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors the graph reads."""
        return sum(t.numel() * t.element_size() for t in self.parameters.values())

    def flatten_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Arguments as the flat list that the placeholders take, in order."""
        codegen = self.graph._codegen
        if isinstance(codegen, fx.graph._PyTreeCodeGen):
            if set(kwargs) != set(self.example_kwargs):
                raise TypeError(f"keywords {sorted(kwargs)}, captured with {sorted(self.example_kwargs)}")
            # Keywords are flattened in the order of the capture, whatever order the caller wrote.
            ordered = {name: kwargs[name] for name in self.example_kwargs}
            return list(pytree.arg_tree_leaves(*args, **ordered))
        return [*args, *kwargs.values()]

    def unflatten_outputs(self, flat: Any) -> Any:
        """Results of a flat run in the structure that the captured module returns."""
        codegen = self.graph._codegen
        return codegen.process_outputs(flat) if isinstance(codegen, fx.graph._PyTreeCodeGen) else flat

    def check_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise InputError, listing every input whose rank, static size or dtype does not fit."""
        try:
            flat = self.flatten_inputs(args, kwargs)
            if len(flat) != len(self.placeholders):
                raise ValueError(f"{len(flat)} values for {len(self.placeholders)} inputs")
        except (TypeError, ValueError, AssertionError) as error:
            raise InputError(
                "The arguments do not have the structure the program was captured with",
                expected=f"{len(self.example_args)} positional, keywords {sorted(self.example_kwargs)}",
                got=f"{len(args)} positional, keywords {sorted(kwargs)}",
            ) from error
        problems = []
        for node, given in zip(self.placeholders, flat, strict=True):
            fake = value(node)
            if not isinstance(fake, Tensor):
                continue
            if not isinstance(given, Tensor):
                problems.append(f"{node.name}: expected a tensor, got {type(given).__name__}")
            elif given.dim() != fake.dim() or any(
                isinstance(want, int) and want != have
                for want, have in zip(fake.shape, given.shape, strict=True)
            ):
                problems.append(f"{node.name}: expected shape {list(fake.shape)}, got {list(given.shape)}")
            elif given.dtype != fake.dtype:
                problems.append(f"{node.name}: expected {fake.dtype}, got {given.dtype}")
        if problems:
            raise InputError(
                "Inputs do not fit the program",
                got="; ".join(problems),
                hint="sizes that should vary must be declared in dynamic_shapes when the model is captured",
            )

    def copy_graph(self) -> fx.Graph:
        """A copy of the graph for editing (nodes keep names and metadata)."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            new = graph.node_copy(node, lambda n: mapping[n])
            new.meta = copy.copy(node.meta)
            mapping[node] = new
        graph._codegen = copy.copy(self.graph._codegen)
        return graph

    def with_record(self, *records: Mapping[str, Any]) -> Program:
        """The same program with more records."""
        return Program(
            self.graph,
            self.tensors,
            self.example_args,
            self.example_kwargs,
            self.dynamic_shapes,
            (*self.records, *records),
            self.caches,
        )

    def lent(self) -> Program:
        """The same program for a look ahead: passes that run on it free nothing."""
        return self.with_record()

    def run_float64(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Flat results computed in float64 (weights cast one use and one part at a time: no second copy of them)."""
        args = self.example_args if args is None else args
        kwargs = self.example_kwargs if kwargs is None else kwargs
        inputs = self.flatten_inputs(args, kwargs)
        small = _elements(self.tensors.values()) < _SMALL and _elements(inputs) < _FEW
        with torch.no_grad(), one_thread(when=small):
            flat = _Float64Interpreter(self.graph, self.tensors).run(*inputs, enable_io_processing=False)
        return pytree.tree_leaves(flat)

    def run_comparable(self) -> list[Any]:
        """`run_float64` on the example inputs, with floats where caches are codes: what every program of a series of
        passes returns alike."""
        return decoded(self.caches, self.run_float64())

    def run_observed(
        self,
        observe: Callable[[fx.Node, Any], None],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run and call `observe(node, value)` after every node (calibration). Values die after their last use."""
        with torch.no_grad():
            flat = _Observer(self.graph_module, observe).run(
                *self.flatten_inputs(args, kwargs or {}), enable_io_processing=False
            )
        return self.unflatten_outputs(flat)

    def to_exported_program(self) -> ExportedProgram:
        """The program as torch.export's own type, for `.pt2` files and other backends."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                self.graph_module,
                self.example_args,
                self.example_kwargs,
                dynamic_shapes=self.dynamic_shapes,
                strict=False,
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.pt2` file that torch.export.load and `Program.load` read. Raises ArtefactError."""
        path = Path(path)
        exported = self.to_exported_program()
        with replacing(path) as file:
            torch.export.save(
                exported,
                file,
                extra_files={
                    _RECORD_FILE: json.dumps(
                        {"records": self.records, "caches": [cache.to_json() for cache in self.caches]}
                    )
                },
            )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Program:
        """Read a `.pt2` file written by `save` or by torch.export.save. Raises ArtefactError."""
        from .capture import capture

        extra = {_RECORD_FILE: ""}
        program = capture(load_pt2(path, extra))
        held = json.loads(extra[_RECORD_FILE]) if extra[_RECORD_FILE] else {"records": []}
        return Program(
            program.graph,
            program.tensors,
            program.example_args,
            program.example_kwargs,
            program.dynamic_shapes,
            held["records"],
            map(CodedCache.from_json, held.get("caches", ())),
        )


def load_pt2(path: str | os.PathLike[str], extra_files: dict[str, Any] | None = None) -> ExportedProgram:
    """torch.export.load with isofold's operators registered and errors that name the file."""
    if not Path(path).is_file():
        raise ArtefactError("There is no such file", where=str(path), hint="give the path of a .pt2 file")
    try:
        return torch.export.load(path, extra_files=extra_files)
    except Exception as error:
        raise ArtefactError(
            "The file is not a readable .pt2 archive",
            where=str(path),
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            hint="write it again with torch.export.save or Program.save, with this version of torch",
        ) from error


class _Observer(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, observe: Callable[[fx.Node, Any], None]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.observe = observe

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.observe(n, result)
        return result


class _Float64Interpreter(fx.Interpreter):
    """Runs in float64: tensors are widened where a node reads them, and dtype arguments with them.

    It reads the program's own tensors, as a module made of them would keep them alive. Custom operators run as the
    graphs of their kernels, which may refuse float64; one without such a graph runs in its own types where it refuses.
    """

    def __init__(self, graph: fx.Graph, tensors: Mapping[str, Any], kernels: Kernels | None = None) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.tensors, self.kernels = tensors, kernels or Kernels()

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and is_custom(n.target):
            return self._custom(n)
        return super().run_node(n)

    def _custom(self, n: fx.Node) -> Any:
        traced = self.kernels.trace(n)
        if not isinstance(traced, str):
            held = {
                str(read.target): getattr(traced, str(read.target))
                for read in traced.graph.find_nodes(op="get_attr")
            }
            inputs = (self.env[source] for source in n.all_input_nodes)
            return _Float64Interpreter(traced.graph, held, self.kernels).run(
                *inputs, enable_io_processing=False
            )
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        target: Any = n.target
        try:
            return pytree.tree_map(
                _widen, target(*pytree.tree_map(_widen, args), **pytree.tree_map(_widen, kwargs))
            )
        except Exception:  # whatever a kernel that knows no float64 raises
            own = map_arg((n.args, n.kwargs), lambda source: _as_in(self.env[source], value(source)))
            return pytree.tree_map(_widen, target(*own[0], **own[1]))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.tensors[target]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.embedding.default:
            # Rows that are looked up, not the table.
            return _widen(super().call_function(target, args, kwargs))
        if target is torch.ops.aten.linear.default and not kwargs and args[1].numel() > _LARGE:
            return self._large_linear(*args)
        if target is torch.ops.isofold.linear_grouped.default and not kwargs:
            x, expert, weight = args[:3]
            bias = _widen(args[3]) if len(args) > 3 else None
            matrix: Callable[[int], Tensor] = lambda e: _widen(weight[e])  # noqa: E731  # an expert at a time
            return by_expert(_widen(x), expert, weight.shape[0], weight.shape[1], matrix, bias)
        widened = pytree.tree_map(_widen, (args, kwargs))
        return super().call_function(target, *widened)

    def _large_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x, rows = _widen(x), max(1, _LARGE // weight.shape[1])
        biases = [None] * len(weight) if bias is None else bias.split(rows)
        parts = zip(weight.split(rows), biases, strict=False)
        return torch.cat([linear(x, _widen(w), _widen(b)) for w, b in parts], -1)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return pytree.tree_map(_widen, super().output(target, args, kwargs))


def _as_in(v: Any, traced: Any) -> Any:
    """A value in the type that it has in the program."""
    return v.to(traced.dtype) if isinstance(v, Tensor) and isinstance(traced, Tensor) else v


def _elements(values: Iterable[Any]) -> int:
    return sum(v.numel() for v in values if isinstance(v, Tensor))


def _widen(v: Any) -> Any:
    if isinstance(v, Tensor) and v.dtype in _FLOATS:
        return v.to(torch.float64)
    if isinstance(v, Tensor) and v.dtype == torch.complex64:
        return v.to(torch.complex128)
    if isinstance(v, torch.dtype) and v in _FLOATS:
        return torch.float64
    if isinstance(v, torch.dtype) and v == torch.complex64:
        return torch.complex128
    return v
