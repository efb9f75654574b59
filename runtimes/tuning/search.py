"""Which candidates to measure next in the small space of one group's knobs, for one processor and instruction set.

Each batch mixes the untried neighbours of the best (one knob moved by one step), crossings of good ones, and random
ones; a candidate that looks better than what is confirmed by more than its noise is measured again alone, with more
rounds, since the best of many noisy times is always too good. The state is what the records say, so a resumed search
goes on where the last one ended. Candidates that another machine is measuring are left out until it is done or lost.

A search may also have an inventor, which writes whole schedules from what was measured so far (MetaSchedule, for the
kernels that TVM generates). Its schedules are candidates with one knob, `TRACE`, whose value is the schedule's number.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from ..kernels.knobs import knobs_of
from .database import Record
from .selection import best

__all__ = [
    "TRACE",
    "Batch",
    "Candidate",
    "InventionError",
    "Inventor",
    "Measurable",
    "Search",
    "Space",
    "space_of",
]

Candidate = dict[str, int]
_CROSSED = 4
"""How many of the best candidates are crossed with each other."""
TRACE = "trace"
"""The knob of invented candidates; its value is the number of a schedule's text."""
MOST_LOSSES = 2
"""After losing its machine this many times while measured alone, a candidate counts as crashed."""


class Measurable(Protocol):
    """A workload that candidates are measured on."""

    @property
    def name(self) -> str:
        """A short name for progress and tables."""

    def to_json(self) -> dict[str, Any]:
        """The workload as JSON-like data, which identifies it in the database."""


@dataclass(frozen=True)
class Batch:
    """Candidates of one group to be measured on some workloads.

    confirm: with more rounds, to decide whether the candidate is chosen.
    invent: above 0 the batch has no candidates; this many are to be invented first (`Search.invent`, `Search.offer`).
    """

    isa: str
    group: str
    candidates: tuple[Candidate, ...]
    workloads: tuple[Measurable, ...]
    confirm: bool
    invent: int = 0


class InventionError(RuntimeError):
    """An inventor cannot go on for this search; the message says why."""


class Inventor(Protocol):
    """A source of whole schedules."""

    most: int
    """The most schedules that are measured in one search."""

    def __call__(self, measured: Sequence[tuple[str, float | None]], count: int) -> list[str]:
        """Up to `count` schedules, as text, that are not measured yet; an empty list: there are no more.

        measured: schedules with their time over the default's, None where the result was wrong or running failed.
        Raises InventionError.
        """

    def number(self, text: str) -> int:
        """The number of a schedule: the value of the knob `TRACE`."""


@dataclass(frozen=True)
class Space:
    """The candidates of a group.

    values: of each knob, in an order in which neighbours behave alike. default: the candidate to beat.
    needs: knob → another knob; the first changes nothing where the second is 0.
    exact: every candidate must give the default's outputs bit by bit. legal: whether the machine can run a candidate.
    """

    values: Mapping[str, tuple[int, ...]]
    default: Candidate
    needs: Mapping[str, str] = field(default_factory=dict)
    exact: bool = True
    legal: Callable[[Candidate], bool] = lambda _: True


def space_of(isa: str, group: str, values: Mapping[str, Sequence[int]] | None = None) -> Space:
    """The space of a group of the op library's kernels. values: for some knobs, the only values to try."""
    knobs = knobs_of(group)
    return Space(
        {knob.name: tuple((values or {}).get(knob.name, knob.values)) for knob in knobs},
        {knob.name: knob.default_of(isa, group) for knob in knobs},
        {knob.name: knob.needs for knob in knobs if knob.needs is not None},
        all(knob.exact for knob in knobs),
    )


def _key(candidate: Candidate) -> str:
    return json.dumps(candidate, sort_keys=True)


