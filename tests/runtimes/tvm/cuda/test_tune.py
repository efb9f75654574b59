"""Tuning of the GPU's kernels without a GPU: the emulator runs candidates, a timer of the test's own times them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm import tirx

from isofold.compiler.errors import InputError
from isofold.runtimes.tuning.child import LostError
from isofold.runtimes.tuning.database import Database, Record, read_records
from isofold.runtimes.tvm.cuda import builder, tune
from isofold.runtimes.tvm.cuda.attention import Attention, FewQueries
from isofold.runtimes.tvm.cuda.candidates import Library, Toolchain, Unit, unit_of
from isofold.runtimes.tvm.cuda.dense import DenseFew, DenseMany
from isofold.runtimes.tvm.cuda.device_module import target_for
from isofold.runtimes.tvm.cuda.emulate import emulated
from isofold.runtimes.tvm.cuda.epilogue import Linear
from isofold.runtimes.tvm.cuda.flash import ManyQueries
from isofold.runtimes.tvm.cuda.gemm import GROUPED, LARGE, SMALL, Gemm
from isofold.runtimes.tvm.cuda.knobs import (
    KNOBS,
    choosing,
    group_of,
    knobs_of,
    sources_of,
    tuned,
    values_of,
    with_values,
)
from isofold.runtimes.tvm.cuda.layouts import coded_layout, integer_layout
from isofold.runtimes.tvm.cuda.rows import Rows
from isofold.runtimes.tvm.cuda.skinny import Skinny
from isofold.runtimes.tvm.cuda.spaces import SHARED, demands, fits, space_of
from isofold.runtimes.tvm.cuda.toolkit import Resources
from isofold.runtimes.tvm.cuda.tune_worker import arrays_of, compare, difference
from isofold.runtimes.tvm.cuda.tuned import TunedValues
from isofold.runtimes.tvm.cuda.weights import Weights

from ...lent_machines import server, tracker
from .emulated import CACHE, emulate_operator, reference_of
from .test_compile import module_of
from .test_operators import CASES, ROWS, check, repeated, tolerance

__all__ = ["tracker"]

ARCHS = ("sm_80",)
INT4 = Weights(integer_layout(4), 64)
INT8 = Weights(integer_layout(8), 0, "float32")
HALVES = Weights(integer_layout(4), 32, zero_steps=16)


def linear(n: int = 72, k: int = 260, rows: Any = "m", **more: Any) -> Linear:
    """A small linear with ragged sizes."""
    return Linear(
        rows, k, n, **{"activation": "none", "gated": False, "bias": True, "residual": False, **more}
    )


def attention(**more: Any) -> Attention:
    """Four heads that share two of keys, causal."""
    sizes: dict[str, Any] = {"batch": 1, "queries": "s", "keys": "t", "heads": 4, "kv_heads": 2, "depth": 32}
    heads = {"width": 40, "q_heads": 4, "k_heads": 2, "v_heads": 2, "q_start": 0, "k_start": 0, "v_start": 0}
    return Attention(**{**sizes, **heads, "scale": 0.2, "causal": False, "softcap": 0.0, **more})


KERNELS: dict[str, Any] = {
    "skinny": Skinny(linear(gated=True, n=48, k=512), INT4, "codes", 1),
    "skinny floats": Skinny(linear(k=512), Weights(coded_layout("nf4"), 64), "float", 2),
    "gemm": Gemm(linear(gated=True, n=48), INT8, "codes", SMALL),
    "gemm groups": Gemm(linear(k=320), INT4, "codes", SMALL),
    "gemm floats": Gemm(linear(k=320), HALVES, "float", SMALL),
    "dense few": DenseFew(linear()),
    "dense many": DenseMany(linear(gated=True, n=40)),
    "few queries": FewQueries(attention(), 4),
    "many queries": ManyQueries(attention(causal=True)),
    "rows": Rows("m", 300, norm="rms", weight=True, y=True, codes="dynamic", align=32),
}
SIZES = {"m": 21, "s": 70, "t": 70}


def extremes(kernel: Any) -> list[dict[str, int]]:
    """For each knob its first and last value that fits, the others at their defaults."""
    default, found = values_of(kernel), []
    for knob in knobs_of(kernel):
        values = [v for v in knob.values if fits(with_values(kernel, {knob.field: v}), ARCHS)]
        found += [{**default, knob.field: values[end]} for end in (0, -1) if values]
    return [candidate for candidate in found if candidate != default]


class EmulatedGpu:
    """The emulator as a device of `tune_worker`. seconds: of one run, by the values of the kernel's knobs."""

    def __init__(self, toolchain: EmulatedToolchain, seconds: Callable[[dict[str, int]], float]) -> None:
        self.toolchain, self.seconds = toolchain, seconds
        self.free = 1 << 24

    def facts(self) -> dict[str, Any]:
        return {
            "processor": "Emulated 80", "host": "here", "isa": "sm_86", "cores": 1, "cache": 1 << 15,
            "free": self.free,
        }  # fmt: skip

    def load(self, path: Path) -> Any:
        return self.toolchain.modules[str(path)]

    def place(self, array: np.ndarray[Any, Any]) -> Any:
        if array.nbytes > self.free:
            raise RuntimeError("InternalError: CUDA: out of memory")
        return tvm.runtime.tensor(array)

    def fetch(self, tensor: Any) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = tensor.numpy()
        return found

    def timer(self, module: Any, runs: Sequence[Any]) -> Callable[[], float]:
        assert self.free < 1 << 20 or len(runs) > 1, "copies of the inputs"
        values = next(v for name, v in self.toolchain.values.items() if self.load(Path(name)) is module)
        return lambda: self.seconds(values)


