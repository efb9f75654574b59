"""Latencies of several callables in one interleaved run. Imports no torch.

Each turn gives every subject a short burst: calls that are not counted until other runtimes' threads, which spin for
milliseconds while they wait for work, have gone to sleep and caches are warm, and then calls that are. So slow
phases of a shared machine meet all subjects alike. Medians and quartiles are over all counted calls; the order
rotates from turn to turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

_BURST = 3
_WARM = 0.05
"""Seconds of calls before those that count."""
_LEAST_TURNS = 5


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one subject."""

    median: float
    first_quartile: float
    third_quartile: float
    least: float
    runs: int

    def to_json(self) -> dict[str, float]:
        """The fields as a dictionary."""
        return asdict(self)


def interleaved(
    subjects: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    say: Callable[[str], None] | None = None,
) -> dict[str, Latency]:
    """Time all subjects in turns for about `seconds` each, at least five turns."""
    names = list(subjects)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        subjects[name]()
    started, turn = time.perf_counter(), 0
    while turn < _LEAST_TURNS or time.perf_counter() - started < seconds * len(names):
        if say is not None:
            spent = time.perf_counter() - started
            say(f"measure {min(int(spent), int(seconds * len(names)))}/{max(int(seconds * len(names)), 1)}")
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            run = subjects[name]
            begun = time.perf_counter()
            while time.perf_counter() - begun < _WARM:
                run()
            for _ in range(_BURST):
                before = time.perf_counter()
                run()
                taken[name].append(1000 * (time.perf_counter() - before))
        turn += 1
    return {name: _latency(times) for name, times in taken.items()}


def _latency(times: list[float]) -> Latency:
    first, median, third = statistics.quantiles(times, n=4)
    return Latency(median, first, third, min(times), len(times))
