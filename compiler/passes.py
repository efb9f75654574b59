"""The pass contract: a pass is a pure function of a program, with a guarantee and a report.

    pass(program, **options) -> PassResult(program, report)

The input is never changed. The report lists what was applied and what was refused, each with its place
and reason. The guarantee says how equal the result is; the driver checks it every time:

- BITWISE: the same numbers (packing codes, dead code, metadata).
- REAL: equal over the reals, every changed constant computed in float64 and rounded once.
- LOSSY: not equal (quantization, pruning); the error is measured and reported.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .editor import Editor
from .graph import Place
from .program import Program


class Guarantee(enum.Enum):
    """How equal a pass's result is to its input."""

    BITWISE = "bitwise"
    REAL = "real"
    LOSSY = "lossy"


@dataclass(frozen=True)
class Applied:
    """One change: where, and what, in a sentence; `facts` are JSON-like values for reports."""

    place: Place
    what: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """One place where the pass could have applied and did not, and why."""

    place: Place
    reason: str


@dataclass
class PassReport:
    """What one run of a pass did. `error` and `seconds` are filled in by the driver."""

    name: str
    guarantee: Guarantee
    applied: list[Applied]
    refused: list[Refused]
    operators_before: int
    operators_after: int
    error: float | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-like dictionary, as kept in `Program.records`."""
        return {
            "pass": self.name,
            "guarantee": self.guarantee.value,
            "applied": [{**vars(a.place), "what": a.what, **a.facts} for a in self.applied],
            "refused": [{**vars(r.place), "reason": r.reason} for r in self.refused],
            "operators_before": self.operators_before,
            "operators_after": self.operators_after,
            "error": self.error,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class PassResult:
    """A new program and the report of the pass that made it."""

    program: Program
    report: PassReport


@dataclass(frozen=True)
class Pass:
    """A named pass. Call it with a program and its options; it returns a PassResult."""

    name: str
    guarantee: Guarantee
    edit: Callable[..., None]

    def __call__(self, program: Program, **options: Any) -> PassResult:
        """Run on a copy; the given program is not changed."""
        editor = Editor(program)
        # Weights may require gradients (a program is differentiable); what a pass makes of them is a new constant.
        with torch.no_grad():
            self.edit(editor, **options)
        result = editor.finish()
        report = PassReport(
            name=self.name,
            guarantee=self.guarantee,
            applied=[Applied(*entry) for entry in editor.applied_entries],
            refused=[Refused(*entry) for entry in editor.refused_entries],
            operators_before=program.operator_count,
            operators_after=result.operator_count,
        )
        return PassResult(result, report)


def define_pass(guarantee: Guarantee) -> Callable[[Callable[..., None]], Pass]:
    """Make a pass of a function `edit(editor, **options)`; the pass takes the function's name."""

    def define(edit: Callable[..., None]) -> Pass:
        return Pass(edit.__name__, guarantee, edit)

    return define
