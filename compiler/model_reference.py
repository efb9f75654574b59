"""The MODEL argument of the command line: a `.pt2` file, a Python reference, or a transformers config.

model.pt2                       written by torch.export.save or Program.save
python:package.module:name      an nn.Module, an ExportedProgram, or a function that returns one, or a tuple
python:path/to/file.py:name     (module, args[, kwargs[, dynamic_shapes]])
folder | config.json            a transformers model: its weights where the folder holds safetensors, else random
                                ones from a fixed seed
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .artefact import MANIFEST
from .errors import InputError, near_misses

SCHEME = "python:"
FORMS = "a .pt2 file, python:module:name, or a folder or config.json of a transformers model"


@dataclass(frozen=True)
class Reference:
    """A model with the example inputs it came with; `args` and `kwargs` None where the model brings its own."""

    name: str
    model: Any
    args: Sequence[Any] | None = None
    kwargs: Mapping[str, Any] | None = None
    dynamic_shapes: Any = None


def resolve_model(text: str, *, seed: int = 0) -> Reference:
    """The model that `text` names. Raises InputError that says what was expected and lists near misses."""
    if text.startswith(SCHEME):
        return _from_python(text)
    path = Path(text)
    if path.suffix == ".pt2":
        return Reference(path.stem, path)
    if path.is_dir() and (path / MANIFEST).is_file():
        raise InputError(
            "This is a compiled artefact, not a model",
            where=text,
            expected=FORMS,
            hint="isofold inspect, run and bench take artefacts",
        )
    config = path / "config.json" if path.is_dir() else path
    if config.suffix == ".json" and config.is_file():
        return _from_config(config, seed)
    raise InputError("There is no such model", where=text, expected=FORMS, got=_found(path), hint=_hint(path))


def _found(path: Path) -> str:
    if path.is_dir():
        return "a folder without config.json"
    return f"a file ending in {path.suffix or 'nothing'}" if path.exists() else "no such file or folder"


def _hint(path: Path) -> str | None:
    parent = path.parent
    return near_misses(path.name, os.listdir(parent)) if parent.is_dir() and not path.exists() else None


def _from_python(text: str) -> Reference:
    module_name, _, attribute = text.removeprefix(SCHEME).rpartition(":")
    if not module_name or not attribute:
        raise InputError(
            "The Python reference is incomplete",
            where=text,
            expected="python:package.module:name, or python:file.py:name",
        )
    module = _import(module_name, text)
    if not hasattr(module, attribute):
        raise InputError(
            f"The module {module_name!r} has no {attribute!r}",
            where=text,
            hint=near_misses(attribute, vars(module)),
        )
    found = getattr(module, attribute)
    return _as_reference(attribute, _call(found, text), text)


def _import(name: str, where: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = Path(name).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    except FileNotFoundError as error:
        raise InputError("There is no such Python file", where=str(error.filename or name)) from error
    except ModuleNotFoundError as error:
        raise InputError(
            f"The Python module {error.name!r} cannot be imported",
            where=where,
            hint="run from the folder that holds it, or give the path of a .py file",
        ) from error
    except Exception as error:
        raise InputError(
            "The Python module raised an error while it was imported",
            where=f"{where}{_last_line(error)}",
            got=f"{type(error).__name__}: {error}",
        ) from error
    return module


def _last_line(error: BaseException) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "" if frame is None else f" ({frame.tb_frame.f_code.co_filename}:{frame.tb_lineno})"


def _call(found: Any, where: str) -> Any:
    from torch import nn

    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as error:
        raise InputError(
            "The function that makes the model raised an error",
            where=f"{where}{_last_line(error)}",
            expected="a function without arguments",
            got=f"{type(error).__name__}: {error}",
        ) from error


def _as_reference(name: str, made: Any, where: str) -> Reference:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from .program import Program

    parts = made if isinstance(made, tuple) else (made,)
    if not parts or len(parts) > 4 or not isinstance(parts[0], (nn.Module, ExportedProgram, Program)):
        raise InputError(
            "The Python reference does not give a model",
            where=where,
            expected="an nn.Module, an ExportedProgram, or a tuple (module, args[, kwargs[, dynamic_shapes]])",
            got=f"a tuple of {len(parts)}" if isinstance(made, tuple) else type(made).__name__,
        )
    padded: list[Any] = [*parts, None, None, None]
    model, args, kwargs, dynamic_shapes = padded[:4]
    if isinstance(args, Tensor):
        args = (args,)
    if isinstance(args, Mapping) and kwargs is None:
        args, kwargs = (), args
    return Reference(name, model, args, kwargs, dynamic_shapes)


def _from_config(config: Path, seed: int) -> Reference:
    import torch
    import transformers

    try:
        kind = json.loads(config.read_text()).get("model_type")
        loaded = transformers.AutoConfig.from_pretrained(config, local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            "The transformers config cannot be read",
            where=str(config),
            got=str(error).strip().splitlines()[0],
        ) from error
    names = [n for n in getattr(loaded, "architectures", None) or [] if hasattr(transformers, n)]
    maker = getattr(transformers, names[0]) if names else transformers.AutoModel
    folder = config.parent
    try:
        if any(folder.glob("*.safetensors")):
            # Its bar would stand between our own stages, and in the way of --quiet.
            transformers.utils.logging.disable_progress_bar()
            model = maker.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = maker._from_config(loaded) if names else maker.from_config(loaded)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"The {kind} model cannot be built from its folder",
            where=str(folder),
            got=str(error).strip().splitlines()[0],
        ) from error
    return Reference(folder.resolve().name, model.eval().float())
