"""Tuning of the GPU's kernels: `isofold tune MODEL --target cuda:sm_80`.

A program is planned as for compiling, and the kernels with knobs that its plans are made of are what is tuned. The
search, the machines and the database are those of the CPU's kernels (`runtimes/tuning/engine.py`); records have the
chip's name and the architecture. Candidates become cubins here, also where there is no GPU: what does not fit a chip is
left out before (`spaces.py`), what nvcc must spill after. What remains is measured in a process of its own
(`tune_worker`) on this machine's GPU, or on those of a tracker's servers.

What TVM generates beside them is tuned too, where its sizes are known: MetaSchedule's traces against dlight's schedule
(`generic.py`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from platform import node
from typing import TYPE_CHECKING, Any

from ....compiler.errors import InputError
from ...tuning.database import Database
from ...tuning.engine import CONFIRMING_ROUNDS, ROUNDS, Engine, Known, Outcome, SkippedError
from ...tuning.machines import START, TURNS, Facts, Machine, Tracker, compared
from ...tuning.search import TRACE, Batch, Candidate, Inventor, Measurable, Search, Space
from ...tuning.selection import database_path
from ...tuning.session import merge_into
from ..schedule_traces import Traced, TraceError
from ..traces import MOST, MetaSchedule, Workshop
from .candidates import Toolchain, unit_of
from .compile import arch_of, planned
from .device_module import target_for
from .generic import Generic, GenericUnit, by_trace, default_of, fused, generic_functions
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
    traces: int = MOST,
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
        kernels, generics = kernels_of_program(subject, target)
        result = tune_kernels(
            kernels,
            arch_of(target).split(","),
            seconds,
            path,
            rpc=rpc,
            key=key,
            progress=say,
            generics=generics if traces else (),
            traces=traces,
        )
    return {**result, "merged": merged, "notes": [*notes, *result["notes"]], "library": None}


def kernels_of_program(program: Program, target: str) -> tuple[list[Any], list[Generic]]:
    """The kernels with knobs that a program's plans are made of, each once, and what TVM generates for it."""
    from ..lower import lower

    found: dict[str, Any] = {}

    def collect(kernel: Any) -> dict[str, int]:
        found.setdefault(group_of(kernel), kernel)
        return {}

    chip = target_for(arch_of(target).split(",")[0])
    with choosing(collect):
        module = planned(lower(program).module, chip)
    return list(found.values()), generic_functions(fused(module, chip))


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
    generics: Sequence[Generic] = (),
    traces: int = MOST,
) -> dict[str, Any]:
    """Measure other values for kernels, and so many traces for what TVM generates at most, on a GPU of one of these
    architectures; returns what `tuning.tune.tune` does.

    hire, toolchain: what gives machines to measure on, and what makes libraries (for tests: an emulated GPU). Raises
    InputError where there is no GPU, here or at the address; it says what would have been measured.
    """
    spaces = [(kernel, space) for kernel in kernels if (space := space_of(kernel, archs)) is not None]
    if not spaces and not generics:
        raise InputError("There is no kernel to tune", got="a program without linears, attention and norms")
    if rpc is None and hire is None and not has_gpu():
        raise InputError(
            "There is no GPU to measure on",
            expected=counted(spaces, generics, traces),
            got="no NVIDIA driver with a GPU on this machine",
            hint="run this on a machine with a GPU and nvcc, or give the address of a tracker that lends one (--rpc)",
        )
    tracker = None if rpc is None else Tracker.at(rpc, key)
    scratch = Path(tempfile.mkdtemp(prefix="isofold-tuning-"))
    records, workshop = Database(database), Workshop()
    try:
        found = GpuKernels(spaces, archs, tracker, lambda arch: toolchain(scratch, arch), hire)
        found.generics = {generic.group: generic for generic in generics}
        found.inventor_of = lambda generic, arch: MetaSchedule(
            workshop, generic.function, target_for(arch), {}, 1, 0, traces
        )
        result = Engine(found, records, seconds, tracker, progress or (lambda _: None)).run()
    finally:
        workshop.close()
        shutil.rmtree(scratch, ignore_errors=True)
    if found.found and all(search.skipped for search in found.found) and not result["measured"]:
        raise InputError(
            "The GPU cannot measure any of the kernels",
            got="; ".join(dict.fromkeys(records.notes)),
            hint="end what else runs on the GPU; the same command goes on from here",
        )
    spilled = f"{found.spilled} were left out because nvcc spills their registers"
    result["notes"].append(f"{counted(spaces, generics, traces)}; {spilled}")
    return result


