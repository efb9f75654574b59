"""The entry point `isofold.plugins: passes`: makes this package's pipeline known to the compiler.

Importing this module imports neither torch nor a pass; the pipeline does when it is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..compiler.registry import register_pipeline

if TYPE_CHECKING:
    from ..compiler.driver import Step
    from ..compiler.program import Program
    from ..compiler.recipe import Recipe


def pipeline(
    program: Program, recipe: Recipe, calibration: Any = None, dense: bool = False
) -> Sequence[Step]:
    """The steps that `recipe` means for `program` (`pipeline.plan`)."""
    from .pipeline import plan

    return plan(program, recipe, calibration, dense)


register_pipeline(pipeline)