class EmulatedToolchain(Toolchain):
    """Libraries are modules of the emulator. resources: of a kernel with these values."""

    def __init__(
        self, scratch: Path, arch: str, spills: Callable[[dict[str, int]], int] = lambda _: 0
    ) -> None:
        super().__init__(scratch, arch)
        self.modules: dict[str, Any] = {}
        self.values: dict[str, dict[str, int]] = {}
        self.spills = spills

    def libraries(self, units: Sequence[Unit]) -> list[Library]:
        functions: dict[str, tirx.PrimFunc] = {}
        for number, unit in enumerate(units):
            for name, function in unit.functions().items():
                full = f"unit{number}_{name}"
                functions[full] = function.with_attr("global_symbol", full)
        module = emulated(functions, CACHE)
        made = []
        for number, unit in enumerate(units):
            self._count += 1
            path = self.scratch / f"{self._count}"
            self.modules[str(path)] = {n: module[f"unit{number}_{n}"] for n in unit.functions()}
            self.values[str(path)] = values_of(unit.kernels[0])
            spilled = self.spills(self.values[str(path)])
            made.append(Library(path, (Resources("k", self.arch, 32, 0, spilled, 0, 0),)))
        return made


class EmulatedMachine:
    """A machine with that GPU, in this process."""

    def __init__(self, gpu: EmulatedGpu) -> None:
        self.gpu, self.asked = gpu, 0

    def ask(self, question: dict[str, Any], timeout: float) -> dict[str, Any]:
        self.asked += question["do"] == "compare"
        if question["do"] == "gpu":
            return self.gpu.facts()
        return compare(self.gpu, question["specs"], question["rounds"], question["tolerance"])

    def close(self) -> None:
        pass


def fast_with(**best: int) -> Callable[[dict[str, int]], float]:
    """A time that falls with every knob that has this value."""
    return lambda values: 1e-5 * 0.9 ** sum(values[name] == value for name, value in best.items())


class Bench:
    """An emulated GPU to tune on."""

    def __init__(self, seconds: Callable[[dict[str, int]], float], spills: Any = lambda _: 0) -> None:
        self.seconds, self.spills, self.machines = seconds, spills, list[EmulatedMachine]()
        self.free, self.fail = 1 << 24, lambda machine: None

    def make(self, scratch: Path, arch: str) -> EmulatedToolchain:
        self.toolchain = EmulatedToolchain(scratch, arch, self.spills)
        return self.toolchain

    def hire(self) -> Any:
        class Machine(EmulatedMachine):
            def ask(mine, question: dict[str, Any], timeout: float) -> dict[str, Any]:  # noqa: N805
                if question["do"] == "compare":
                    mine.gpu.toolchain = self.toolchain
                    self.fail(mine)
                return super().ask(question, timeout)

        gpu = EmulatedGpu(EmulatedToolchain(Path(), "sm_80"), self.seconds)
        gpu.free = self.free
        self.machines.append(Machine(gpu))
        return self.machines[-1]

    def tune(self, database: Path, kernels: Sequence[Any], **more: Any) -> dict[str, Any]:
        options: dict[str, Any] = {"hire": self.hire, "toolchain": self.make, **more}
        return tune.tune_kernels(kernels, ARCHS, 600, database, **options)


