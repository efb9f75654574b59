"""The command line: `isofold compile | export | run | bench | inspect | build | machine | tune | demo`.

Results go to stdout (with `--json` one JSON value and nothing else), progress and errors to stderr. Exit codes: 0 done,
1 a defect, 2 something the user can correct, 130 interrupted, 143 terminated (docs/command-line.md). Everything heavy
is imported inside the commands, so that help and completion are quick.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from .cli_options import (
    ArtefactArgument,
    CalibrationOption,
    DebugOption,
    ForceOption,
    InputsOption,
    JsonOption,
    ModelArgument,
    NoVerifyOption,
    QuietOption,
    RecipeOption,
    TargetOption,
    ThreadsOption,
    complete_target,
)
from .errors import InputError, IsofoldError

app = typer.Typer(
    name="isofold",
    help="Compile PyTorch models into smaller, faster ones that run on ONNX Runtime.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143

_Command = TypeVar("_Command", bound=Callable[..., None])


def command(function: _Command) -> _Command:
    """Register a command; its errors become messages and exit codes."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except typer.Exit:
            raise
        except IsofoldError as error:
            _fail(error, kwargs, USER_ERROR)
        except KeyboardInterrupt:
            typer.echo("interrupted; nothing was left half-written", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of a pipe (head, less) has seen enough; Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except MemoryError as error:
            _fail(InputError("There is not enough memory", got=str(error) or None), kwargs, USER_ERROR)
        except Exception as error:
            _fail(error, kwargs, 1)

    name = function.__name__.removesuffix("_command")
    registered: _Command = app.command(name)(guarded)  # type: ignore[assignment] # typer keeps the signature
    return registered


def _fail(error: BaseException, kwargs: dict[str, Any], code: int) -> None:
    from .console import show_error

    show_error(error, debug=bool(kwargs.get("debug")))
    raise typer.Exit(code) from None


@contextlib.contextmanager
def _session(*, as_json: bool, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Progress for a command; what libraries print meanwhile goes to stderr when stdout must be JSON."""
    from .console import stages

    with (
        contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext(),
        stages(quiet=quiet) as say,
    ):
        yield say


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("isofold"))
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@command
def compile_command(
    model: ModelArgument,
    recipe: RecipeOption = "w8a8",
    target: TargetOption = "cpu",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the artefact. Default: NAME-RECIPE here.")
    ] = None,
    calibration: CalibrationOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    no_verify: NoVerifyOption = False,
    quiet: QuietOption = False,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile a model into an artefact: one folder that ONNX Runtime opens, with a report."""
    from .compile_job import compile_model

    with _session(as_json=as_json, quiet=quiet) as say:
        done = compile_model(
            model,
            recipe=recipe,
            target=target,
            output=output,
            calibration=calibration,
            threads=threads,
            verify=not no_verify,
            overwrite=force,
            say=say,
        )
    if as_json:
        _print_json({"artefact": str(done.folder), "report_html": str(done.page), **done.report})
    else:
        done.show()


@command
def export_command(
    model: ModelArgument,
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="File to write, model.onnx; weights go to FILE.data.")
    ],
    recipe: RecipeOption = "w8a8",
    target: TargetOption = "cpu",
    calibration: CalibrationOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    no_verify: NoVerifyOption = False,
    quiet: QuietOption = False,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile a model into one file of the target's own kind."""
    from .compile_job import export_model, show_totals

    with _session(as_json=as_json, quiet=quiet) as say:
        report = export_model(
            model,
            path,
            recipe=recipe,
            target=target,
            calibration=calibration,
            threads=threads,
            verify=not no_verify,
            overwrite=force,
            say=say,
        )
    if as_json:
        _print_json({"file": str(path), **report})
    else:
        show_totals(report, str(path))


@command
def run_command(
    artefact: ArtefactArgument,
    inputs: InputsOption = None,
    outputs: Annotated[
        Path | None,
        typer.Option("--outputs", "-o", metavar="FILE", help="Write the results to this .npz file."),
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Run an artefact on a file of inputs (default: its own example inputs)."""
    from .run_job import run_artefact, show_summary

    with _session(as_json=as_json, quiet=quiet) as say:
        summary = run_artefact(artefact, inputs, outputs, threads=threads, overwrite=force, say=say)
    if as_json:
        _print_json(summary)
    else:
        show_summary(summary)


@command
def bench_command(
    artefact: ArtefactArgument,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against", metavar="PATH", help="Another artefact or an .onnx file, timed in turns. Repeatable."
        ),
    ] = None,
    inputs: InputsOption = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Time to spend on each.")] = 5.0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure the latency of artefacts and .onnx files, in turns, on the same inputs."""
    from .run_job import bench, show_latencies

    with _session(as_json=as_json, quiet=quiet) as say:
        rows = bench([artefact, *(against or [])], inputs, seconds=seconds, threads=threads, say=say)
    if as_json:
        _print_json(rows)
    else:
        show_latencies(rows)


@command
def inspect_command(
    subject: Annotated[
        str,
        typer.Argument(metavar="MODEL|ARTEFACT", help="A model (as for compile) or an artefact's folder."),
    ],
    recipe: RecipeOption = "w8a8",
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report of an artefact as a page.")
    ] = None,
    calibration: CalibrationOption = None,
    spaces: Annotated[
        bool, typer.Option("--spaces", help="Show which channels can change basis, and what forbids more.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show a model's layers and what a recipe would do to each, or an artefact's contents and integrity."""
    from .inspect_job import inspect
    from .inspect_tables import show_facts

    with _session(as_json=as_json, quiet=quiet) as say:
        facts = inspect(subject, recipe=recipe, calibration=calibration, html=html, say=say, spaces=spaces)
    if as_json:
        _print_json(facts)
    else:
        show_facts(facts)
    if facts.get("damaged"):
        raise typer.Exit(USER_ERROR)


@command
def build_command(
    target: TargetOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    force: Annotated[bool, typer.Option("--force", help="Build again even if it is there.")] = False,
    debug: DebugOption = False,
) -> None:
    """Build what a target needs on this machine ahead of time (for cpu: the op library)."""
    import time

    from .console import show
    from .registry import backend_for

    started = time.perf_counter()
    with _session(as_json=as_json, quiet=quiet) as say:
        path = backend_for(target).prepare(say, force=force)
    facts = {"target": target, "path": str(path) if path else None, "seconds": time.perf_counter() - started}
    if as_json:
        _print_json(facts)
    else:
        show(f"{path or 'nothing to build'} ({facts['seconds']:.1f} s)")


@command
def machine_command(
    threads: ThreadsOption = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure this machine once (under a minute), so that reports predict times and formats can be chosen by them."""
    from .machine import machine
    from .machine_table import show_machine

    with _session(as_json=as_json, quiet=quiet) as say:
        found = machine(threads, refresh=refresh, progress=say)
    if as_json:
        _print_json(found.to_json())
    else:
        show_machine(found)


@command
def tune_command(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|ARTEFACT",
            help="Tune for its linears (MODEL as for compile). Default: common shapes.",
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            "--time", "-t", help="How long: 90s, 10m, 1h30m. Default: 10m; 0 where --merge is given."
        ),
    ] = None,
    recipe: RecipeOption = "w4a8",
    threads: ThreadsOption = None,
    rpc: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Measure on the servers of this TVM tracker instead of here."),
    ] = None,
    key: Annotated[str, typer.Option(help="The key that its servers have.")] = "isofold",
    database: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep results here. Default: tuning.jsonl in the cache folder."),
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Take over the results of this database first. Repeatable."),
    ] = None,
    isa: Annotated[
        str | None, typer.Option(help="Instruction set, v3 or v4. Default: the best of each machine.")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="What runs the model: cpu, tvm-cpu (also what TVM generates for MODEL), or cuda:sm_80 and its like.",
            autocompletion=complete_target,
        ),
    ] = "cpu",
    traces: Annotated[
        int,
        typer.Option(
            min=0,
            help="Schedules of TVM's MetaSchedule to measure for each kernel that TVM generates; 0: none.",
        ),
    ] = 64,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Search the constants of the kernels by measuring; resumes, and the op library is built with the best."""
    from .tune_job import show_tuned, tune_named

    if isa not in (None, "v3", "v4"):
        raise InputError("There is no such instruction set", where=f"--isa {isa}", expected="v3 | v4")
    with _session(as_json=as_json, quiet=quiet) as say:
        try:
            result = tune_named(
                subject,
                time=time or ("0" if merge else "10m"),
                recipe=recipe,
                threads=threads,
                rpc=rpc,
                key=key,
                database=database,
                merge=merge or (),
                isa=isa,
                target=target,
                traces=traces,
                progress=say,
            )
        except KeyboardInterrupt:
            typer.echo("what was measured is kept; the same command goes on from there", err=True)
            raise
    if as_json:
        _print_json(result)
    else:
        show_tuned(result)


@command
def demo_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the artefacts and the report.")
    ] = Path("isofold-demo"),
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile the real MiniLM, embed real sentences, and compare with PyTorch and ONNX Runtime."""
    from .demo import run_demo, show_demo

    with _session(as_json=as_json, quiet=quiet) as say:
        result = run_demo(output, threads=threads, say=say)
    if as_json:
        _print_json(result)
    else:
        show_demo(result)


def main() -> None:
    """Entry point of the `isofold` script."""

    def terminate(number: int, frame: object) -> None:
        raise SystemExit(TERMINATED)

    # Without this, a SIGTERM would skip the clean-up of temporary files.
    signal.signal(signal.SIGTERM, terminate)
    app()


if __name__ == "__main__":
    main()