def counted(spaces: Sequence[tuple[Any, Space]], generics: Sequence[Generic] = (), traces: int = MOST) -> str:
    """How many kernels and candidates there are."""
    sizes = [size_of(space) for _, space in spaces]
    good, bad = sum(size[0] for size in sizes), sum(size[1] for size in sizes)
    text = f"{len(spaces)} kernels with {good} candidates ({bad} more do not fit the chip)"
    more = f", {len(generics)} that TVM generates with up to {traces} traces of MetaSchedule each"
    return text + more if generics else text


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
        self.generics: dict[str, Generic] = {}
        self.inventor_of: Callable[[Generic, str], Inventor | None] = lambda generic, arch: None
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
        for group, generic in self.generics.items():
            self.found.append(
                Search(
                    arch,
                    group,
                    [generic.launch],
                    known(arch, group, generic.sources),
                    space=Space({}, {}, exact=False),
                    sources=generic.sources,
                    title=generic.name,
                    inventor=self.inventor_of(generic, arch),
                )
            )
        return self.found

    def compare(
        self, machine: Machine, facts: Facts, search: Search, batch: Batch, rounds: int
    ) -> Iterator[list[Outcome]]:
        """Compile a batch and compare it on the GPU."""
        del facts
        arch = search.isa
        if search.group in self.generics:
            candidates, units = yield from self._generic_units(search, batch)
            launch: Measurable = self.generics[search.group].launch
            sizes, tolerance = dict[str, int](), TOLERANCE
        else:
            kernel = self.kernels[search.group][0]
            candidates = list(batch.candidates)
            units = [unit_of(kernel), *(unit_of(with_values(kernel, values)) for values in candidates)]
            launch, sizes = launch_of(kernel), dict(launch_of(kernel).sizes)
            tolerance = HALVES if type(kernel).__name__ == "ManyQueries" else TOLERANCE
        if arch not in self._toolchains:
            self._toolchains[arch] = self._make(arch)
        default, *others = self._toolchains[arch].libraries(units)
        if isinstance(default.path, str):
            raise SkippedError(f"it does not compile: {default.path}")
        kept: list[tuple[Candidate, Any, Any]] = []
        failed: list[Outcome] = []
        for values, unit, made in zip(candidates, units[1:], others, strict=True):
            why = made.path if isinstance(made.path, str) else made.worse_than(default)
            if why is not None:
                self.spilled += not isinstance(made.path, str)
                failed.append(Outcome(values, launch, why, "failed"))
            else:
                kept.append((values, unit, made))
        yield failed
        specs = [units[0].spec(default, sizes), *(unit.spec(made, sizes) for _, unit, made in kept)]
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

    def _generic_units(
        self, search: Search, batch: Batch
    ) -> Generator[list[Outcome], None, tuple[list[Candidate], list[Any]]]:
        """The candidates whose traces can be applied, and their units, dlight's first."""
        generic = self.generics[search.group]
        units: list[Any] = [GenericUnit(default_of(generic.function, target_for(search.isa)))]
        candidates = []
        for candidate in batch.candidates:
            try:
                traced = Traced(search.traces[candidate[TRACE]])
                units.append(GenericUnit(by_trace(generic.function, traced)))
                candidates.append(candidate)
            except TraceError as error:
                yield [Outcome(candidate, generic.launch, str(error), "failed")]
        return candidates, units


def runs_on(arch: str, chip: str) -> bool:
    """Whether a chip runs machine code of an architecture: the same major version, and no later minor one."""
    (major, minor), (major_, minor_) = ((a[3:].rstrip("a")[:-1], a[3:].rstrip("a")[-1]) for a in (arch, chip))
    return major == major_ and int(minor) <= int(minor_) and (arch == chip or not arch.endswith("a"))
