"""Where passes and backends register themselves, so that the compiler needs to import neither.

A distribution declares a module under the entry-point group `isofold.plugins`; importing it must call
`register_pipeline` or `register_backend`. isofold's own passes and runtimes come in the same way. Nothing
here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import InputError, near_misses

if TYPE_CHECKING:
    from .driver import Step
    from .opened import OpenedModel
    from .program import Program
    from .recipe import Recipe

GROUP = "isofold.plugins"

Pipeline = Callable[["Program", "Recipe", Any, bool], Sequence["Step"]]
"""(program, recipe, calibration batches or None, whether the runtime wants float weights in panels) → the steps that
the recipe means for this program."""


class Backend(Protocol):
    """A runtime that programs are lowered to."""

    name: str
    targets: tuple[str, ...]
    """Values of `target=` that choose this backend."""

    dense_linears: bool
    """Whether float linears must come as `isofold.linear_dense`: the runtime has no matrix product of its own."""

    suffix: str
    """Suffix of the single file that `write_file` writes, such as ".onnx"."""

    def check_target(self, target: str) -> None:
        """Raise InputError for a suffix of a target that this backend does not know."""

    def write(
        self,
        program: Program,
        folder: Path,
        *,
        report: dict[str, Any],
        progress: Callable[[str], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Lower `program` into `folder` (empty, exists). Returns facts that are merged into the report."""

    def write_file(
        self,
        program: Program,
        path: Path,
        *,
        report: dict[str, Any],
        progress: Callable[[str], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Lower `program` to one file (data may stand beside it), replacing existing ones at the end."""

    def prepare(self, progress: Callable[[str], None] | None = None, force: bool = False) -> Path | None:
        """Build what the backend needs once per machine (`isofold build`). Returns its path."""

    def tune(
        self,
        subject: Program | Path | None,
        *,
        seconds: float,
        threads: int | None = None,
        rpc: str | None = None,
        key: str = "isofold",
        database: Path | None = None,
        merge: Sequence[Path] = (),
        isa: str | None = None,
        target: str,
        traces: int,
        progress: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Tune the kernels that a program or artefact (None: the default shapes) uses, by measuring (`isofold tune`).

        Returns `{database, processors, seconds, measured, merged, lost, notes, workloads, library}`.
        """

    def open(
        self, folder: Path, *, threads: int | None = None, verify: bool = False, **options: Any
    ) -> OpenedModel:
        """Open what `write` wrote. Must not import torch. verify: compare the hashes of all files."""


_backends: dict[str, Backend] = {}
_pipelines: list[Pipeline] = []


def register_backend(backend: Backend) -> None:
    """Make a backend known under its name and targets."""
    _backends[backend.name] = backend


def register_pipeline(pipeline: Pipeline) -> None:
    """Make known how recipes become steps. The last one registered is used."""
    _pipelines.append(pipeline)


@cache
def _load(only: str | None = None) -> None:
    for entry in entry_points(group=GROUP):
        if only is None or entry.name == only:
            import_module(entry.value)


def known_targets() -> list[str]:
    """Every value of `target=` that an installed backend takes."""
    _load()
    return [target for backend in _backends.values() for target in backend.targets]


def backend_for(target: str) -> Backend:
    """The backend whose targets contain `target` (or its part before a colon). Raises InputError."""
    _load()
    for backend in _backends.values():
        if target in backend.targets or target.split(":")[0] in backend.targets:
            backend.check_target(target)
            return backend
    known = known_targets()
    raise InputError(
        f"Unknown target {target!r}",
        expected=" | ".join(known) or "a registered backend",
        hint=near_misses(target, known),
    )


def backend_named(name: str) -> Backend:
    """The backend called `name`, loading only its own plugin where possible. Raises InputError."""
    _load(name)
    if name not in _backends:
        _load()
    if name not in _backends:
        raise InputError(
            f"No backend called {name!r} is installed",
            expected=" | ".join(_backends) or "a registered backend",
        )
    return _backends[name]


def pipeline() -> Pipeline:
    """The registered pipeline. Raises InputError where no passes are installed."""
    _load()
    if not _pipelines:
        raise InputError(
            "No passes are installed", hint=f"install a distribution with an entry point in {GROUP}"
        )
    return _pipelines[-1]
