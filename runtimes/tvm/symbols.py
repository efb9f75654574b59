"""Sizes: torch's symbolic expressions (sympy) as TIR expressions.

torch.export knows the size of every value as an expression of a few symbols, so a lowering never has to infer a
shape: it asks the node. Where the expression is used decides what a symbol stands for, a variable of the whole
executable or one of a single kernel, so the table of symbols is an argument.
"""

from __future__ import annotations

import fractions
import re
from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from tvm import tirx

from ...compiler.errors import UnsupportedError

Expr = Any
Size = Any
"""An int, or a sympy expression."""


def size_of(value: Any) -> Size:
    """A size of a fake tensor (int or SymInt) as a plain int where it is one, else as a sympy expression."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        value = value.node.expr
    if isinstance(value, sympy.Integer):
        return int(value)
    if isinstance(value, sympy.Expr):
        return value
    return int(value)


def symbols_of(size: Size) -> set[str]:
    """Names of the symbols that a size depends on."""
    return set() if isinstance(size, int) else {str(symbol) for symbol in size.free_symbols}


def is_polynomial(size: sympy.Expr) -> bool:
    """Whether a size is made of sums and products of symbols and whole numbers alone."""
    parts = sympy.preorder_traversal(size)
    return all(isinstance(part, (sympy.Add, sympy.Mul, sympy.Symbol, sympy.Integer)) for part in parts)


def to_tir(size: Size, symbol: Callable[[str], Expr]) -> Expr:
    """A size as an int64 TIR expression. `symbol` gives what a name stands for."""
    if isinstance(size, int):
        return tirx.IntImm("int64", size)
    return _Translator(symbol).visit(size)


def _unsupported(e: sympy.Expr) -> UnsupportedError:
    return UnsupportedError(
        "A size of the program has an expression that TVM cannot compute",
        got=f"{e} ({type(e).__name__})",
        expected="sums, products, powers, floor division, remainder, minimum and maximum",
    )


class _Translator:
    """sympy's classes by name, so that torch's own functions need no import of private modules."""

    def __init__(self, symbol: Callable[[str], Expr]) -> None:
        self.symbol = symbol

    def visit(self, e: sympy.Expr) -> Expr:
        if isinstance(e, sympy.Integer):
            return tirx.IntImm("int64", int(e))
        if isinstance(e, sympy.Symbol):
            return self.symbol(str(e))
        made = getattr(self, f"_{type(e).__name__}", None)
        if made is None:
            raise _unsupported(e)
        return made(e)

    def _fold(self, e: sympy.Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
        first, *rest = (self.visit(a) for a in e.args)
        for other in rest:
            first = combine(first, other)
        return first

    def _Add(self, e: sympy.Expr) -> Expr:  # noqa: N802 - named like sympy's class
        return self._fold(e, lambda a, b: a + b)

    def _Mul(self, e: sympy.Expr) -> Expr:  # noqa: N802
        numerator, denominator = e.as_numer_denom()
        if denominator == 1:
            return self._fold(e, lambda a, b: a * b)
        return tirx.floordiv(self.visit(numerator), self.visit(denominator))

    def _Pow(self, e: sympy.Expr) -> Expr:  # noqa: N802
        base, exponent = self.visit(e.base), int(e.exp)
        result = base
        for _ in range(exponent - 1):
            result = result * base
        return result

    def _FloorDiv(self, e: sympy.Expr) -> Expr:  # noqa: N802
        return tirx.floordiv(self.visit(e.args[0]), self.visit(e.args[1]))

    _CleanDiv = _FloorDiv

    def _CeilDiv(self, e: sympy.Expr) -> Expr:  # noqa: N802
        a, b = (self.visit(x) for x in e.args)
        return tirx.floordiv(a + b - 1, b)

    def _Mod(self, e: sympy.Expr) -> Expr:  # noqa: N802
        return tirx.floormod(self.visit(e.args[0]), self.visit(e.args[1]))

    _PythonMod = _Mod

    def _ModularIndexing(self, e: sympy.Expr) -> Expr:  # noqa: N802
        base, divisor, modulus = (self.visit(x) for x in e.args)
        return tirx.floormod(tirx.floordiv(base, divisor), modulus)

    def _TruncToInt(self, e: sympy.Expr) -> Expr:  # noqa: N802
        """A size times a factor such as 1.5: a fraction of small numbers, for which whole numbers give the same."""
        factor, size = e.args[0].as_coeff_Mul()
        number = fractions.Fraction(float(factor))
        if type(size).__name__ != "ToFloat" or not 0 < number < 1 << 10 or number.denominator > 1 << 10:
            raise _unsupported(e)
        numerator, denominator = (tirx.IntImm("int64", v) for v in number.as_integer_ratio())
        return tirx.floordiv(self.visit(size.args[0]) * numerator, denominator)

    def _Max(self, e: sympy.Expr) -> Expr:  # noqa: N802
        return self._fold(e, tirx.max)

    def _Min(self, e: sympy.Expr) -> Expr:  # noqa: N802
        return self._fold(e, tirx.min)


def solve_for_symbol(size: sympy.Expr) -> tuple[str, int, int] | None:
    """(symbol, a, b) where the size is `a symbol + b` with whole a > 0, else None."""
    symbols = list(size.free_symbols)
    if len(symbols) != 1:
        return None
    (symbol,) = symbols
    a, rest = size.coeff(symbol, 1), size.coeff(symbol, 0)
    if not (isinstance(a, sympy.Integer) and isinstance(rest, sympy.Integer) and a > 0):
        return None
    return (str(symbol), int(a), int(rest)) if sympy.expand(size - (a * symbol + rest)) == 0 else None


def variable_name(symbol: str) -> str:
    """A symbol's name as TIR takes it."""
    return re.sub(r"\W", "_", symbol)
