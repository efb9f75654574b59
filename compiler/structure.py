"""Structures of arguments and results as JSON, so that a session rebuilds them without torch.

    {"tensor": 0}                      the tensor number 0
    {"integer": 0}                     the same as a Python int (a size that the model returns)
    {"constant": null}                 a value that never changes (None, numbers, strings)
    {"tuple": [...]}, {"list": [...]}  and {"dict": {"name": ...}}

Classes that torch treats as containers (named tuples, transformers' ModelOutput, dataclasses) become tuples and dicts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError, UnsupportedError

Structure = dict[str, Any]

_CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Leaf:
    """Stands for the tensor `index` in a value that is encoded; `integer` where the model has a Python int."""

    index: int
    integer: bool = False


def encode(value: Any) -> Structure:
    """The structure of `value`, whose tensors are `Leaf`s. Raises UnsupportedError for other objects."""
    if isinstance(value, Leaf):
        return {"integer" if value.integer else "tensor": value.index}
    if isinstance(value, _CONSTANTS):
        return {"constant": value}
    value = _fields(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    if isinstance(value, list):
        return {"list": [encode(item) for item in value]}
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    raise UnsupportedError(
        "An argument or result of the model has a type that an artefact cannot describe",
        expected="tensors, None, numbers and strings in tuples, lists and dicts with string keys",
        got=f"{type(value).__module__}.{type(value).__qualname__}",
        hint="wrap the model in a module that takes and returns these",
    )


def _fields(value: Any) -> Any:
    """A dataclass's fields by name; other values as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Mapping):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def decode(structure: Structure, tensors: list[Any]) -> Any:
    """The value with the given tensors."""
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "integer":
        return int(tensors[content])
    if kind == "constant":
        return content
    if kind == "dict":
        return {key: decode(item, tensors) for key, item in content.items()}
    items = [decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def flatten(structure: Structure, value: Any, where: str, take: Callable[[int, str, Any], None]) -> None:
    """Call `take(index, where, tensor)` for every tensor of `value`. Raises InputError for another structure."""
    ((kind, content),) = structure.items()
    if kind in ("tensor", "integer"):
        take(content, where, value)
    elif kind == "constant":
        if value is not content and not (type(value) is type(content) and value == content):
            raise InputError(
                f"Argument {where} was fixed when the model was compiled",
                expected=repr(content),
                got=repr(value) if isinstance(value, _CONSTANTS) else type(value).__name__,
                hint="compile the model again with this value",
            )
    elif kind == "dict":
        value = _fields(value)
        if not isinstance(value, Mapping) or set(value) != set(content):
            got = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise InputError(
                f"Argument {where} has another structure", expected=f"a dict of {sorted(content)}", got=got
            )
        for key, item in content.items():
            flatten(item, value[key], f"{where}[{key!r}]", take)
    else:
        if not isinstance(value, (tuple, list)) or len(value) != len(content):
            got = f"{len(value)} values" if isinstance(value, (tuple, list)) else type(value).__name__
            raise InputError(
                f"Argument {where} has another structure", expected=f"a {kind} of {len(content)}", got=got
            )
        for position, item in enumerate(content):
            flatten(item, value[position], f"{where}[{position}]", take)


def leaf_names(structure: Structure, prefix: str) -> dict[int, str]:
    """Names of the tensors by their keys: `prefix_0_key`; a dict at the top gives its keys alone."""
    names: dict[int, str] = {}

    def walk(part: Structure, path: list[str]) -> None:
        ((kind, content),) = part.items()
        if kind in ("tensor", "integer"):
            names.setdefault(content, "_".join(path) or prefix)
        elif kind == "dict":
            for key, item in content.items():
                walk(item, [*path, key])
        elif kind in ("tuple", "list"):
            for position, item in enumerate(content):
                walk(item, [*(path or [prefix]), str(position)])

    walk(structure, [])
    return names
