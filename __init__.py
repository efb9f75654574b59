"""isofold: a graph compiler and export backend for compressed PyTorch models.

    model = isofold.compile(module, args, recipe="w4a8")     # verified, packed, on ONNX Runtime
    isofold.export(module, "model.onnx", args)               # the same as one ONNX file
    model = isofold.load("folder")                           # later, without torch

Names are imported when they are first used, so that loading an artefact imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiler.capture import capture
    from .compiler.driver import Step
    from .compiler.errors import IsofoldError
    from .compiler.frontend import compile, export
    from .compiler.loading import load
    from .compiler.machine import machine
    from .compiler.passes import Guarantee, PassResult, define_pass
    from .compiler.program import Program
    from .compiler.recipe import PRESETS, Recipe
    from .compiler.tune_job import tune

__all__ = [
    "PRESETS",
    "Guarantee",
    "IsofoldError",
    "PassResult",
    "Program",
    "Recipe",
    "Step",
    "capture",
    "compile",
    "define_pass",
    "export",
    "load",
    "machine",
    "tune",
]

_HOME = {
    "PRESETS": "recipe",
    "Guarantee": "passes",
    "IsofoldError": "errors",
    "PassResult": "passes",
    "Program": "program",
    "Recipe": "recipe",
    "Step": "driver",
    "capture": "capture",
    "compile": "frontend",
    "define_pass": "passes",
    "export": "frontend",
    "load": "loading",
    "machine": "machine",
    "tune": "tune_job",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'isofold' has no attribute {name!r}")
    found = getattr(import_module(f".compiler.{_HOME[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
