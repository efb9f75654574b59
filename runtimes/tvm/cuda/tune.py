"""Tuning of the GPU's kernels: `isofold tune MODEL --target cuda:sm_80`.

A program is planned as for compiling, and the kernels with knobs that its plans are made of are what is tuned. The
search, the machines and the database are those of the CPU's kernels (`runtimes/tuning/engine.py`); records have the
chip's name and the architecture. Candidates become cubins here, also where there is no GPU: what does not fit a chip is
left out before (`spaces.py`), what nvcc must spill after. What remains is measured in a process of its own
(`tune_worker`) on this machine's GPU, or on those of a tracker's servers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from platform import node
from typing import TYPE_CHECKING, Any

from ....compiler.errors import InputError
from ...tuning.database import Database
from ...tuning.engine import CONFIRMING_ROUNDS, ROUNDS, Engine, Known, Outcome, SkippedError
from ...tuning.machines import START, TURNS, Facts, Machine, Tracker, compared
from ...tuning.search import Batch, Candidate, Search, Space
from ...tuning.selection import database_path
from ...tuning.session import merge_into
from .candidates import Toolchain, Unit, unit_of
from .compile import arch_of, planned
from .device_module import target_for
from .gpu import has_gpu
from .knobs import choosing, group_of, sources_of, with_values
from .spaces import size_of, space_of

if TYPE_CHECKING:
    from ....compiler.program import Program

Progress = Callable[[str], None]

SIZES: dict[str, dict[str, int]] = {
    "DenseFew": {"m": 1},
    "DenseMany": {"m": 256},
    "FewQueries": {"b": 1, "s": 1, "t": 2048},
    "Gemm": {"m": 512},
    "ManyQueries": {"b": 1, "s": 512, "t": 512},
    "Rows": {"m": 64},
}
"""What unknown sizes are measured with."""
TOLERANCE, HALVES = 1e-5, 2e-3
"""Of the largest result: sums in another order; weights of attention, which are rounded to halves tile by tile."""
_WORKER = "isofold.runtimes.tvm.cuda.tune_worker"


@dataclass(frozen=True)
class Launch:
    """A kernel with values of its unknown sizes."""

    name: str
    sizes: tuple[tuple[str, int], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data: the key of records."""
        return {"kernel": self.name, "sizes": dict(self.sizes)}


def launch_of(kernel: Any) -> Launch:
    """What a kernel is measured on."""
    kind = type(kernel).__name__
    sizes = {"m": 8 * kernel.tiles} if kind == "Skinny" else SIZES[kind]
    tensors = unit_of(kernel).tensors().values()
    symbols = {size for tensor in tensors for size in tensor.shape if isinstance(size, str)}
    return Launch(kernel.name, tuple((name, sizes.get(name, 64)) for name in sorted(symbols)))


def tune_subject(
    subject: Program | Path | None,
    target: str,
    *,
    seconds: float,
    rpc: str | None,
    key: str,
    database: Path | None,
    merge: Sequence[Path],
    progress: Progress | None,
) -> dict[str, Any]:
    """See `registry.Backend.tune`. Raises InputError: no program, no GPU, or a database that cannot be used."""
    path = database or database_path()
    merged, notes = merge_into(path, merge)
    result: dict[str, Any] = {
        "database": str(path), "processors": [], "seconds": 0.0, "measured": 0, "lost": [], "notes": [],
        "workloads": [],
    }  # fmt: skip
    if seconds > 0:
        if subject is None or isinstance(subject, Path):
            raise InputError(
                "Kernels for CUDA are tuned for a model",
                where=f"target={target!r}",
                expected="the model and its recipe, as for compile",
                got="no model" if subject is None else f"the artefact {subject}",
            )
        say = progress or (lambda _: None)
        say("plan the kernels")
        kernels = kernels_of_program(subject, target)
        result = tune_kernels(
            kernels, arch_of(target).split(","), seconds, path, rpc=rpc, key=key, progress=say
        )
    return {**result, "merged": merged, "notes": [*notes, *result["notes"]], "library": None}


def kernels_of_program(program: Program, target: str) -> list[Any]:
    """The kernels with knobs that a program's plans are made of, each once."""
    from ..lower import lower

    found: dict[str, Any] = {}

    def collect(kernel: Any) -> dict[str, int]:
        found.setdefault(group_of(kernel), kernel)
        return {}

    with choosing(collect):
        planned(lower(program).module, target_for(arch_of(target).split(",")[0]))
    return list(found.values())


def tune_kernels(
    kernels: Iterable[Any],
    archs: Sequence[str],
    seconds: float,
    database: Path,
    *,
    rpc: str | None = None,
    key: str = "isofold",
    progress: Progress | None = None,
    hire: Callable[[], Machine] | None = None,
    toolchain: Callable[[Path, str], Toolchain] = Toolchain,
) -> dict[str, Any]:
    """Measure other values for kernels on a GPU of one of these architectures; returns what `tuning.tune.tune` does.

    hire, toolchain: who measures, and what makes libraries (for tests: an emulated GPU). Raises InputError where there
    is no GPU, here or at the address; it says what would have been measured.
    """
    spaces = [(kernel, space) for kernel in kernels if (space := space_of(kernel, archs)) is not None]
    if not spaces:
        raise InputError("There is no kernel to tune", got="a program without linears, attention and norms")
    if rpc is None and hire is None and not has_gpu():
        raise InputError(
            "There is no GPU to measure on",
            expected=counted(spaces),
            got="no NVIDIA driver with a GPU on this machine",
            hint="run this on a machine with a GPU and nvcc, or give the address of a tracker that lends one (--rpc)",
        )
    tracker = None if rpc is None else Tracker.at(rpc, key)
    scratch = Path(tempfile.mkdtemp(prefix="isofold-tuning-"))
    records = Database(database)
    try:
        found = GpuKernels(spaces, archs, tracker, lambda arch: toolchain(scratch, arch), hire)
        result = Engine(found, records, seconds, tracker, progress or (lambda _: None)).run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if found.found and all(search.skipped for search in found.found) and not result["measured"]:
        raise InputError(
            "The GPU cannot measure any of the kernels",
            got="; ".join(dict.fromkeys(records.notes)),
            hint="end what else runs on the GPU; the same command goes on from here",
        )
    spilled = f"{found.spilled} were left out because nvcc spills their registers"
    result["notes"].append(f"{counted(spaces)}; {spilled}")
    return result


