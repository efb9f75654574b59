"""`isofold.tune` and `isofold tune`: search the constants of a backend's kernels by measuring, on real shapes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artefact import MANIFEST
from .errors import InputError
from .registry import backend_for

if TYPE_CHECKING:
    from .frontend import Model
    from .recipe import Recipe

Say = Callable[[str], None]

TRACES = 64
"""Schedules of MetaSchedule's that are measured for a kernel."""
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def tune(
    model: Model | None = None,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    time: float | str = 600,
    recipe: Recipe | str | os.PathLike[str] | dict[str, Any] = "w4a8",
    threads: int | None = None,
    rpc: str | None = None,
    key: str = "isofold",
    database: str | os.PathLike[str] | None = None,
    merge: Sequence[str | os.PathLike[str]] = (),
    isa: str | None = None,
    target: str = "cpu",
    dynamic_shapes: Any = None,
    traces: int = TRACES,
    progress: Say | None = None,
) -> dict[str, Any]:
    """Tune the target's kernels for this machine by measuring; what is found is used from then on.

    model: what to tune for: an artefact's folder, or a model as in `compile` with args, kwargs and dynamic_shapes (it
        goes through `recipe` first). None: common shapes of linears.
    time: seconds, or a text such as "10m"; 0 only merges.
    threads: how many each measurement uses; default all cores.
    rpc, key: `HOST:PORT` of a TVM tracker and the key of its servers, which then measure instead of this machine.
    database: a file of measurements; default one in the cache folder, which the op library's build reads. What it
        has is not measured again; after a kill or Ctrl-C the next call goes on.
    merge: other databases whose measurements are taken over first. isa: "v3" or "v4"; default the best there is.
    target: "cpu", "tvm-cpu" (also what TVM generates for the model) or "cuda:sm_80" (a GPU, here or there).
    traces: how many schedules of MetaSchedule are measured for each kernel that TVM generates; 0: none.

    Returns a dict: database, processors, seconds, measured, merged, lost, notes, library (built, or None) and
    workloads, a list of {workload, group, isa, processor, tried, before, after, ratio, noise, knobs, invented}; before
    and after are seconds of one layer; invented: after is that of one of MetaSchedule's schedules.

    Raises InputError (addresses, files, models), ToolchainError (g++ or TVM missing).
    """
    seconds = duration(time)
    backend = backend_for(target)
    if not hasattr(backend, "tune"):
        raise InputError("This target has nothing to tune", where=f"target={target!r}", expected="cpu")
    subject: Any = None
    say = progress or (lambda _: None)
    if model is not None and seconds > 0:
        if isinstance(model, str | os.PathLike) and (Path(model) / MANIFEST).is_file():
            subject = Path(model)
        else:
            from .frontend import prepare

            subject = prepare(
                model,
                args,
                kwargs,
                recipe=recipe,
                dynamic_shapes=dynamic_shapes,
                verify=False,
                dense=backend.dense_linears,
                progress=say,
            ).program
    return backend.tune(
        subject,
        seconds=seconds,
        threads=threads,
        rpc=rpc,
        key=key,
        database=None if database is None else Path(database),
        merge=[Path(path) for path in merge],
        isa=isa,
        target=target,
        traces=traces,
        progress=say,
    )


def tune_named(text: str | None, **options: Any) -> dict[str, Any]:
    """`tune` for a model as the command line names it."""
    if text is None or (Path(text) / MANIFEST).is_file():
        return tune(text, **options)
    from .model_reference import resolve_model

    reference = resolve_model(text)
    return tune(
        reference.model,
        reference.args,
        reference.kwargs,
        dynamic_shapes=reference.dynamic_shapes,
        **options,
    )


def duration(value: float | str) -> float:
    """Seconds of a number or of a text such as `90`, `90s`, `10m` or `1h30m`. Raises InputError."""
    if isinstance(value, int | float):
        if value >= 0:
            return float(value)
    else:
        parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", value.strip())
        if parts is not None and any(parts.groups()):
            return sum(float(n) * _UNITS[unit] for n, unit in zip(parts.groups(), "hms", strict=True) if n)
    raise InputError("This is no duration", got=repr(value), expected="seconds, or such as 90s, 10m, 1h30m")


def show_tuned(result: Mapping[str, Any]) -> None:
    """The summary: before and after of every workload."""
    from .console import show, show_table

    def micro(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1e6 * seconds:.0f} µs"

    rows = []
    for row in result["workloads"]:
        knobs = ", ".join(f"{name} {value}" for name, value in (row["knobs"] or {}).items())
        knobs = "MetaSchedule's schedule" if row.get("invented") else knobs
        gain = "" if row["ratio"] is None else f"{1 / row['ratio']:.3f}x ± {row['noise'] / row['ratio']:.3f}"
        cells = [row["workload"], f"{row['group']} {row['isa']}", str(row["tried"]), micro(row["before"])]
        rows.append([*cells, micro(row["after"]), gain, knobs or "defaults stay"])
    if rows:
        columns = ["workload", "kernels", ">tried", ">before", ">after", ">faster", "values that changed"]
        show_table(columns, rows, title="; ".join(result["processors"]))
    for note in result["notes"]:
        show(f"note: {note}")
    if result["lost"]:
        show(
            f"{len(result['lost'])} times a machine was lost, its work was given to another: {result['lost'][-1]}"
        )
    if result["merged"]:
        show(f"{result['merged']} results merged")
    show(f"{result['measured']} new results in {result['database']} ({result['seconds']:.0f} s)")
    if result["library"]:
        show(f"op library: {result['library']}")