@pytest.fixture
def small_space(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small product with five candidates, few rounds."""
    monkeypatch.setitem(tune.SIZES, "DenseMany", {"m": 19})
    monkeypatch.setattr(tune, "ROUNDS", 2)
    monkeypatch.setattr(tune, "CONFIRMING_ROUNDS", 3)
    knobs = tuple(k for k in KNOBS["DenseMany"] if k.field == "warps" or k.field == "tokens")
    monkeypatch.setitem(KNOBS, "DenseMany", knobs)
    return DenseMany(linear(n=40, k=64))


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_candidates_compute_what_the_default_does(name: str) -> None:
    every = extremes(KERNELS[name])
    check_candidates(name, every[:1] + every[-1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_all_extreme_candidates_compute_what_the_default_does(name: str) -> None:
    check_candidates(name, extremes(KERNELS[name]))


def check_candidates(name: str, chosen: list[dict[str, int]]) -> None:
    """Their results are the default's within rounding."""
    kernel = KERNELS[name]
    units = [unit_of(kernel), *(unit_of(with_values(kernel, values)) for values in chosen)]
    toolchain = EmulatedToolchain(Path(name), "sm_80")
    specs = [unit.spec(made, SIZES) for unit, made in zip(units, toolchain.libraries(units), strict=True)]
    gpu = EmulatedGpu(toolchain, lambda _: 1.0)
    tolerance = tune.HALVES if isinstance(kernel, ManyQueries) else tune.TOLERANCE
    answer = compare(gpu, specs, 1, tolerance)
    assert answer["wrong"] == [None] * (len(chosen) + 2), chosen
    outputs = arrays_of(specs[0])[1]
    assert all(outputs[name].size > 20 for name in specs[0]["results"])


@pytest.mark.parametrize("name", sorted(set(KERNELS) - {"rows"}))
def test_shared_memory_is_predicted_exactly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    whole = builder.T.alloc_buffer

    def alloc(shape: tuple[int, ...], dtype: str, scope: str, **more: Any) -> Any:
        found.append(int(np.prod(shape)) * np.dtype(dtype).itemsize if scope.startswith("shared") else 0)
        return whole(shape, dtype, scope=scope, **more)

    monkeypatch.setattr(builder.T, "alloc_buffer", alloc)
    for values in [values_of(KERNELS[name]), *extremes(KERNELS[name])]:
        kernel = with_values(KERNELS[name], values)
        found.clear()
        Unit((kernel,)).functions()
        assert demands(kernel)[1] == sum(found) > 0, values


def test_defaults_fit_every_architecture_and_are_in_their_spaces() -> None:
    wide = linear(4096, 4096)
    kernels = [
        *KERNELS.values(),
        *(Gemm(wide, INT8, "codes", tile) for tile in (LARGE, SMALL)),
        *(Gemm(wide, INT4, "codes", tile) for tile in (GROUPED, SMALL)),
        *(Gemm(wide, HALVES, "float", tile) for tile in (GROUPED, SMALL)),
        *(Skinny(wide, INT4, "codes", tiles) for tiles in (1, 2, 4)),
    ]
    for kernel in kernels:
        space = space_of(kernel, tuple(SHARED))
        assert space is not None
        assert all(space.default[field] in values for field, values in space.values.items()), kernel.name
        assert fits(kernel, tuple(SHARED)), kernel.name


def test_knobs_are_no_part_of_what_the_database_knows_a_kernel_by() -> None:
    for kernel in KERNELS.values():
        other = with_values(kernel, extremes(kernel)[-1])
        assert other != kernel
        assert group_of(other) == group_of(kernel)
    assert len({group_of(kernel) for kernel in KERNELS.values()}) == len(KERNELS)
    assert tuned(KERNELS["gemm"]) is KERNELS["gemm"], "without a scope nothing changes"


def test_the_whole_loop_measures_chooses_resumes_and_is_used(tmp_path: Path, small_space: Any) -> None:
    database, bench = tmp_path / "tuning.jsonl", Bench(fast_with(tokens=32, warps=4))
    said: list[str] = []
    result = bench.tune(database, [small_space], progress=said.append)
    (row,) = result["workloads"]
    assert row["knobs"] == {"tokens": 32, "warps": 4}
    assert row["after"] == pytest.approx(0.81 * row["before"], rel=1e-3)
    assert (row["isa"], row["processor"], row["workload"]) == ("sm_80", "Emulated 80", small_space.name)
    assert row["group"] == group_of(small_space)
    assert "tried" in said[0]
    assert "1 kernels with 11 candidates (0 more do not fit the chip)" in result["notes"][-1]
    records = read_records(database)[0]
    assert {r.status for r in records} == {"ok"}
    assert records[0].workload == {"kernel": small_space.name, "sizes": {"m": 19}}

    again = bench.tune(database, [small_space])
    assert again["measured"] == 0
    assert bench.machines[-1].asked == 0
    assert again["workloads"][0]["knobs"] == row["knobs"]

    choose = TunedValues(ARCHS, database)
    assert choose(small_space) == {"tokens": 32, "warps": 4}
    with choosing(choose):
        assert tuned(small_space) == with_values(small_space, row["knobs"])
    assert choose.used == {row["group"]}
    assert TunedValues(("sm_90a",), database)(small_space) == {}, "another architecture"
    assert TunedValues(("sm_80", "sm_90a"), database)(small_space) == {"tokens": 32, "warps": 4}


@pytest.mark.parametrize(
    ("name", "which", "rows"),
    [
        ("linear_packed", "w4g64", 40),
        ("linear_coded", "nf4", 9),
        ("norm_quantize", "", 1),
        ("attention", "causal", 1),
    ],
)
def test_a_tuned_operator_computes_what_the_reference_does(name: str, which: str, rows: int) -> None:
    what, arguments = next(c for c in CASES[name] if which in c[0])
    arguments = repeated(arguments, rows) if rows > 1 else arguments
    changed = []

    def choose(kernel: Any) -> dict[str, int]:
        changed.append(values_of(kernel))
        return extremes(kernel)[-1]

    axes = {"q": (0, 1), "k": (0, 1), "v": (0, 1)} if name == "attention" else dict.fromkeys(ROWS, (0,))
    with choosing(choose):
        (results,) = emulate_operator(name, [arguments], axes)
    assert changed
    check(name, what, results, reference_of(name, arguments), tolerance(name, arguments))


def test_differences_of_codes_and_floats() -> None:
    codes = np.array([3, 250], np.uint8)
    assert difference(codes, codes + 1) == 0
    assert difference(codes, codes + 3) == pytest.approx(2 / 250)
    assert difference(np.array([1.0, 4.0]), np.array([1.0, 5.0])) == 0.25
    assert difference(np.array([1.0]), np.array([np.nan])) == np.inf


def test_records_that_do_not_count(tmp_path: Path, small_space: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    database = tmp_path / "tuning.jsonl"
    Bench(fast_with(tokens=32)).tune(database, [small_space])
    assert TunedValues(ARCHS, database)(small_space)
    other = DenseMany(linear(n=48, k=64))
    assert TunedValues(ARCHS, database)(other) == {}, "another kernel"
    with monkeypatch.context() as patch:
        patch.setattr("isofold.runtimes.tvm.cuda.tuned.sources_of", lambda _: "0" * 16)
        assert TunedValues(ARCHS, database)(small_space) == {}, "another version"
    with monkeypatch.context() as patch:
        patch.setitem(KNOBS, "DenseMany", KNOBS["DenseMany"][:1])
        assert TunedValues(ARCHS, database)(small_space) == {}, "other knobs"
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text("nonsense\n")
    assert TunedValues(ARCHS, damaged)(small_space) == {}
    with pytest.raises(InputError, match="database is damaged"):
        Bench(fast_with()).tune(damaged, [small_space])


def test_a_database_of_another_machine_and_version_is_said_and_kept(tmp_path: Path, small_space: Any) -> None:
    database = tmp_path / "tuning.jsonl"
    Bench(fast_with(tokens=32)).tune(database, [small_space])
    kept = read_records(database)[0]
    strange = [replace(r, processor="NVIDIA A100") for r in kept] + [
        replace(r, sources="0" * 16) for r in kept
    ]
    other = tmp_path / "other.jsonl"
    Database(other).add(strange)
    result = Bench(fast_with(tokens=16)).tune(other, [small_space])
    notes = "\n".join(result["notes"])
    assert f"{len(kept)} results of other processors (NVIDIA A100) are kept and do not count here" in notes
    assert (
        f"{len(kept)} results of another version of the kernels or of TVM are kept and do not count" in notes
    )
    assert result["workloads"][0]["knobs"]["tokens"] == 16
    assert read_records(other)[0][: len(strange)] == strange


def test_candidates_that_spill_or_do_not_fit_are_left_out_and_counted(
    tmp_path: Path, small_space: Any
) -> None:
    bench = Bench(fast_with(), spills=lambda values: 400 * (values["tokens"] == 128))
    result = bench.tune(tmp_path / "tuning.jsonl", [small_space])
    records = read_records(tmp_path / "tuning.jsonl")[0]
    failed = [r for r in records if r.status == "failed"]
    assert {r.knobs["tokens"] for r in failed} == {128}
    assert failed[0].note == "nvcc spills 400 bytes of registers"
    assert f"{len(failed)} were left out because nvcc spills" in result["notes"][-1]


def test_a_gpu_without_memory_is_explained_and_nothing_is_lost(tmp_path: Path, small_space: Any) -> None:
    database, bench = tmp_path / "tuning.jsonl", Bench(fast_with(tokens=32))
    bench.free = 100
    with pytest.raises(InputError, match="cannot measure any of the kernels") as error:
        bench.tune(database, [small_space])
    assert "too little memory on the GPU" in str(error.value)
    assert "MiB are free" in str(error.value)
    assert not database.exists()
    bench.free = 1 << 24
    assert bench.tune(database, [small_space])["workloads"][0]["knobs"]["tokens"] == 32

    # One kernel that is too large does not keep the others from being measured.
    bench.free = 1 << 15
    large = DenseMany(linear(n=512, k=64))
    result = bench.tune(tmp_path / "other.jsonl", [large, small_space])
    assert [(row["knobs"] or {}).get("tokens") for row in result["workloads"]] == [None, 32]
    assert any(large.name in note and "left out of this run" in note for note in result["notes"])


def test_a_lost_gpu_gives_its_work_back(tmp_path: Path, small_space: Any) -> None:
    database, bench = tmp_path / "tuning.jsonl", Bench(fast_with(tokens=32))
    failures = iter([True])

    def fail(machine: EmulatedMachine) -> None:
        if machine.asked == 1 and next(failures, False):
            raise LostError("RuntimeError: CUDA: an illegal memory access was encountered")

    bench.fail = fail
    result = bench.tune(database, [small_space])
    assert len(result["lost"]) == 1
    assert len(bench.machines) == 2
    records = read_records(database)[0]
    assert {r.status for r in records} == {"ok"}
    assert len({r.candidate for r in records if not r.confirmed}) == 11
    assert result["workloads"][0]["knobs"]["tokens"] == 32


def test_an_interrupted_run_goes_on(tmp_path: Path, small_space: Any) -> None:
    database, bench = tmp_path / "tuning.jsonl", Bench(fast_with(tokens=32))

    def interrupt(machine: EmulatedMachine) -> None:
        if machine.asked == 2:
            raise KeyboardInterrupt

    bench.fail = interrupt
    with pytest.raises(KeyboardInterrupt):
        bench.tune(database, [small_space])
    before = read_records(database)[0]
    assert before
    bench.fail = lambda machine: None
    bench.tune(database, [small_space])
    after = read_records(database)[0]
    assert after[: len(before)] == before
    assert len({r.key for r in after}) == len(after)


class Net(torch.nn.Module):
    """A linear and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(64, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.up(x))


def test_without_a_gpu_what_would_be_measured_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import isofold

    monkeypatch.setattr(tune, "has_gpu", lambda: False)
    shapes = ({0: torch.export.Dim("rows", min=1, max=64)},)
    with pytest.raises(InputError, match="no GPU to measure on") as error:
        isofold.tune(
            Net(), (torch.randn(3, 64),), recipe="w4a8", target="cuda:sm_80", dynamic_shapes=shapes,
            database=tmp_path / "t.jsonl",
        )  # fmt: skip
    # The quantizer, three kernels for few rows, one for many.
    assert "5 kernels with " in str(error.value)
    assert "--rpc" in str(error.value)
    with pytest.raises(InputError, match="tuned for a model"):
        isofold.tune(target="cuda:sm_80")
    other = tmp_path / "other.jsonl"
    Database(other).add([])
    with pytest.raises(InputError, match="cannot be read"):
        isofold.tune(target="cuda", time=0, merge=[other])


def test_a_gpu_of_another_architecture_is_refused(tmp_path: Path, small_space: Any) -> None:
    bench = Bench(fast_with())
    with pytest.raises(InputError, match="cannot run code for sm_90a") as error:
        tune.tune_kernels(
            [small_space], ("sm_90a",), 60, tmp_path / "t.jsonl", hire=bench.hire, toolchain=bench.make
        )
    assert "--target cuda:sm_86" in str(error.value)
    assert tune.runs_on("sm_80", "sm_89")
    assert not tune.runs_on("sm_89", "sm_86")
    assert not tune.runs_on("sm_90a", "sm_100")


def test_a_server_without_a_gpu_is_explained(tracker: int, tmp_path: Path, small_space: Any) -> None:
    with server(tracker), pytest.raises(InputError, match="has no GPU that TVM can use") as error:
        tune.tune_kernels(
            [small_space], ARCHS, 600, tmp_path / "t.jsonl", rpc=f"127.0.0.1:{tracker}", key="epyc"
        )
    assert f"127.0.0.1:{tracker}" in str(error.value)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_libraries_of_candidates(tmp_path: Path) -> None:
    kernel = KERNELS["dense many"]
    units = [unit_of(kernel), unit_of(with_values(kernel, {"tokens": 32, "warps": 4}))]
    default, other = Toolchain(tmp_path, "sm_80").libraries(units)
    assert isinstance(default.path, Path)
    assert default.path.exists()
    assert default.resources[0].shared - other.resources[0].shared == 4 * 32 * 32
    assert other.worse_than(default) is None
    spilling = Library(tmp_path, (Resources("k", "sm_80", 255, 0, 128, 128, 0),))
    assert "128 bytes" in str(spilling.worse_than(default))
    assert spilling.worse_than(spilling) is None, "no more than the default"


def test_compiling_takes_the_tuned_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isofold.runtimes.tvm.cuda import compile as cuda

    monkeypatch.setenv("ISOFOLD_CACHE", str(tmp_path))
    kernels: list[Any] = []
    with choosing(lambda kernel: kernels.append(kernel) or {}):
        cuda.planned(module_of(True), target_for("sm_80"))
    kernel = next(k for k in kernels if isinstance(k, Gemm))
    values = {**values_of(kernel), "tile.columns": 8}
    record = Record(
        "Some GPU", "sm_80", group_of(kernel), sources_of(kernel), {}, values, "ok", "here", "2026-11-28",
        seconds=0.5, baseline=1.0, ratio=0.5, noise=0.01, rounds=9, confirmed=True,
    )  # fmt: skip
    Database(tmp_path / "tuning.jsonl").add([record])
    built: list[Any] = []
    monkeypatch.setattr(cuda, "build", lambda module, *_: built.append(module))
    assert cuda.compile_module(module_of(True), "sm_80").facts()["tuned"] == 1
    assert cuda.compile_module(module_of(True), "sm_90a").facts()["tuned"] == 0
    names = [{str(variable.name_hint) for variable in module.functions} for module in built]
    tile = with_values(kernel, values).tile
    assert any(f"{tile.features}x{tile.tokens}" in name for name in names[0])
    assert not any(f"{tile.features}x{tile.tokens}" in name for name in names[1])
