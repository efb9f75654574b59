"""LayerNorm written in primitives becomes `aten.layer_norm(x, [D], gain, bias, eps)`.

    c = x - mean(x, -1);  c / sqrt(mean(c^2, -1) + eps) * g + b

RMS normalization of the centred value; the variance may also be `var(x, correction=0)`.

Side conditions: both means over exactly the last dimension; the population variance (a correction of 1 differs
by D / (D - 1)); epsilon inside the root. Exactness: real.
"""

from __future__ import annotations

from torch import fx

from ..editor import Editor
from ..graph import argument, only_user, shape
from ..passes import Guarantee, define_pass
from .match import DIVISIONS, MULTIPLICATIONS, aten, either_order, is_call, is_last, operands, total
from .normalization import affine, find_normalized, narrowed

_VARIANCES = (aten.var.correction, aten.var.dim)


@define_pass(Guarantee.REAL)
def canonicalize_layer_norm(editor: Editor) -> None:
    """See the module."""
    for found in find_normalized(editor):
        if isinstance(found, tuple):
            continue  # RMSNorm, which looks at the same anchors, reports these
        x, result = narrowed(found)
        source = centred(x)
        if source is not None:
            _replace(editor, found.root, source, result, found.eps)
    for variance in editor.calls(*_VARIANCES):
        _from_variance(editor, variance)


def centred(node: fx.Node) -> fx.Node | None:
    """x where the node is x - mean(x) over the last dimension."""
    if not is_call(node, aten.sub.Tensor) or argument(node, "alpha") != 1:
        return None
    x, mean = operands(node)[:2]
    if not isinstance(x, fx.Node) or not is_call(mean, aten.mean.dim) or operands(mean)[0] is not x:
        return None
    return x if is_last(x, argument(mean, "dim")) and argument(mean, "keepdim") else None


def _from_variance(editor: Editor, variance: fx.Node) -> None:
    x, user = operands(variance)[0], only_user(variance)
    assert isinstance(x, fx.Node)
    sum_node = user if is_call(user, aten.add.Tensor, aten.add.Scalar) else None
    root = only_user(sum_node) if sum_node is not None else None
    if sum_node is None or not is_call(root, aten.rsqrt.default, aten.sqrt.default):
        return
    read = total(editor, sum_node)
    quotient = only_user(root)
    wanted = MULTIPLICATIONS if is_call(root, aten.rsqrt.default) else DIVISIONS
    if len(read.terms) != 1 or not is_call(quotient, *wanted):
        return
    orders = either_order(quotient) if wanted is MULTIPLICATIONS else iter([operands(quotient)[:2]])
    if not any(b is root and isinstance(a, fx.Node) and centred(a) is x for a, b in orders):
        return
    correction = argument(variance, "correction") if is_call(variance, aten.var.correction) else None
    unbiased = (
        argument(variance, "unbiased")
        if is_call(variance, aten.var.dim)
        else correction is None or correction
    )
    if unbiased:
        editor.refused(variance, "its variance divides by one less than the size, LayerNorm's by the size")
    elif not is_last(x, argument(variance, "dim")) or not argument(variance, "keepdim"):
        editor.refused(variance, "its variance is not taken over exactly the last dimension")
    else:
        _replace(editor, variance, x, quotient, read.constant)


def _replace(editor: Editor, anchor: fx.Node, x: fx.Node, result: fx.Node, eps: float) -> None:
    size = (shape(x) or ())[-1]
    if not isinstance(size, int):
        editor.refused(anchor, "the normalized dimension has no static size")
        return
    result, gain, bias = affine(editor, result, size, with_bias=True)
    editor.applied(anchor, "LayerNorm", gain=gain is not None, bias=bias is not None, eps=eps)
    new = editor.call(aten.layer_norm.default, x, [size], gain, bias, eps, False, like=anchor, before=result)
    editor.replace(result, new)
