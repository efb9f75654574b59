"""RMSNorm written in primitives becomes `aten.rms_norm(x, [D], gain, eps)`.

    x * rsqrt(mean(x^2, -1) + eps) * g

which is the definition (Zhang and Sennrich, arXiv 1910.07467). Anchor: the root (`normalization.py` lists the
spellings). A gain of `1 + g` arrives as one constant, because constants are folded first.

Side conditions: the mean runs over exactly the last dimension; the root is read by the quotient alone; the gain
is a constant vector, otherwise it stays a product behind the norm. Casts to a wider type around the norm are
left out, as `aten.rms_norm` computes in float32 by itself. Exactness: real.
"""

from __future__ import annotations

from ..editor import Editor
from ..graph import shape
from ..passes import Guarantee, define_pass
from .match import aten
from .normalization import affine, find_normalized, narrowed


@define_pass(Guarantee.REAL)
def canonicalize_rms_norm(editor: Editor) -> None:
    """See the module."""
    for found in find_normalized(editor):
        if isinstance(found, tuple):
            editor.refused(*found)
            continue
        x, result = narrowed(found)
        size = (shape(x) or ())[-1]
        if not isinstance(size, int):
            editor.refused(found.root, "the normalized dimension has no static size")
            continue
        result, gain, _ = affine(editor, result, size, with_bias=False)
        editor.applied(found.root, "RMSNorm", gain=gain is not None, eps=found.eps)
        editor.replace(
            result,
            editor.call(aten.rms_norm.default, x, [size], gain, found.eps, like=found.root, before=result),
        )
