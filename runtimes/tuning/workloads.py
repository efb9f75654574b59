"""Shape classes that kernels are measured on, as plain data: operator, format, shape, rows, threads, cold or cached."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...compiler.errors import InputError
from ..kernels.knobs import DEFAULTS, DRIVER

__all__ = ["DEFAULT_SHAPES", "Workload", "default_workloads", "groups_of", "reduced"]

OPERATORS = ("linear", "linear_float", "linear_dense", "attention")
"""In the order of the harness's numbers."""
FEW_QUERIES = 4
"""Queries below which attention takes them one by one, as in attention.cc and the harness."""
COLD = 12
"""A cold workload's weights are this many times the last-level cache, which keeps a quarter of 2.5 times its size."""
_LEAST, _MOST = 64 << 20, 1 << 30
_RAGGED = {"k": 5 * 32 - 3, "n": 75}


@dataclass(frozen=True, order=True)
class Workload:
    """One linear, or the attention of one sample.

    operator: `linear` (8-bit activations), `linear_float` or `linear_dense` (32 bits); zero: with zero points; k, n:
    inputs and output features; m: rows; cold: weights come from memory, as in a model, else from the cache. `attention`
    (32 bits): k is the width of a head, n the number of keys, m that of queries, and there are `heads`, each with keys
    and values of its own.

    Raises:
        InputError: a value that no kernel takes.
    """

    operator: str
    bits: int
    group_size: int
    k: int
    n: int
    m: int
    threads: int = 1
    zero: bool = False
    cold: bool = True
    gated: bool = False
    heads: int = 1

    def __post_init__(self) -> None:
        bad = [name for name in ("k", "n", "m", "threads", "heads") if getattr(self, name) < 1]
        widths = (32,) if self.operator in ("linear_dense", "attention") else (2, 3, 4, 8)
        if self.operator not in OPERATORS or self.bits not in widths or self.group_size % 32 or bad:
            raise InputError(
                "No kernel takes this workload",
                expected=f"operator one of {OPERATORS}, bits one of {widths}, group_size a multiple of 32, sizes > 0",
                got=str(asdict(self)),
            )

    @property
    def name(self) -> str:
        """Short and unique, such as `linear w4g32 4096x4096 m1 t2`."""
        if self.operator == "attention":
            sizes = f"{self.heads}x{self.k} keys{self.n} m{self.m} t{self.threads}"
            return f"attention {sizes}{'' if self.cold else ' cached'}"
        scheme = f"w{self.bits}{f'g{self.group_size}' if self.group_size else ''}{'z' if self.zero else ''}"
        more = f"{' gated' if self.gated else ''}{'' if self.cold else ' cached'}"
        return f"{self.operator} {scheme} {self.k}x{self.n} m{self.m} t{self.threads}{more}"

    @property
    def mode(self) -> str:
        """How scales are applied, as kernels name it."""
        return "pc" if not self.group_size else "gz" if self.zero else "g"

    @property
    def layer_bytes(self) -> int:
        """About the bytes of weights and scales of one layer."""
        if self.operator == "attention":
            return 2 * 4 * self.k * self.n * self.heads
        weights = self.k * self.n * self.bits // 8 * (2 if self.gated else 1)
        return weights + (weights * 16 // (self.bits * self.group_size) if self.group_size else 0)

    def layers(self, cache: int) -> int:
        """How many layers are needed so that each comes from memory; 1 for a cached workload."""
        size = min(max(COLD * cache, _LEAST), _MOST)
        return max(2, -(-size // self.layer_bytes)) if self.cold else 1

    def ragged(self) -> Workload:
        """A small relative whose sizes divide nothing: candidates must be right on it too."""
        if self.operator == "attention":
            return replace(self, k=71, n=301, m=min(self.m, 45), heads=3, cold=False)
        k = _RAGGED["k"] if self.group_size <= 32 else 5 * self.group_size - 3
        return replace(self, k=k, n=_RAGGED["n"], cold=False)

    def spec(self, isa: str, layers: int) -> list[int]:
        """The integers of `struct Spec` in harness.cc."""
        whole = (
            self.bits,
            self.group_size,
            self.zero,
            self.gated,
            self.k,
            self.n,
            self.m,
            self.threads,
            layers,
            self.heads,
        )
        return [int(isa[1:]), OPERATORS.index(self.operator), *map(int, whole)]

    @property
    def outputs(self) -> int:
        """Floats that it writes."""
        return self.m * (self.heads * self.k if self.operator == "attention" else self.n)

    def to_json(self) -> dict[str, Any]:
        """Plain data; one head is left out, as in records from before there were any."""
        return {name: value for name, value in asdict(self).items() if name != "heads" or value > 1}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Workload:
        """The inverse. Raises InputError for unknown or missing fields."""
        try:
            return Workload(**values)
        except TypeError as error:
            raise InputError("This is no workload", got=str(dict(values)), hint=str(error)) from None


def groups_of(workload: Workload, isa: str) -> list[str]:
    """The groups of kernels (`Kernel.group`) whose knobs this workload can tune."""
    if workload.operator == "linear_dense":
        return ["linear_dense"]
    if workload.operator == "attention":
        return ["attention" if workload.m >= FEW_QUERIES else "attention_row"]
    if workload.operator == "linear_float":
        return [f"linear_float{workload.bits}"]
    if workload.bits == 8:
        return [f"linear_{workload.mode}"]
    in_registers = workload.m <= DEFAULTS.resolve(DRIVER, "gemv_rows", isa)
    groups = [f"linear_gemv{workload.bits}" if in_registers else f"linear_{workload.mode}"]
    return groups + ([DRIVER] if workload.m >= 4 else [])


_SHAPE = re.compile(r"(linear|linear_float|linear_dense) w(\d+)(?:g(\d+))?(z?) (\d+)x(\d+) m(\d+)")
DEFAULT_SHAPES = (
    "linear w4g32 4096x4096 m1",
    "linear w4g128 1024x3072 m1",
    "linear w4g32 4096x4096 m4",
    "linear w4g32 1024x3072 m16",
    "linear w4g32 1024x3072 m48",
    "linear w4g32 1024x3072 m128",
    "linear w3g32 4096x4096 m1",
    "linear w2g32 4096x4096 m1",
    "linear w8 4096x4096 m1",
    "linear w8 768x3072 m128",
    "linear_float w4g32 4096x4096 m1",
    "linear_float w4g128 1024x3072 m1",
    "linear_dense w32 2048x2048 m1",
    "linear_dense w32 768x3072 m128",
)
"""What is tuned where no model says otherwise: K x N, rows."""


def default_workloads(threads: int) -> list[Workload]:
    """The default shape classes with a number of threads."""
    attention = [
        Workload("attention", 32, 0, 64, n, m, threads, heads=12) for m, n in ((1, 1024), (128, 128))
    ]
    return [*(_parsed(text, threads) for text in DEFAULT_SHAPES), *attention]


def _parsed(text: str, threads: int) -> Workload:
    match = _SHAPE.fullmatch(text)
    assert match is not None, text
    operator, bits, group, zero, k, n, m = match.groups()
    return Workload(operator, int(bits), int(group or 0), int(k), int(n), int(m), threads, bool(zero))


def reduced(workloads: Iterable[Workload], isa: str, most: int = 4) -> list[Workload]:
    """At most `most` workloads for each group of kernels: those with the most weights, rows differing first."""
    chosen: dict[str, list[Workload]] = {}
    ordered = sorted(set(workloads), key=lambda w: (-w.layer_bytes, w))
    for workload in ordered:
        group = groups_of(workload, isa)[0]
        members = chosen.setdefault(group, [])
        if len(members) < most:
            members.append(workload)
    kept = {workload for members in chosen.values() for workload in members}
    return [workload for workload in ordered if workload in kept]
