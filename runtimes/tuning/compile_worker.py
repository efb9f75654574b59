"""Compiles kernels for the tuner, in a process of its own: `python -m isofold.runtimes.tuning.compile_worker`."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..kernels import attention, dense, linear, linear_float, outliers
from ..kernels.codegen import ISAS, compile_object, header, table
from ..kernels.knobs import Settings
from .child import serve

_TUNED = [*linear.KERNELS, *linear_float.KERNELS, *dense.KERNELS, *attention.KERNELS]
_KERNELS = [*_TUNED, *outliers.KERNELS]
"""What `struct isofold_kernels` has: the drivers name them all."""
_ISAS = {isa.name: isa for isa in ISAS}


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    if question["do"] == "groups":
        return {"groups": sorted({k.group for k in _TUNED})}
    path = Path(question["path"])
    if question["do"] == "header":
        _write(path, header(_KERNELS))
        return {}
    settings, isa = Settings(question["settings"]), _ISAS[question["isa"]]
    if question["do"] == "table":
        name = "isofold_candidate"
        declared = f'#include "kernels.h"\nextern "C" {{\nextern const struct isofold_kernels {name};\n'
        _write(path, declared + table(_KERNELS, isa, name, settings, question["groups"]) + "\n}\n")
        return {}
    kernels = [k for k in _TUNED if fnmatchcase(k.group, question["group"])]
    if not kernels:
        raise ValueError(f"there is no group of kernels {question['group']!r}")
    compile_object(kernels, isa, path, settings)
    return {}


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


if __name__ == "__main__":
    serve(_answer)
