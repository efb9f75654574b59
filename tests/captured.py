"""Models of the registry with the programs that they are captured as, once in a process: a program is a value."""

from __future__ import annotations

from functools import cache

from isofold.compiler.capture import capture
from isofold.compiler.program import Program
from isofold.models import registry
from isofold.models.case import ModelCase


@cache
def captured(name: str) -> tuple[ModelCase, Program]:
    """The smallest model of a name and its program, with sizes that are not known. Nobody changes them."""
    case = registry.get(name)
    return case, capture(case.module, case.args, dynamic_shapes=case.dynamic_shapes)
