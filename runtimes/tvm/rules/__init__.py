"""How each operator is written in Relax, one file for each family. Importing this package fills `RULES`."""

from . import (
    binary,
    contractions,
    convolutions,
    creation,
    dialect,
    indexing,
    normalization,
    ordering,
    pooling,
    reductions,
    unary,
    views,
)
from .registry import RULES, Rule, rule

__all__ = ["RULES", "Rule", "rule"]

assert all(
    (
        binary,
        contractions,
        convolutions,
        creation,
        dialect,
        indexing,
        normalization,
        ordering,
        pooling,
        reductions,
        unary,
        views,
    )
)
