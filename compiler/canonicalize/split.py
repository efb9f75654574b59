"""Every way of taking a part of a tensor becomes `aten.slice` with static, non-negative bounds.

chunk, split, split_with_sizes, unbind's relatives and narrow are slices that torch hands out together; later
patterns (rotary halves, fused q/k/v, gate and up in one linear) then see one spelling.

Side conditions: the dimension that is cut has a static size. Exactness: bitwise.
"""

from __future__ import annotations

import operator

from torch import fx

from ..editor import Editor
from ..graph import argument, shape
from ..passes import Guarantee, define_pass
from .match import aten, operands, slice_bounds

_SPLITS = (
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
)


@define_pass(Guarantee.BITWISE)
def canonicalize_splits(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(*_SPLITS):
        _slices(editor, node)
    for node in editor.calls(aten.narrow.default):
        x, dim, start, length = operands(node)
        if isinstance(start, int) and isinstance(length, int) and start >= 0:
            editor.applied(node, "narrow is a slice")
            editor.replace(node, editor.call(aten.slice.Tensor, x, dim, start, start + length, 1, like=node))
    for node in editor.calls(aten.slice.Tensor):
        bounds = slice_bounds(node)
        if bounds is not None and tuple(operands(node)[1:]) != bounds:
            node.args, node.kwargs = (operands(node)[0], *bounds), {}


def _slices(editor: Editor, node: fx.Node) -> None:
    x = operands(node)[0]
    assert isinstance(x, fx.Node)
    size = shape(x) or ()
    dim = int(argument(node, "dim")) % len(size)
    parts = node.meta["val"]
    lengths = [part.shape[dim] for part in parts]
    if not all(isinstance(length, int) for length in [*lengths, size[dim]]):
        editor.refused(node, "the dimension that it cuts has no static size")
        return
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for user in list(node.users):
        if user.target is not operator.getitem:
            editor.refused(node, "its list of parts is passed on as a whole")
            return
    editor.applied(node, f"{len(lengths)} slices of dimension {dim}")
    for user in list(node.users):
        index = int(operands(user)[1])
        index %= len(lengths)
        start, end = starts[index], starts[index] + lengths[index]
        editor.replace(user, editor.call(aten.slice.Tensor, x, dim, start, end, 1, like=node, before=user))
    if not node._erased:
        editor.erase(node)
