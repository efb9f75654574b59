"""How each operator is written in Relax, one file for each family. Importing this package fills `RULES`."""

from . import (
    contractions,
    convolutions,
    creation,
    dialect,
    indexing,
    normalization,
    ordering,
    pointwise,
    pooling,
    reductions,
    views,
)
from .registry import RULES, Rule, rule

__all__ = ["RULES", "Rule", "rule"]

assert all(
    (
        contractions,
        convolutions,
        creation,
        dialect,
        indexing,
        normalization,
        ordering,
        pointwise,
        pooling,
        reductions,
        views,
    )
)
