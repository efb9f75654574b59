"""What the command line shows: stages with progress on stderr, tables, and errors that people can act on.

Progress and errors go to stderr, results to stdout, so that `--json` output can be piped. On a terminal progress
is a live line; elsewhere each stage is a line of its own. Imports no torch.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .errors import IsofoldError

_FRACTION = re.compile(r"^(.*?)\s*\(?(\d+)/(\d+)\)?$")


def standard_error() -> Console:
    """The console for progress and errors."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def standard_output() -> Console:
    """The console for results; wide enough for every table where it is no terminal."""
    wide = None if sys.stdout.isatty() else 200
    return Console(highlight=False, width=wide)


@contextmanager
def stages(*, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show the names of stages as they begin: yields the callback that `compile(progress=...)` takes.

    A name that ends in `3/12` or `(3/12)` is shown as a bar.
    """
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _live() as say:
            yield say
    else:
        yield _lines()


@contextmanager
def _live() -> Iterator[Callable[[str], None]]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=standard_error(), transient=True) as progress:
        task: list[TaskID] = []
        current = ""

        def say(stage: str) -> None:
            nonlocal current
            name, done, total = _fraction(stage)
            if task and name == current:
                progress.update(
                    task[0], completed=done, total=total, count=f"{done}/{total}" if total else ""
                )
                return
            if task:
                progress.remove_task(task.pop())
            current = name
            count = f"{done}/{total}" if total else ""
            task.append(progress.add_task(name, total=total, completed=done, count=count))

        yield say


def _lines() -> Callable[[str], None]:
    started = time.perf_counter()
    current = ""

    def say(stage: str) -> None:
        nonlocal current
        name, _, _ = _fraction(stage)
        if name != current:
            current = name
            print(f"[{time.perf_counter() - started:6.1f} s] {name}", file=sys.stderr, flush=True)

    return say


def _fraction(stage: str) -> tuple[str, int, int | None]:
    found = _FRACTION.match(stage)
    return (found[1], int(found[2]), int(found[3])) if found else (stage, 0, None)


def show_error(error: BaseException, *, debug: bool) -> None:
    """An error on stderr: isofold's own as their text, others as a defect to report; with `debug` the traceback."""
    console = standard_error()
    if debug:
        console.print(Text("".join(traceback.format_exception(error))))
    if isinstance(error, IsofoldError):
        text, title = error.text(), "error"
    else:
        text = f"{type(error).__name__}: {error}"
        hint = (
            ""
            if debug
            else "\n  try: run it again with --debug for the traceback, and report it with the model"
        )
        text, title = f"{text}{hint}", "unexpected error"
    if sys.stderr.isatty():
        console.print(Panel(Text(text), title=title, title_align="left", border_style="red"))
    else:
        print(f"{title}: {text}", file=sys.stderr)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """A table on stdout. A column whose name starts with '>' is set flush right."""
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False
    )
    for column in columns:
        right = column.startswith(">")
        name = column.removeprefix(">")
        table.add_column(name, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    standard_output().print(table)


def show(text: str) -> None:
    """A line of results on stdout."""
    standard_output().print(Text(text), soft_wrap=True)
