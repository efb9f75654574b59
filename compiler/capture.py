"""Capture: an `nn.Module`, an ExportedProgram or a `.pt2` file becomes a `Program`.

torch.export traces the module, `run_decompositions` makes the graph functional while it keeps the
operators that mean something (linear, layer_norm, scaled_dot_product_attention), and tensors that share
storage (tied weights) become one entry.
"""

from __future__ import annotations

import inspect
import io
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import CaptureError, InputError
from .graph import fake_mode_of, source_line, value
from .program import Program, load_pt2


def capture(
    model: nn.Module | ExportedProgram | Program | str | os.PathLike[str],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Program:
    """Capture `model` into a Program.

    model: a module (set to eval mode for the trace and back; exported graphs, as `ExportedProgram.module()` returns,
        have one mode), an ExportedProgram, or the path of a `.pt2` file.
    args, kwargs: example inputs; needed for a module, taken from the file or program otherwise.
    dynamic_shapes: as for torch.export.export; None keeps every size of the examples fixed.
    Raises CaptureError with the user's source line where the model cannot be exported, and InputError where
    examples are missing.
    """
    if isinstance(model, Program):
        return model
    if isinstance(model, (str, os.PathLike)):
        return _from_exported(load_pt2(model), None)
    if isinstance(model, ExportedProgram):
        return _from_exported(model, dynamic_shapes)
    if not isinstance(model, nn.Module):
        raise InputError(
            "This cannot be captured",
            expected="an nn.Module, an ExportedProgram, or the path of a .pt2 file",
            got=type(model).__name__,
        )
    if args is None and kwargs is None:
        raise InputError(
            "A module needs example inputs to be captured",
            where=type(model).__qualname__,
            hint="pass args=(...) or kwargs={...}; an ExportedProgram, a .pt2 file or a transformers model brings them",
        )
    return _from_exported(
        _export(model, tuple(args or ()), dict(kwargs or {}), dynamic_shapes), dynamic_shapes
    )


@contextmanager
def quiet_torch() -> Iterator[None]:
    """No warnings or log lines while torch traces: what matters of them comes back in our own errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    args, kwargs = _distinct(args, kwargs)
    modes = {module: module.training for module in model.modules()}
    try:
        _evaluate(model)
        # torch.export prints the graph it had so far when it fails.
        with (
            quiet_torch(), redirect_stderr(io.StringIO()), torch.no_grad(), _no_new_cache(model, args, kwargs),
            _masks_as_given(),
        ):  # fmt: skip
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise _explain(error, model) from error
    finally:
        for module, training in modes.items():
            module.training = training


def _evaluate(model: nn.Module) -> None:
    """Set eval mode, but for exported graphs (`ExportedProgram.module()`, `convert_pt2e`) inside, which have no mode to
    switch, and say so with an error."""
    try:
        model.eval()
    except NotImplementedError:
        for module in model.modules():
            module.training = False


@contextmanager
def _no_new_cache(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """No cache is asked for where the caller gives none and does not ask for one himself.

    A decoder of `transformers` that is given no cache makes one and returns it, by default: an object, which programs
    cannot return, of no use to whoever passes none in. `config.use_cache` is what such models read where the argument
    `use_cache` is left out.
    """
    try:
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        given = kwargs
    asking: list[Any] = []
    if "use_cache" not in given and not any(name.startswith("past") for name in given):
        # A model for text inside one for several modalities has a configuration of its own.
        held = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
        asking = [config for config in held.values() if getattr(config, "use_cache", None) is True]
    for config in asking:
        config.use_cache = False
    try:
        yield
    finally:
        for config in asking:
            config.use_cache = True


@contextmanager
def _masks_as_given() -> Iterator[None]:
    """torch's Transformer layers apply the masks they are given, and do not ask whether these are causal.

    They compare values to find out, which cannot be traced; with the mask or with the flag, the result is the same.
    """
    asking = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = asking


def _distinct(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The examples with a tensor that is given twice copied: torch.export would take the two inputs for one."""
    seen: set[int] = set()

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        repeated = id(leaf) in seen
        seen.add(id(leaf))
        return leaf.clone() if repeated else leaf

    distinct: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(copied, (args, kwargs))
    return distinct


def _from_exported(exported: ExportedProgram, dynamic_shapes: Any) -> Program:
    if exported.example_inputs is None:
        raise InputError(
            "The exported program carries no example inputs",
            hint="export it again with torch.export.export(module, args), which keeps them",
        )
    args, kwargs = exported.example_inputs
    if dynamic_shapes is None:
        dynamic_shapes = _dynamic_shapes_of(exported)
    with quiet_torch(), _frozen_subclasses(exported):
        module = exported.run_decompositions({}).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    _refuse_state(module.graph)
    tensors = _deduplicate(module)
    _complete_values(module.graph, tensors)
    _views_to_reshapes(module.graph)
    return Program(module.graph, tensors, args, kwargs, dynamic_shapes)


@contextmanager
def _frozen_subclasses(exported: ExportedProgram) -> Iterator[None]:
    """Weights of other quantizers (tensor subclasses) as constants: torch makes parameters of their parts, and codes
    cannot require gradients."""
    held: list[Any] = [
        tensor
        for tensor in exported.state_dict.values()
        if tensor.requires_grad and is_traceable_wrapper_subclass(tensor)
    ]
    for tensor in held:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in held:
            tensor.requires_grad_(True)


def _refuse_state(graph: fx.Graph) -> None:
    """Drop what is written to buffers that no result depends on (counters). Raises CaptureError for others.

    A program keeps nothing between two calls, and a buffer that one call writes and the next reads would stay what it
    was, silently.
    """
    written: set[str] = set()
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target == torch.ops.aten.copy_.default and not node.users:
            buffer = node.args[0]
            assert isinstance(buffer, fx.Node)
            graph.erase_node(node)
            if buffer.op == "get_attr":
                written.add(str(buffer.target))
    if not written:
        return
    graph.eliminate_dead_code()
    read = [n for n in graph.nodes if n.op == "get_attr" and str(n.target) in written and n.users]
    if read:
        readers = (place for node in read for user in node.users if (place := source_line(user)))
        raise CaptureError(
            "The model keeps a state: it writes buffers that its next call reads",
            where=next(readers, None),
            got=", ".join(dict.fromkeys(str(node.target) for node in read)),
            expected="results that depend on the arguments and on constants alone",
            hint="make the state an argument and a result: forward(x, state) -> (y, new_state)",
        )


def _deduplicate(module: fx.GraphModule) -> dict[str, Any]:
    """Point `get_attr` nodes that read the same memory in the same way at one name."""
    tensors: dict[str, Any] = {}
    names: dict[tuple[Any, ...], str] = {}
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        found: Any = module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if isinstance(found, Tensor):
            key = (found.data_ptr(), found.dtype, tuple(found.shape), found.stride())
            if found.numel() and found.data_ptr():
                node.target = names.setdefault(key, str(node.target))
            found = found.detach() if not isinstance(found, nn.Parameter) else found
        tensors.setdefault(str(node.target), found)
    _merge_reads(module.graph)
    return tensors


def _merge_reads(graph: fx.Graph) -> None:
    """One `get_attr` node for each tensor."""
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            kept = first.setdefault(str(node.target), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)


def _complete_values(graph: fx.Graph, tensors: Mapping[str, Any]) -> None:
    mode = fake_mode_of(graph)
    for node in graph.nodes:
        held = tensors.get(str(node.target)) if node.op == "get_attr" else None
        if isinstance(held, Tensor) and not isinstance(value(node), Tensor):
            node.meta["val"] = mode.from_tensor(held, static_shapes=True)


def _views_to_reshapes(graph: fx.Graph) -> None:
    """Whether a reshape is a view depends on strides, and the traced ones hold for the example sizes only."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default


def _dynamic_shapes_of(exported: ExportedProgram) -> Any:
    """Dynamic shapes of an exported program in the structure of its arguments: AUTO where a size is symbolic."""
    by_name = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    user = [by_name[n] for n in exported.graph_signature.user_inputs if isinstance(n, str) and n in by_name]
    leaves = []
    for node in user:
        fake = value(node)
        symbolic = (
            {i: Dim.AUTO for i, size in enumerate(fake.shape) if not isinstance(size, int)}
            if isinstance(fake, Tensor)
            else {}
        )
        leaves.append(symbolic or None)
    if not any(leaves):
        return None
    args, kwargs = pytree.tree_unflatten(leaves, exported.call_spec.in_spec)
    return (*args, *kwargs.values()) if not kwargs else _by_parameter(args, kwargs)


def _by_parameter(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    # torch.export matches a sequence of specifications against args followed by the values of kwargs.
    return (*args, *kwargs.values()) if args else dict(kwargs)


def _explain(error: Exception, model: nn.Module) -> CaptureError:
    text = str(error)
    kind = type(error).__name__
    where = _user_frame(error, text)
    summary = next((line.strip() for line in text.splitlines() if line.strip()), kind)
    if "GuardOnDataDependent" in kind or "data-dependent" in text.lower():
        return CaptureError(
            "The model's control flow or shapes depend on the values of tensors, which torch.export cannot trace",
            where=where or type(model).__qualname__,
            got=summary,
            hint=(
                "replace the Python branch or .item() by torch.where / torch.cond, bound the size with torch._check, "
                "or split the model there and capture the halves"
            ),
        )
    if "Constraints violated" in text or "ConstraintViolation" in kind:
        fixes = re.search(r"Suggested fixes:\n((?:  .*\n?)+)", text)
        found = re.findall(r"^  - (.*)", text, re.M)
        left_out = re.search(r"generated guard \S+ != (\d+)", text)
        hint = "use torch.export.Dim.AUTO for sizes the model itself may restrict"
        if fixes:
            hint = "in dynamic_shapes: " + "; ".join(f.strip() for f in fixes.group(1).splitlines())
        elif left_out:
            most = int(left_out[1])
            hint = f"leave {most} out of the range, as in Dim(name, max={most - 1}): torch slices a buffer of that size"
        return CaptureError(
            "The declared dynamic shapes do not hold for this model",
            where=type(model).__qualname__,
            got=" | ".join(found) or summary,
            hint=hint,
        )
    if "not a known type" in text or "register a pytree" in text:
        return CaptureError(
            "The model takes or returns an object that is no tensor, and no tuple, list or dict of tensors",
            where=type(model).__qualname__,
            got=summary.split(". ")[0],
            hint="register a dataclass (torch.export.register_dataclass), or wrap the model in a module that takes its "
            "tensors apart (for the caches of decoders, see "
            "examples/decode_with_coded_caches.py), or leave the cache out: kwargs={..., 'use_cache': False}",
        )
    return CaptureError(
        "torch.export could not trace the model",
        where=where or type(model).__qualname__,
        got=f"{kind}: {summary}",
        hint="run torch.export.draft_export(model, args) for a full list of what stands in the way",
    )


def _user_frame(error: BaseException, text: str) -> str | None:
    """The innermost frame outside torch: from the text of the error, else from its traceback."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', text)
    outside = [
        f"{file}:{line}" for file, line in frames if "/torch/" not in file and not file.startswith("<")
    ]
    if outside:
        return outside[-1]
    here = os.path.dirname(os.path.abspath(__file__))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/torch/" not in frame.filename and not frame.filename.startswith((here, "<")):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return None
