"""Activations written in primitives become `aten.gelu` and `aten.silu`.

    gelu(x)        = x/2 (1 + erf(x / sqrt 2))
    gelu(x, tanh)  = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    silu(x)        = x sigmoid(x)

Anchors: erf, tanh, sigmoid. Constants are compared to seven digits, so a table of another approximation does
not match: `x sigmoid(1.702 x)` differs from both by up to 0.02 and is refused. Exactness: real, up to the
digits of the constants that the model spells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import fx

from ..editor import Editor
from ..graph import dtype, only_user
from ..passes import Guarantee, define_pass
from .match import (
    MULTIPLICATIONS,
    Product,
    aten,
    equal_shapes,
    is_call,
    operands,
    powers,
    product,
    same,
    total,
)

_CUBIC = 0.044715


@define_pass(Guarantee.REAL)
def canonicalize_activations(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(aten.erf.default, aten.tanh.default):
        approximate = "none" if is_call(node, aten.erf.default) else "tanh"
        x = _argument_of_erf(editor, node) if approximate == "none" else _argument_of_tanh(editor, node)
        if x is None:
            continue
        outer = next((o for o in _products_around(node) if _is_half_of(editor, o, x, node)), None)
        if outer is None:
            editor.refused(node, "its argument is that of gelu, but it is not read as x/2 (1 + f(x)) alone")
            continue
        editor.applied(node, f"gelu, approximate={approximate}")
        editor.replace(outer, editor.call(aten.gelu.default, x, approximate=approximate, like=outer))
    for node in editor.calls(aten.sigmoid.default):
        _silu(editor, node)


def _silu(editor: Editor, sigmoid: fx.Node) -> None:
    outer = only_user(sigmoid)
    if not is_call(outer, *MULTIPLICATIONS):
        return
    x = operands(outer)[1] if operands(outer)[0] is sigmoid else operands(outer)[0]
    if x is not operands(sigmoid)[0]:
        inside = product(editor, operands(sigmoid)[0])
        if inside.factors == [x]:
            reason = f"x sigmoid({inside.coefficient:g} x) is neither silu nor gelu (gelu is up to 0.02 away)"
            editor.refused(sigmoid, reason)
        return
    assert isinstance(x, fx.Node)
    if not equal_shapes(outer, x) or dtype(outer) != dtype(x):
        return
    editor.applied(sigmoid, "silu")
    editor.replace(outer, editor.call(aten.silu.default, x, like=outer))


def _argument_of_erf(editor: Editor, erf: fx.Node) -> fx.Node | None:
    inside = product(editor, operands(erf)[0])
    return (
        inside.factors[0] if len(inside.factors) == 1 and same(inside.coefficient, math.sqrt(0.5)) else None
    )


def _argument_of_tanh(editor: Editor, tanh: fx.Node) -> fx.Node | None:
    """x where the argument is c (x + 0.044715 x^3), also with x taken out: c x (1 + 0.044715 x^2)."""
    outside = product(editor, operands(tanh)[0])
    if not same(outside.coefficient, math.sqrt(2.0 / math.pi)):
        return None
    for cubic in outside.factors:
        rest = outside.without(cubic)
        read = total(editor, cubic)
        assert rest is not None
        if len(rest.factors) == 0 and read.constant == 0.0 and len(read.terms) == 2:
            for linear, cube in (read.terms, read.terms[::-1]):
                if (
                    len(linear.factors) == 1
                    and linear.coefficient == 1.0
                    and _is_power(editor, cube, linear.factors[0], 3)
                ):
                    return linear.factors[0]
        if len(rest.factors) == 1 and read.constant == 1.0 and len(read.terms) == 1:
            x = rest.factors[0]
            if _is_power(editor, read.terms[0], x, 2):
                return x
    return None


def _is_power(editor: Editor, term: Product, x: fx.Node, exponent: int) -> bool:
    return same(term.coefficient, _CUBIC) and powers(editor, term) == {x: float(exponent)}


def _products_around(node: fx.Node) -> Iterator[fx.Node]:
    """The products that node + ... goes into, inner ones first, through products that nothing else reads."""
    user = only_user(node)
    user = only_user(user) if is_call(user, aten.add.Tensor, aten.add.Scalar) else None
    while is_call(user, *MULTIPLICATIONS, aten.div.Tensor):
        yield user
        user = only_user(user)


def _is_half_of(editor: Editor, outer: fx.Node, x: fx.Node, function: fx.Node) -> bool:
    """Whether `outer` is x/2 (1 + function); the product may not hold more (a gate's other side)."""
    read = product(editor, outer)
    rest = read.without(x)
    if rest is None or not same(rest.coefficient, 0.5) or len(rest.factors) != 1:
        return False
    inner = total(editor, rest.factors[0])
    one = len(inner.terms) == 1 and inner.terms[0].is_plain(function)
    return one and inner.constant == 1.0 and equal_shapes(outer, x) and dtype(outer) == dtype(x)
