"""The table of rules: operator → what makes its Relax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..builder import Builder

Rule = Callable[[Builder, fx.Node, dict[str, Any]], Any]
"""(builder, node, its arguments by name) → the node's value."""

RULES: dict[Any, Rule] = {}

aten = torch.ops.aten


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Declare the decorated function as the rule of operators."""

    def declare(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return declare