class Search:
    """The search of one group of kernels on one processor and instruction set.

    workloads: what every candidate is measured on. records: what was measured before, of the same group, processor and
        instruction set.
    space: the candidates; None for the group's own knobs, of which `values` may allow only some.
    sources: hash of what the measurements depend on, for records. title: for progress and tables.
    inventor: a source of further candidates.
    weight: from the default's seconds (None: not known yet) to the share of the time that the search should get.
    """

    def __init__(
        self,
        isa: str,
        group: str,
        workloads: Sequence[Measurable],
        records: Iterable[Record],
        *,
        seed: int = 0,
        values: Mapping[str, Sequence[int]] | None = None,
        space: Space | None = None,
        sources: str = "",
        title: str | None = None,
        inventor: Inventor | None = None,
        weight: Callable[[float | None], float] = lambda _: 1.0,
    ) -> None:
        self.isa, self.group, self.workloads = isa, group, tuple(workloads)
        self.sources, self.title = sources, title or group
        whole = space or space_of(isa, group, values)
        self.space, self.default, self.exact = whole.values, whole.default, whole.exact
        self._needs, self._legal = whole.needs, whole.legal
        self.inventor, self._weight = inventor, weight
        self.traces: dict[int, str] = {}
        """Texts of schedules by number."""
        self._offered: list[Candidate] = []
        self._inventing, self._invented_last = False, False
        self.skipped = False
        """Nothing more is proposed."""
        self._random = random.Random(f"{seed} {isa} {group}")
        self._records: list[Record] = []
        self._pending: dict[str, Candidate] = {}
        self._losses: dict[str, int] = {}
        self._again: list[Batch] = []
        self._seen: dict[tuple[str, bool], dict[str, Record]] = {}
        self._bad: set[str] = set()
        self.shapes = {json.dumps(w.to_json(), sort_keys=True): w for w in self.workloads}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Take a measurement into account."""
        self._records.append(record)
        if record.trace is not None and TRACE in record.knobs:
            self.traces[record.knobs[TRACE]] = record.trace
        if record.status != "ok":
            self._bad.add(record.candidate)
        elif record.shape in self.shapes:
            self._seen.setdefault((record.candidate, record.confirmed), {})[record.shape] = record

    @property
    def size(self) -> int:
        """Candidates in the whole space, the default left out; of invented ones as many as are measured at most."""
        return len(self._everything) - 1 + (0 if self.inventor is None else self.inventor.most)

    @property
    def tried(self) -> int:
        """Candidates that have been measured or found bad."""
        return len({c for (c, _), seen in self._seen.items() if len(seen) == len(self.shapes)} | self._bad)

    @property
    def weight(self) -> float:
        """The share of the time that this search should get, relative to the others."""
        return self._weight(next((r.baseline for r in self._records if r.baseline), None))

    def best(self) -> tuple[Candidate, dict[str, Record]] | None:
        """The candidate that a build would take now, and its records by workload; None: the default."""
        return best(self._records)

    def next(self, count: int) -> Batch | None:
        """About `count` candidates to measure next; None: other machines are measuring all that is left."""
        if self.skipped:
            return None
        if self._again:
            batch = self._again.pop(0)
            return self._take(list(batch.candidates), confirm=batch.confirm)
        challenger = self._challenger()
        if challenger is not None:
            return self._take([challenger], confirm=True)
        fresh = self._offers(count)
        if not fresh and self._may_invent() and not self._invented_last:
            self._inventing = self._invented_last = True
            return Batch(self.isa, self.group, (), (), confirm=False, invent=count)
        if not fresh:
            self._invented_last = False
            fresh = self._proposals(count)
        if fresh:
            return self._take(fresh, confirm=False)
        if not self._may_invent():
            return None
        self._inventing = self._invented_last = True
        return Batch(self.isa, self.group, (), (), confirm=False, invent=count)

    # ---- invented candidates

    def invent(self, count: int) -> list[str]:
        """What the inventor makes of what is known. Takes seconds: it is called without the engine's lock."""
        assert self.inventor is not None
        measured = [(text, self._time(number)) for number, text in list(self.traces.items())]
        return self.inventor(measured, count)

    def offer(self, texts: Sequence[str]) -> None:
        """Add invented schedules to the candidates; an empty list ends inventing."""
        if not texts or self.inventor is None:
            self.inventor = None
            return
        for text in texts:
            number = self.inventor.number(text)
            if number not in self.traces:
                self.traces[number] = text
                self._offered.append({TRACE: number})

    def _time(self, number: int) -> float | None:
        score = self._score(_key({TRACE: number}))
        return None if score is None else math.exp(score)

    def _may_invent(self) -> bool:
        return self.inventor is not None and not self._inventing and len(self.traces) < self.inventor.most

    def _offers(self, count: int) -> list[Candidate]:
        """Invented candidates that nobody has measured, those of an interrupted run among them."""
        new = [c for c in self._offered if self._is_new(_key(c), c)]
        self._offered = new[count:]
        return new[:count]

    def _take(self, candidates: list[Candidate], *, confirm: bool) -> Batch:
        self._pending.update({_key(c): c for c in candidates})
        missing = [
            w
            for shape, w in self.shapes.items()
            if any(shape not in self._seen.get((_key(c), confirm), {}) for c in candidates)
        ]
        return Batch(self.isa, self.group, tuple(candidates), tuple(missing), confirm)

    def done(self, batch: Batch) -> None:
        """Note that a batch was measured and its records added."""
        self._inventing &= not batch.invent
        for candidate in batch.candidates:
            self._pending.pop(_key(candidate), None)
            self._losses.pop(_key(candidate), None)

    def lost(self, batch: Batch) -> list[Candidate]:
        """Note that a batch's machine was lost: its candidates come again, one by one. Returns those that crashed."""
        culprits = []
        self._inventing &= not batch.invent
        for candidate in batch.candidates:
            key = _key(candidate)
            self._pending.pop(key, None)
            # A whole batch says little about each of its members.
            self._losses[key] = self._losses.get(key, 0) + (len(batch.candidates) == 1)
            if self._losses[key] >= MOST_LOSSES:
                culprits.append(candidate)
            else:
                self._again.append(replace(batch, candidates=(candidate,)))
        return culprits

    def _score(self, candidate: str) -> float | None:
        """Mean over workloads of the logarithm of time over the default's time; None: not measured on all of them."""
        seen = self._seen.get((candidate, True), {})
        if len(seen) < len(self.shapes):
            seen = self._seen.get((candidate, False), {})
        if len(seen) < len(self.shapes) or candidate in self._bad:
            return None
        return sum(math.log(r.ratio or 1) for r in seen.values()) / len(seen)

    def _challenger(self) -> Candidate | None:
        """The best screened candidate that beats what is confirmed by its noise, and is not confirmed yet."""
        now = self.best()
        bar = 0.0 if now is None else (self._score(_key(now[0])) or 0.0)
        found: tuple[float, Candidate] | None = None
        for (key, confirmed), seen in self._seen.items():
            score = self._score(key)
            if confirmed or score is None or key in self._pending:
                continue
            if len(self._seen.get((key, True), {})) == len(self.shapes):
                continue
            noise = math.sqrt(sum((r.noise or 0) ** 2 for r in seen.values())) / len(seen)
            if score + noise < bar and (found is None or score < found[0]):
                found = score, next(iter(seen.values())).knobs
        return None if found is None else found[1]

    def _proposals(self, count: int) -> list[Candidate]:
        """Untried candidates, best guesses first."""
        scores = {k: s for (k, _) in self._seen if (s := self._score(k)) is not None}
        ranked = [json.loads(k) for k in sorted(scores, key=lambda k: scores[k]) if scores[k] < 0]
        ranked = [c for c in ranked if TRACE not in c]
        centre = ranked[0] if ranked else self.default
        neighbours = list(self._neighbours(centre))
        self._random.shuffle(neighbours)
        good = [*ranked[:_CROSSED], self.default]
        crossed = [
            {name: self._random.choice((a, b))[name] for name in self.space}
            for a, b in itertools.combinations(good, 2)
        ]
        wide = [
            {name: self._random.choice(values) for name, values in self.space.items()} for _ in range(count)
        ]
        half = max(1, count // 2)
        begun = [
            json.loads(k) for (k, c), seen in self._seen.items() if not c and len(seen) < len(self.shapes)
        ]
        begun = [c for c in begun if TRACE not in c]
        order = [*begun, *neighbours[:half], *crossed[:1], *wide[:1], *neighbours[half:], *crossed, *wide]
        every = [
            dict(zip(self.space, chosen, strict=True)) for chosen in itertools.product(*self.space.values())
        ]
        self._random.shuffle(every)
        order += every  # so that a search ends when everything was tried
        found: dict[str, Candidate] = {}
        allowed = (c for c in order if all(c[name] in values for name, values in self.space.items()))
        for proposed in allowed:
            candidate = self._normal(proposed)
            key = _key(candidate)
            if self._is_new(key, candidate) and self._legal(candidate):
                found.setdefault(key, candidate)
            if len(found) == count:
                break
        return list(found.values())

    @cached_property
    def _everything(self) -> list[Candidate]:
        every = (
            self._normal(dict(zip(self.space, values, strict=True)))
            for values in itertools.product(*self.space.values())
        )
        legal = (candidate for candidate in every if self._legal(candidate))
        return list({_key(candidate): candidate for candidate in (self.default, *legal)}.values())

    def _normal(self, candidate: Candidate) -> Candidate:
        """Knobs that change nothing at their defaults: of several equal candidates one."""
        idle = {name: self.default[name] for name, other in self._needs.items() if not candidate[other]}
        return {**candidate, **idle}

    def _is_new(self, key: str, candidate: Candidate) -> bool:
        whole = len(self._seen.get((key, False), {})) == len(self.shapes)
        waiting = any(candidate in batch.candidates for batch in self._again)
        return not (candidate == self.default or key in self._bad or key in self._pending or waiting or whole)

    def _neighbours(self, centre: Candidate) -> Iterable[Candidate]:
        for name, values in self.space.items():
            if centre[name] not in values:
                yield from ({**centre, name: value} for value in values)
                continue
            at = values.index(centre[name])
            for step in (-1, 1):
                if 0 <= at + step < len(values):
                    yield {**centre, name: values[at + step]}
