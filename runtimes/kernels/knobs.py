"""Tuning knobs: constants of the kernel generators whose best values depend on the processor, and are measured.

A knob belongs to groups of kernels (`Kernel.group`: what is compiled into one object) and takes one of a few values.
*Settings* are one value for some knobs of some groups; what they leave out has its default. An emitter asks for
the value that holds while its kernel is built::

    distance = knob("stream_near")

`Kernel.prim_func` opens that scope (`using`), and only there is an answer: settings travel as an argument to the
functions of codegen.py and to their worker processes, so that nothing outlives a build. *Driver* knobs are read by the
C drivers, as members of `struct isofold_kernels` (one for each instruction set).

A new knob is an entry of KNOBS and a call of `knob`; the tuner (`runtimes/tuning`) finds it there. Imports no TVM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from ..module_sources import sources_digest

__all__ = [
    "DEFAULTS",
    "DRIVER",
    "KNOBS",
    "Knob",
    "Settings",
    "driver_values",
    "knob",
    "knobs_of",
    "sources",
    "using",
]

DRIVER = "linear_driver"
"""The group of knobs that only the C drivers read: nothing is compiled for them."""

_HERE = Path(__file__).resolve().parent
_MODULES = {
    "attention": "attention",
    "attention_row": "attention",
    "linear_dense": "dense",
    "linear_float*": "linear_float",
    "linear_*": "linear",
}
"""Module that emits the kernels of a group, by pattern, first match."""
_HEADERS = ("linear_driver.h", "linear_float_driver.h", "outlier_driver.h")
_MORE_HEADERS = {"dense": ("dense_driver.h",)}


@dataclass(frozen=True)
class Knob:
    """One tunable constant.

    Attributes:
        groups: patterns of the groups it changes.
        values: what it may be, in an order in which neighbours behave alike.
        default: without settings; `defaults` has exceptions by instruction set or "instruction set/group".
        exact: outputs keep every bit (the order of sums does not change).
        driver: read by the C drivers, as a member of `struct isofold_kernels`.
        needs: a knob of the same groups without which (at 0) this one changes nothing.
    """

    name: str
    groups: tuple[str, ...]
    values: tuple[int, ...]
    default: int
    why: str
    defaults: Mapping[str, int] = field(default_factory=dict)
    exact: bool = True
    driver: bool = False
    needs: str | None = None

    def default_of(self, isa: str, group: str) -> int:
        """The default for a group on an instruction set."""
        return self.defaults.get(f"{isa}/{group}", self.defaults.get(isa, self.default))

    def of(self, group: str) -> bool:
        """Whether it changes this group."""
        return any(fnmatchcase(group, pattern) for pattern in self.groups)


_TILES = ("linear_pc", "linear_g", "linear_gz")
_STREAMS = ("linear_gemv*", "linear_float*", "linear_dense", *_TILES)
_STREAMED = tuple(f"linear_{kind}{bits}" for kind in ("gemv", "float") for bits in (2, 3, 4))

KNOBS = (
    Knob(
        "stream_near",
        _STREAMS,
        (0, 1024, 2048, 4096, 8192),
        2048,
        "Bytes ahead of a streaming kernel that it fetches into the first-level cache; 0: none. That cache has too few "
        "outstanding misses for the memory's latency, so what it fetches should be in the second level already.",
    ),
    Knob(
        "stream_far",
        _STREAMS,
        (0, 4096, 8192, 16384, 32768),
        16384,
        "Bytes ahead that it fetches into the second-level cache; 0: none. The hardware's own prefetcher stops at the "
        "end of every 4 KiB page. On Zen 4 near and far together read 10 to 25 % more than one of them; on Zen 5 near "
        "alone, 8 KiB ahead, reads 20 % more than both.",
    ),
    Knob(
        "stream_far_level",
        _STREAMS,
        (1, 2, 3),
        2,
        "Level of the far one as LLVM counts: 3 the first-level cache, 2 the second, 1 the last.",
        needs="stream_far",
    ),
    Knob(
        "scales_ahead",
        ("linear_gemv*",),
        (0, 512, 1024, 2048),
        1024,
        "Scales and zero points ahead that kernels for few rows fetch into the first-level cache; 0: none. With 2 "
        "and 3 bits they are a fifth of the bytes at groups of 32, where this gains 4 to 9 %, and nothing at larger "
        "groups (minima of 120 interleaved runs, Zen 4).",
        {"v3/linear_gemv4": 0, "v4/linear_gemv4": 0},
    ),
    Knob(
        "gemv_panels",
        ("linear_gemv2", "linear_gemv3", "linear_gemv4"),
        (1, 2, 4),
        1,
        "Panels that a kernel for one row walks at once: as many streams from memory, and as many chains of sums. On "
        "Zen 4 with int4, 4 panels without a near prefetch read 4 to 9 % more on one thread, and less on two.",
        driver=True,
    ),
    Knob(
        "tile_ahead_level",
        _TILES,
        (2, 3),
        3,
        "Level, counted the same way, to which tiles of many rows fetch the next panels. 3.6 % slower with 2 on Zen 4.",
    ),
    Knob(
        "tile_rows",
        _TILES,
        (2, 4, 8),
        4,
        "Rows of a sub-tile that are kept in registers. Groups have float sums beside the integer ones; 32 registers "
        "hold 8 rows of 2 vectors without them.",
        {"v4/linear_pc": 8},
    ),
    Knob(
        "tile_chains",
        ("linear_g", "linear_gz"),
        (1, 2),
        1,
        "Integer sums of a sub-tile for each output, taken in turn by steps of 4 inputs. A dot product waits for the "
        "last one of its sum: 4 rows of 2 vectors are 8 chains, too few where two start in a cycle and take 4 or 5 "
        "(Zen 5).",
        {"v4": 2},
    ),
    Knob(
        "dense_rows",
        ("linear_dense",),
        (4, 6, 8, 10, 12, 14),
        12,
        "Rows of a tile of float32 products whose sums are kept in registers, beside two vectors of weights and one of "
        "a broadcast activation.",
        {"v3": 6},
        exact=False,
    ),
    Knob(
        "dense_unroll",
        ("linear_dense",),
        (1, 2, 4, 8),
        4,
        "Inputs in one round of the loop of tiles of up to 4 rows; as many chains of sums, up to 8 vectors of them.",
        exact=False,
    ),
    Knob(
        "dense_inputs",
        ("linear_dense",),
        (128, 256, 512, 1024),
        256,
        "Inputs that all rows of a task are multiplied with at a time: 128 bytes of weights each, which stay near.",
        exact=False,
        driver=True,
    ),
    Knob(
        "attention_keys",
        ("attention",),
        (64, 128, 256),
        128,
        "Keys whose scores and values a block of queries works on at a time: 128 bytes of scores, and a row of values.",
        exact=False,
        driver=True,
    ),
    Knob(
        "attention_tile",
        ("attention",),
        (4, 6, 8),
        8,
        "Rows of both products' tiles (keys, or dimensions of values) whose sums are kept in registers.",
        {"v3": 6},
        exact=False,
    ),
    Knob(
        "attention_together",
        ("attention_row",),
        (2, 4, 8),
        4,
        "Keys whose dot products with a single query are in flight at once.",
        exact=False,
    ),
    Knob(
        "gemv_rows",
        (DRIVER,),
        (4, 8, 16, 32, 64, 128),
        64,
        "Up to this many rows packed weights are decoded in registers, for every few rows anew; above, once into "
        "scratch memory for all rows.",
        {"v3": 8},
        driver=True,
    ),
    Knob(
        "unpack_inputs",
        (DRIVER,),
        (1024, 2048, 4096),
        4096,
        "Inputs of two panels decoded into scratch memory at a time: 32 bytes each, for the second-level cache.",
        driver=True,
    ),
)
"""All knobs."""


class Settings(Mapping[str, Mapping[str, int]]):
    """Frozen values of knobs by group and name, checked against KNOBS; hashable, picklable.

    Raises:
        ValueError: a name, group or value that KNOBS does not have.
    """

    def __init__(self, values: Mapping[str, Mapping[str, int]] | None = None) -> None:
        rows: list[tuple[str, str, int]] = []
        for group, chosen_here in (values or {}).items():
            for name, chosen in chosen_here.items():
                found = _BY_NAME.get(name)
                if found is None or not found.of(group):
                    known = ", ".join(k.name for k in knobs_of(group)) or "none"
                    raise ValueError(f"group {group!r} has no knob {name!r}; it has: {known}")
                if chosen not in found.values:
                    raise ValueError(f"knob {name!r} of {group!r} is {chosen!r}; allowed: {found.values}")
                rows.append((group, name, int(chosen)))
        self._rows = tuple(sorted(rows))

    def __getitem__(self, group: str) -> Mapping[str, int]:
        found = {name: chosen for g, name, chosen in self._rows if g == group}
        if not found:
            raise KeyError(group)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(group for group, _, _ in self._rows))

    def __len__(self) -> int:
        return len({group for group, _, _ in self._rows})

    def __hash__(self) -> int:
        return hash(self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and self._rows == other._rows

    def __repr__(self) -> str:
        return f"Settings({self.to_json()!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Settings, (self.to_json(),)

    def to_json(self) -> dict[str, dict[str, int]]:
        """Plain dicts, in a fixed order."""
        return {group: dict(self[group]) for group in self}

    def resolve(self, group: str, name: str, isa: str) -> int:
        """The value of a knob for a group on an instruction set; the default where nothing was set."""
        for g, n, chosen in self._rows:
            if g == group and n == name:
                return chosen
        return _BY_NAME[name].default_of(isa, group)


_BY_NAME = {k.name: k for k in KNOBS}
DEFAULTS = Settings()
_scope: ContextVar[tuple[Settings, str, str]] = ContextVar("isofold_knobs")


def knobs_of(group: str) -> tuple[Knob, ...]:
    """The knobs that change a group."""
    return tuple(k for k in KNOBS if k.of(group))


@contextmanager
def using(settings: Settings, isa: str, group: str) -> Iterator[None]:
    """Within it, `knob` answers for kernels of `group` on `isa`."""
    token = _scope.set((settings, isa, group))
    try:
        yield
    finally:
        _scope.reset(token)


def knob(name: str) -> int:
    """The value of a knob for the kernel being emitted. Raises LookupError outside of `Kernel.prim_func`."""
    settings, isa, group = _scope.get()
    return settings.resolve(group, name, isa)


def driver_values(settings: Settings, isa: str) -> dict[str, int]:
    """Values of the driver knobs by the name of their member of `struct isofold_kernels`.

    That is the knob's name, for one of a group of kernels with the group behind it. `streamed_GROUP`: how far ahead
    kernels for few rows have asked for weights.
    """
    values = {
        k.name if group == DRIVER else f"{k.name}_{group}": settings.resolve(group, k.name, isa)
        for k in KNOBS
        if k.driver
        for group in k.groups
    }
    for group in _STREAMED:
        ahead = (settings.resolve(group, name, isa) for name in ("stream_near", "stream_far"))
        values[f"streamed_{group}"] = max(ahead)
    return values


@cache
def sources(group: str) -> str:
    """A hash of what measurements of this group depend on: its module, what that imports, and the drivers."""
    module = next((m for pattern, m in _MODULES.items() if fnmatchcase(group, pattern)), None)
    if module is None:
        raise ValueError(f"no kernels are tuned in a group {group!r}")
    return sources_digest(
        _HERE, module, (_HERE / name for name in (*_HEADERS, *_MORE_HEADERS.get(module, ())))
    )
