"""What all benchmarks share: workers, interleaved measuring, rows with bars, the table and the JSON file.

A row is ``{name, value, unit, bar, holds}`` and where it was sampled ``quartiles``; ``bar`` is a text such as
``>= 1.1`` or None. Competitors run as processes of their own (worker.py) that are stopped with SIGSTOP
whenever it is not their turn, so that a thread pool that spins while it waits cannot take time from the next
one. Every round visits every competitor once; a ratio is formed inside a round and reported as median and
quartiles over the rounds, because the machine changes its speed from minute to minute.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peers import PeerError, cache_folder

HERE = Path(__file__).resolve().parent
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda value, bar: value >= bar,
    "<=": lambda value, bar: value <= bar,
    "<": lambda value, bar: value < bar,
    ">": lambda value, bar: value > bar,
}


# On a busy machine the best sample is the one that was disturbed least. A ratio has none: its best is luck.
BEST: dict[str, Callable[[Sequence[float]], float]] = {
    "us": min,
    "ms": min,
    "s": min,
    "GB/s": max,
    "GOPS": max,
}


WARM = 0.02
"""Seconds of uncounted runs at the start of a turn. A processor that was idle takes about 10 ms to its full clock, in
which short runs are up to 30 % slower (ONNX Runtime, one thread, Zen 5: of runs of 2.3 ms the fourth is the first at
full speed)."""


class BenchmarkError(RuntimeError):
    """A benchmark cannot run here; the message says why and what to do."""


def holds(value: float | None, bar: str | None) -> bool | None:
    """Whether the value meets a bar such as ``>= 1.1``; None without a bar. A missing value meets no bar."""
    if bar is None:
        return None
    if value is None or value != value:
        return False
    sign, number = bar.split()
    return COMPARISONS[sign](value, float(number))


@dataclass
class Results:
    """The rows of one benchmark, and how they leave it."""

    benchmark: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        name: str,
        value: float | None,
        unit: str,
        bar: str | None = None,
        quartiles: tuple[float, float] | None = None,
    ) -> None:
        """One row; its verdict follows from the bar."""
        row: dict[str, Any] = {
            "name": name,
            "value": value,
            "unit": unit,
            "bar": bar,
            "holds": holds(value, bar),
        }
        if quartiles is not None:
            row["quartiles"] = list(quartiles)
        self.rows.append(row)

    def sampled(self, name: str, samples: Sequence[float], unit: str, bar: str | None = None) -> None:
        """A row from samples: the median is the value; times and rates also keep their best sample."""
        low, middle, high = quartiles(samples)
        self.add(name, middle, unit, bar, (low, high))
        if unit in BEST:
            self.rows[-1]["best"] = BEST[unit](samples)

    def note(self, text: str) -> None:
        """A sentence under the table: what was left out and why."""
        self.notes.append(text)

    def finish(self, arguments: argparse.Namespace) -> int:
        """Print the table, write the JSON file where one was asked for; the exit code is always 0."""
        if arguments.json:
            document = {
                "benchmark": self.benchmark,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "quick": bool(arguments.quick),
                "clock": Worker.clock,
                "machine": machine(),
                "rows": self.rows,
                "notes": self.notes,
            }
            target = Path(arguments.json)
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(target.name + ".tmp")
            beside.write_text(json.dumps(document, indent=1) + "\n")
            beside.replace(target)
        console = Console(width=None if sys.stdout.isatty() else 150)
        table = Table(title=f"{self.benchmark}: {describe()}", title_justify="left")
        for heading in ("name", "value", "quartiles", "best", "unit", "bar", "holds"):
            right = heading in ("value", "quartiles", "best")
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for row in self.rows:
            spread = " .. ".join(number(v) for v in row["quartiles"]) if "quartiles" in row else ""
            verdict = {None: "", True: "[green]yes[/]", False: "[red]NO[/]"}[row["holds"]]
            best = number(row["best"]) if "best" in row else ""
            value = number(row["value"])
            table.add_row(row["name"], value, spread, best, row["unit"], row["bar"] or "", verdict)
        for text in self.notes:
            console.print(f"note: {text}", markup=False)
        console.print(table)
        return 0


def number(value: float | None) -> str:
    """Four significant digits, or a dash for a value that could not be had."""
    if value is None:
        return "-"
    return f"{value:.4g}" if abs(value) < 10000 else f"{value:.0f}"


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def parse(
    description: str | None, extra: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """The command line that all benchmarks have, plus what ``extra`` adds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file as well")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds and shapes: for a look, not for a record"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time instead of wall time, 1 thread only: for a look while others use the machine",
    )
    if extra is not None:
        extra(parser)
    arguments = parser.parse_args()
    Worker.clock = "cpu" if arguments.cpu_time else "wall"
    return arguments


def main(body: Callable[[], int]) -> None:
    """Run a benchmark; what cannot run is one sentence and exit code 1."""
    try:
        sys.exit(body())
    except (BenchmarkError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def machine() -> dict[str, Any]:
    """Processor, caches, memory, system and the versions of what was measured."""
    facts: dict[str, str] = {}
    with open("/proc/cpuinfo", encoding="utf-8") as stream:
        for line in stream:
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    flags = facts.get("flags", "").split()
    # Hypervisors shorten the name to "AMD EPYC"; family and model say which generation it is.
    name = facts.get("model name", platform.machine())
    cpu = f"{name} (family {facts.get('cpu family')}, model {facts.get('model')})"
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    versions = {}
    for package in ("isofold", "onnxruntime", "onnx", "torch", "transformers", "numpy", "apache-tvm"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "simd": [flag for flag in wanted if flag in flags],
        "l3_bytes": last_level_cache(),
        "memory_bytes": pages,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
    }


def last_level_cache() -> int:
    """Bytes of the largest cache that the system reports; 32 MiB where it reports none."""
    sizes = [
        int(text[:-1]) * 1024
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip()).endswith("K")
    ]
    return max(sizes, default=32 << 20)