def counted(spaces: Sequence[tuple[Any, Space]]) -> str:
    """How many kernels and candidates there are."""
    sizes = [size_of(space) for _, space in spaces]
    good, bad = (sum(column) for column in zip(*sizes, strict=True))
    return f"{len(spaces)} kernels with {good} candidates ({bad} more do not fit the chip)"


class GpuKernels:
    """The GPU's kernels as `engine.Kernels`."""

    def __init__(
        self,
        spaces: Sequence[tuple[Any, Space]],
        archs: Sequence[str],
        tracker: Tracker | None,
        toolchain: Callable[[str], Toolchain],
        hire: Callable[[], Machine] | None,
    ) -> None:
        self.kernels = {group_of(kernel): (kernel, space) for kernel, space in spaces}
        self.archs, self.tracker, self._hire = archs, tracker, hire
        self.rounds = ROUNDS, CONFIRMING_ROUNDS
        self.spilled = 0
        self.found: list[Search] = []
        self._make, self._toolchains = toolchain, dict[str, Toolchain]()

    def hire(self) -> Machine:
        """This machine's GPU, or the next free server."""
        return Machine(self.tracker, _WORKER) if self._hire is None else self._hire()

    def facts(self, machine: Machine) -> Facts:
        """What the GPU is."""
        answer = machine.ask({"do": "gpu"}, START)
        if not answer:
            assert self.tracker is not None
            raise InputError(
                "A server has no GPU that TVM can use",
                where=f"{self.tracker.host}:{self.tracker.port}, key {self.tracker.key}",
                hint="register servers with a GPU under a key of their own; they need TVM's CUDA runtime and a driver",
            )
        host = answer["host"] or (
            node() if self.tracker is None else f"{self.tracker.host}:{self.tracker.key}"
        )
        return Facts(answer["processor"], host, answer["isa"], int(answer["cores"]), int(answer["cache"]))

    def searches(self, facts: Facts, known: Known) -> list[Search]:
        """One for each kernel."""
        arch = next((arch for arch in self.archs if runs_on(arch, facts.isa)), None)
        if arch is None:
            raise InputError(
                f"The GPU cannot run code for {', '.join(self.archs)}",
                where=facts.host,
                got=f"{facts.processor}, which is {facts.isa}",
                hint=f"tune for its architecture: --target cuda:{facts.isa}",
            )
        for group, (kernel, space) in self.kernels.items():
            sources, launch = sources_of(kernel), launch_of(kernel)
            records = known(arch, group, sources)
            self.found.append(
                Search(arch, group, [launch], records, space=space, sources=sources, title=kernel.name)
            )
        return self.found

    def compare(
        self, machine: Machine, facts: Facts, search: Search, batch: Batch, rounds: int
    ) -> Iterator[list[Outcome]]:
        """Compile a batch and compare it on the GPU."""
        del facts
        kernel = self.kernels[search.group][0]
        units = [unit_of(kernel), *(unit_of(with_values(kernel, values)) for values in batch.candidates)]
        arch = search.isa
        if arch not in self._toolchains:
            self._toolchains[arch] = self._make(arch)
        default, *others = self._toolchains[arch].libraries(units)
        if isinstance(default.path, str):
            raise SkippedError(f"it does not compile: {default.path}")
        launch = launch_of(kernel)
        kept: list[tuple[Candidate, Unit, Any]] = []
        failed: list[Outcome] = []
        for values, unit, made in zip(batch.candidates, units[1:], others, strict=True):
            why = made.path if isinstance(made.path, str) else made.worse_than(default)
            if why is not None:
                self.spilled += not isinstance(made.path, str)
                failed.append(Outcome(values, launch, why, "failed"))
            else:
                kept.append((values, unit, made))
        yield failed
        sizes = dict(launch.sizes)
        specs = [units[0].spec(default, sizes), *(unit.spec(made, sizes) for _, unit, made in kept)]
        tolerance = HALVES if type(kernel).__name__ == "ManyQueries" else TOLERANCE
        if kept and batch.workloads:
            question = {"do": "compare", "specs": specs, "rounds": rounds, "tolerance": tolerance}
            answer = machine.ask(question, TURNS)
            if "skip" in answer:
                raise SkippedError(answer["skip"])
            results = compared(answer)
            yield [Outcome(values, launch, r) for (values, _, _), r in zip(kept, results, strict=True)]
        for spec in specs:
            if os.path.exists(spec["library"]):
                os.unlink(spec["library"])


def runs_on(arch: str, chip: str) -> bool:
    """Whether a chip runs machine code of an architecture: the same major version, and no later minor one."""
    (major, minor), (major_, minor_) = ((a[3:].rstrip("a")[:-1], a[3:].rstrip("a")[-1]) for a in (arch, chip))
    return major == major_ and int(minor) <= int(minor_) and (arch == chip or not arch.endswith("a"))
