"""The constraint of every operator, like a table of derivatives: importing this package fills `analysis.RULES`.

A rule ties the dimensions of what an operator reads and writes, leaves them the group that commutes with it, and gives
the equations of scales and shifts. It must say something about every dimension of every operand and of the result: a
dimension that is forgotten would be free.
"""

from . import attention, contraction, convolution, elementwise, experts, normalization, reduction, views

__all__ = [
    "attention", "contraction", "convolution", "elementwise", "experts", "normalization", "reduction", "views",
]  # fmt: skip