def cold_bytes() -> int:
    """Bytes that competitors read in turn for all of them to come from memory: 12 times the last-level cache.

    At 2.5 times its size a victim cache keeps a quarter of what is read over and over: on Zen 5 a plain loop then
    "reads memory" at 46 GB/s with one thread and at 61 to 71 with two, where it is 40 and 48 from 512 MB on.
    """
    cache = last_level_cache()
    return max(min(12 * cache, 1 << 30), int(2.5 * cache))


def _commit() -> str | None:
    answer = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None


def describe() -> str:
    """One line about the machine for the table's title."""
    facts = machine()
    return f"{facts['cpu']}, {facts['cores']} cores, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def probe_library() -> Path:
    """probe.c compiled for this machine, from the cache when source and processor are the same."""
    source = HERE / "probe.c"
    key = hashlib.sha256(source.read_bytes() + machine()["cpu"].encode()).hexdigest()[:16]
    library = cache_folder() / "benchmarks" / f"probe-{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    beside = library.with_suffix(f".{os.getpid()}.tmp")
    command = ["gcc", "-O3", "-march=native", "-pthread", "-shared", "-fPIC", str(source), "-o", str(beside)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise BenchmarkError("gcc is needed to measure the read bandwidth: install gcc") from None
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(f"`{' '.join(command)}` failed:\n{error.stderr}") from None
    beside.replace(library)
    return library


class Worker:
    """A competitor's process. Between turns it is stopped; use it as a context manager."""

    clock = "wall"

    def __init__(self, name: str, spec: dict[str, Any], python: Path | str = sys.executable) -> None:
        self.name = name
        environment = dict(os.environ, OMP_NUM_THREADS=str(spec["threads"]), PYTHONUNBUFFERED="1")
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the process; close() ends both
        self.process = subprocess.Popen(
            [str(python), str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.stopped = False
        self.ask({"clock": self.clock, **spec})
        self.stop()

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send one line, wait for its answer. BenchmarkError carries the worker's own words."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.stopped:
            self.process.send_signal(signal.SIGCONT)
            self.stopped = False
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer below, or its absence, says what happened
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"the worker ended; {self._tail()}"}
        if "error" in answer:
            raise BenchmarkError(f"{self.name}: {answer['error']}")
        return answer

    def _tail(self) -> str:
        self.process.wait()
        self.log.seek(0)
        tail = "\n".join(self.log.read().splitlines()[-8:])
        return f"exit code {self.process.returncode}, last lines:\n{tail}"

    def stop(self) -> None:
        """Freeze all of its threads until the next question."""
        if not self.stopped:
            self.process.send_signal(signal.SIGSTOP)
            self.stopped = True

    def turn(self, runs: int) -> list[float]:
        """Seconds of ``runs`` runs after uncounted ones for WARM seconds (at least one), then stopped again."""
        seconds: list[float] = self.ask({"do": "time", "n": runs, "warm": WARM})["seconds"]
        self.stop()
        return seconds

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.send_signal(signal.SIGCONT)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def interleave(
    workers: Sequence[Worker], rounds: int, runs: int | dict[str, int] = 5
) -> dict[str, list[list[float]]]:
    """Every round gives every worker one turn, in an order that rotates; seconds[name][round] are its
    runs."""
    seconds: dict[str, list[list[float]]] = {worker.name: [] for worker in workers}
    for index in range(rounds):
        shift = index % len(workers)
        for worker in [*workers[shift:], *workers[:shift]]:
            count = runs if isinstance(runs, int) else runs[worker.name]
            seconds[worker.name].append(worker.turn(count))
    return seconds


def per_round(rounds: Sequence[Sequence[float]]) -> list[float]:
    """The median run of every round."""
    return [statistics.median(runs) for runs in rounds]


def ratios(numerator: Sequence[Sequence[float]], denominator: Sequence[Sequence[float]]) -> list[float]:
    """Ratio of medians, formed inside each round."""
    return [a / b for a, b in zip(per_round(numerator), per_round(denominator), strict=True)]


STREAMS = (1, 4)


def _reader(file: Path, streams: int) -> str:
    return f"read {file.stem}, {streams} stream{'s' if streams > 1 else ''}"


def read_workers(threads: int, file: Path) -> list[Worker]:
    """Readers of `file` to sample beside a measurement, in one and in four sequential streams a thread."""
    spec = {"engine": "read", "probe": str(probe_library()), "file": str(file), "threads": threads}
    return [Worker(_reader(file, streams), {**spec, "streams": streams}) for streams in STREAMS]


def bandwidth_by_round(seconds: dict[str, list[list[float]]], file: Path) -> list[float]:
    """Bytes per second in each round at which `file` was read: the better number of streams, each at its median."""
    rounds = zip(*(per_round(seconds[_reader(file, streams)]) for streams in STREAMS), strict=True)
    return [file.stat().st_size / min(times) for times in rounds]
