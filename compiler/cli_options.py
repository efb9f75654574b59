"""Arguments and options that several commands of the command line share, with their completion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def complete_recipe(incomplete: str) -> list[str]:
    """Presets, and recipe files in this folder."""
    from .recipe import PRESETS

    files = [str(path) for pattern in ("*.yaml", "*.yml") for path in Path().glob(pattern)]
    return [name for name in [*PRESETS, *sorted(files)] if name.startswith(incomplete)]


def complete_target(incomplete: str) -> list[str]:
    """Targets of the registered backends."""
    from .registry import known_targets

    return [name for name in known_targets() if name.startswith(incomplete)]


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .pt2 file, python:module:name or python:file.py:name, or a transformers folder or config.json.",
    ),
]
ArtefactArgument = Annotated[
    Path, typer.Argument(metavar="ARTEFACT", help="A folder that `isofold compile` wrote.")
]
RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        help="A preset (w8a8, w4a8, w4a16, ...) or a YAML file.",
        autocompletion=complete_recipe,
    ),
]
TargetOption = Annotated[
    str, typer.Option("--target", help="Where the result runs.", autocompletion=complete_target)
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Typical inputs for static ranges: .npz or .safetensors by input name, or .pt."
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads to use. Default: all cores.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value to stdout and nothing else.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what exists at the output.")]
NoVerifyOption = Annotated[
    bool, typer.Option("--no-verify", help="Do not compare the program after every pass.")
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of errors.", envvar="ISOFOLD_DEBUG")
]
InputsOption = Annotated[
    Path | None, typer.Option("--inputs", "-i", metavar="FILE", help="Inputs by name, .npz or .safetensors.")
]
