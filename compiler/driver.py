"""The driver: runs passes in order and checks after each one that it kept its guarantee.

Programs are compared in float64 on their example inputs, where rounding noise is far below every bound,
so that a quantizer's rounding does not flip between two orders of the same sum.

- BITWISE: results identical.
- REAL: largest difference at most `REAL_TOLERANCE` of the largest result; constants are rounded once to
  their own dtype, and that rounding (2^-24 for float32) passes through the network.
- LOSSY: the error is measured and reported, not bounded; results must stay finite.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import VerificationError
from .passes import Guarantee, PassReport, PassResult
from .program import Program

REAL_TOLERANCE = 2e-5


class AnyPass(Protocol):
    """What the driver can run: a named function of a program (`passes.Pass`)."""

    @property
    def name(self) -> str:
        """The pass's name."""

    def __call__(self, program: Program, **options: Any) -> PassResult:
        """Run the pass."""


@dataclass(frozen=True)
class Step:
    """One pass with its options."""

    run: AnyPass
    options: dict[str, Any] = field(default_factory=dict)


def run_steps(
    program: Program,
    steps: Iterable[Step],
    *,
    verify: bool = True,
    consume: bool = False,
    progress: Callable[[str], None] | None = None,
    watch: Callable[[str, Program], None] | None = None,
) -> tuple[Program, list[PassReport]]:
    """Run `steps` on `program`. Returns the new program (with a record of each pass) and the reports.

    Raises VerificationError that names the pass, the bound and the passes that had already run. `progress` is
    called with a pass's name before it runs, `watch` with the name and the new program after it was checked; it must
    not keep that program, whose tensors the next pass frees as it replaces them. consume: do the same to the tensors
    of `program` itself, which nobody can use afterwards; passes then need little more memory than one copy of the
    model. Verification keeps results, not programs.
    """
    reports: list[PassReport] = []
    before = program.run_comparable() if verify else None
    program.expendable = program.expendable or consume
    for step in steps:
        if progress is not None:
            progress(step.run.name)
        started = time.perf_counter()
        result = step.run(program, **step.options)
        report = result.report
        if verify and before is not None and report.applied:
            after = result.program.run_comparable()
            report.error = relative_error(before, after)
            _check(report, [r.name for r in reports])
            before = after
        report.seconds = time.perf_counter() - started
        reports.append(report)
        earlier, program = program, result.program.with_record(report.to_json())
        # What the pass left is freed here, whoever else holds the program; `result` holds the tensors too.
        if earlier.expendable:
            earlier.tensors.clear()
        del earlier, result
        if watch is not None:
            watch(step.run.name, program)
        program.expendable = True
    program.expendable = False
    return program, reports


def relative_error(expected: list[Any], got: list[Any]) -> float:
    """Largest difference over the largest expected magnitude, over all tensors.

    inf where shapes or finiteness differ.
    """
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        if not isinstance(a, Tensor):
            worst = max(worst, 0.0 if a == b else float("inf"))
            continue
        a, b = a.detach(), b.detach()
        if a.shape != b.shape or not torch.equal(torch.isfinite(a), torch.isfinite(b)):
            return float("inf")
        finite = torch.isfinite(a)
        if not finite.any():
            continue
        difference = float((a[finite].double() - b[finite].double()).abs().max())
        largest = float(a[finite].double().abs().max())
        worst = max(worst, difference / largest if largest else difference)
    return worst


def _check(report: PassReport, earlier: list[str]) -> None:
    bounds = {Guarantee.BITWISE: 0.0, Guarantee.REAL: REAL_TOLERANCE, Guarantee.LOSSY: None}
    bound = bounds[report.guarantee]
    error = report.error or 0.0
    if (bound is not None and error > bound) or error == float("inf"):
        raise VerificationError(
            f"The pass {report.name} changed the program by more than it guarantees",
            where="; ".join(str(a.place) for a in report.applied[:5]),
            expected=f"{report.guarantee.value}: relative error at most {bound}"
            if bound is not None
            else "finite results",
            got=f"relative error {error:.3g} (passes before it: {', '.join(earlier) or 'none'})",
            hint="this is a defect of the pass: please report it with the model; leave the pass out to go on",
        )
