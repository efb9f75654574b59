"""The search on an invented machine: finds the best, resumes from records, ends, and gives lost work back."""

from __future__ import annotations

import math
import random
from typing import Any

from isofold.runtimes.tuning.database import Record
from isofold.runtimes.tuning.search import MOST_LOSSES, Batch, Search
from isofold.runtimes.tuning.selection import chosen

from .conftest import SMALL, record

CPU = "Some CPU (1/2)"


def times(knobs: dict[str, int]) -> float:
    """The invented ratio: smooth, best at near 0, far 8192, level 2, 4 panels."""
    return (
        1
        - 0.04 * (knobs["stream_near"] == 0)
        - 0.03 * math.log2(knobs["gemv_panels"])
        + 0.01 * abs(13 if knobs["stream_far"] == 0 else math.log2(knobs["stream_far"]) - 13)
        + 0.02 * (knobs["stream_far_level"] != 2 and knobs["stream_far"] != 0)
    )


def answer(batch: Batch, noise: random.Random, deviation: float = 0.0) -> list[Record]:
    return [
        record(
            knobs=candidate,
            workload=workload.to_json(),
            ratio=times(candidate) * noise.gauss(1, deviation),
            noise=deviation + 0.001,
            confirmed=batch.confirm,
        )
        for candidate in batch.candidates
        for workload in batch.workloads
    ]


def run(search: Search, batches: int, deviation: float = 0.0) -> list[Record]:
    noise, found = random.Random(1), []
    for _ in range(batches):
        batch = search.next(4)
        if batch is None:
            break
        for one in answer(batch, noise, deviation):
            search.add(one)
            found.append(one)
        search.done(batch)
    return found


def test_it_finds_the_best_in_a_tenth_of_the_space_and_confirms_it() -> None:
    search = Search("v4", "linear_gemv4", [SMALL], [])
    records = run(search, 12)
    tried = len({r.candidate for r in records})
    assert tried < search.size / 3
    found = search.best()
    assert found is not None
    knobs, measured = found
    assert knobs["gemv_panels"] == 4
    assert knobs["stream_near"] == 0
    assert all(r.confirmed for r in measured.values())
    assert chosen(records, CPU, "v4").to_json() == {"linear_gemv4": knobs}


def test_candidates_that_differ_in_nothing_are_one() -> None:
    search = Search("v4", "linear_gemv4", [SMALL], [])
    assert search.size == 5 * (1 + 4 * 3) * 4 * 3 - 1
    values = {"stream_far": (0,), "stream_far_level": (1, 2, 3), "stream_near": (0,), "gemv_panels": (2,)}
    batch = Search("v4", "linear_gemv4", [SMALL], [], values={**values, "scales_ahead": (0,)}).next(9)
    assert batch is not None
    assert [c["stream_far_level"] for c in batch.candidates] == [2]


def test_noise_alone_moves_nothing() -> None:
    search = Search("v4", "linear_gemv4", [SMALL], [])
    noise = random.Random(3)
    for _ in range(60):
        batch = search.next(4)
        if batch is None:
            break
        for candidate in batch.candidates:
            search.add(
                record(knobs=candidate, ratio=noise.gauss(1, 0.02), noise=0.02, confirmed=batch.confirm)
            )
        search.done(batch)
    assert search.best() is None


def test_a_resumed_search_measures_nothing_twice_and_ends() -> None:
    first = Search("v4", "linear_gemv4", [SMALL], [])
    records = run(first, 6)
    second = Search("v4", "linear_gemv4", [SMALL], records, seed=5)
    assert second.tried == first.tried
    more = run(second, 1000)
    assert second.next(4) is None
    assert second.tried == second.size
    keys = [r.key for r in records + more]
    assert len(set(keys)) == len(keys)


def test_lost_candidates_come_again_alone_and_the_culprit_is_found() -> None:
    search = Search("v4", "linear_gemv4", [SMALL], [])
    batch = search.next(3)
    assert batch is not None
    assert search.lost(batch) == []
    crashing = batch.candidates[1]
    losses = 0
    met = set()
    for _ in range(10):
        again = search.next(3)
        assert again is not None
        if len(again.candidates) > 1:
            break
        met.add(str(again.candidates[0]))
        if again.candidates[0] == crashing:
            losses += 1
            culprits = search.lost(again)
            assert culprits == ([crashing] if losses == MOST_LOSSES else [])
            for culprit in culprits:
                search.add(record(knobs=culprit, status="crashed", ratio=None))
            continue
        for one in answer(again, random.Random(0)):
            search.add(one)
        search.done(again)
    assert losses == MOST_LOSSES
    assert met == {str(c) for c in batch.candidates}
    assert all(crashing not in (b.candidates if (b := search.next(4)) else ()) for _ in range(3))


def test_two_machines_never_hold_the_same_candidate() -> None:
    search = Search("v4", "linear_gemv4", [SMALL], [])
    one, two = search.next(4), search.next(4)
    assert one is not None
    assert two is not None
    assert not {str(c) for c in one.candidates} & {str(c) for c in two.candidates}


def ratios(**by_workload: float) -> list[Record]:
    return [
        record(workload={**SMALL.to_json(), "m": int(m[1:])}, ratio=ratio) for m, ratio in by_workload.items()
    ]


def test_what_is_chosen_gains_overall_and_slows_nothing_down() -> None:
    assert chosen(ratios(m1=0.9, m2=0.97), CPU, "v4")
    assert not chosen(ratios(m1=0.9, m2=1.03), CPU, "v4"), "one workload loses 3 %"
    assert not chosen(ratios(m1=0.985, m2=1.0), CPU, "v4"), "within three times the noise"
    assert not chosen(ratios(m1=0.9), CPU, "v3")
    assert not chosen(ratios(m1=0.9), "Other", "v4")
    assert chosen(ratios(m1=0.9), "Other", "v4", any_processor=True)
    unconfirmed: dict[str, Any] = {"confirmed": False}
    assert not chosen([record(**unconfirmed)], CPU, "v4")
    assert not chosen([record(), record(status="wrong", confirmed=False)], CPU, "v4")
    stale = [record(sources="0123")]
    assert not chosen(stale, CPU, "v4")
    assert chosen(stale, CPU, "v4", any_sources=True)
    unknown = [record(knobs={"gone": 3})]
    assert not chosen(unknown, CPU, "v4")
