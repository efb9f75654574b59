"""Every way of taking a part of a tensor becomes `aten.slice` with static, non-negative bounds.

chunk, split, split_with_sizes, unbind's relatives and narrow are slices that torch hands out together; later
patterns (rotary halves, fused q/k/v, gate and up in one linear) then see one spelling.

A selected index of a dimension that a reshape cut off the last one (`q = x.view(..., 3, D)[..., 0, :]`) is a slice
of the last dimension before the cut, `x.view(..., 3 D)[..., 0:D]`, also where the cut was permuted before
(`q, k, v = x.view(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)`). Constant indices that follow one another
(`x[..., [4], :]`) are a slice too. Heads cut out of `x.view(..., H, D)` are cut out of x: each part has channels of
its own. A slice of a concatenation that is one of its parts is that part.

Side conditions: the dimension that is cut has a static size. Exactness: bitwise.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from ..editor import Editor
from ..graph import argument, dtype, shape
from ..passes import Guarantee, define_pass
from .match import RESHAPES, aten, equal_sizes, is_call, operands, permutation, slice_bounds

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
    for node in editor.calls(aten.unbind.int):
        _unbound(editor, node)
    for node in editor.calls(aten.narrow.default):
        x, dim, start, length = operands(node)
        if isinstance(start, int) and isinstance(length, int) and start >= 0:
            editor.applied(node, "narrow is a slice")
            editor.replace(node, editor.call(aten.slice.Tensor, x, dim, start, start + length, 1, like=node))
    for node in editor.calls(aten.slice.Tensor):
        bounds = slice_bounds(node)
        if bounds is not None and tuple(operands(node)[1:]) != bounds:
            node.args, node.kwargs = (operands(node)[0], *bounds), {}
    for node in editor.calls(aten.select.int):
        _selected(editor, node)
    for node in editor.calls(aten.index.Tensor):
        _indexed(editor, node)
    for node in editor.calls(aten.slice.Tensor):
        _joined(editor, node)
    for node in editor.calls(aten.slice.Tensor):
        _heads(editor, node)


def _joined(editor: Editor, node: fx.Node) -> None:
    """slice(cat(a, b, c), where b lies) is b."""
    joined, bounds = operands(node)[0], slice_bounds(node)
    if bounds is None or bounds[3] != 1 or not is_call(joined, aten.cat.default):
        return
    dim, start, end, _ = bounds
    if int(argument(joined, "dim")) % len(shape(joined) or (0,)) != dim:
        return
    offset = 0
    for part in operands(joined)[0]:
        size = (shape(part) or ())[dim] if len(shape(part) or ()) > dim else None
        if not isinstance(size, int) or offset > start:
            return
        if (offset, offset + size) == (start, end) and dtype(part) == dtype(node):
            editor.applied(node, "a slice of a concatenation is one of its parts")
            editor.replace(node, part)
            return
        offset += size


def _heads(editor: Editor, node: fx.Node) -> None:
    """slice(reshape(x, [..., H, D]), heads a to b) is reshape(slice(x, a D to b D), [..., b - a, D])."""
    cut, bounds = operands(node)[0], slice_bounds(node)
    x = operands(cut)[0] if is_call(cut, *RESHAPES) else None
    outer, size = (shape(n) or () if isinstance(n, fx.Node) else () for n in (x, cut))
    if bounds is None or len(outer) < 2 or len(size) != len(outer) + 1 or bounds[0] != len(size) - 2:
        return
    heads, width = size[-2:]
    static = isinstance(heads, int) and isinstance(width, int) and outer[-1] == heads * width
    if not static or bounds[3] != 1 or not all(map(equal_sizes, outer[:-1], size[:-2])):
        return
    _, start, end, _ = bounds
    part = editor.call(aten.slice.Tensor, x, len(outer) - 1, start * width, end * width, 1, like=node)
    sizes = [*list(operands(cut)[1])[:-2], end - start, width]
    editor.applied(node, f"heads {start} to {end} are a slice of the last dimension")
    editor.replace(node, editor.call(aten.reshape.default, part, sizes, like=node))


def _indexed(editor: Editor, node: fx.Node) -> None:
    x, indices = operands(node)[0], list(argument(node, "indices"))
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    held = editor.tensor(given[0][1]) if len(given) == 1 else None
    if held is None or held.dim() != 1 or held.dtype != torch.int64 or not held.numel():
        return
    dim, size = given[0][0], (shape(x) or ())[given[0][0]]
    if not isinstance(size, int):
        return
    wanted = (held % size).tolist()
    if wanted != list(range(wanted[0], wanted[0] + len(wanted))):
        return
    editor.applied(node, f"constant indices of dimension {dim} are a slice")
    bounds = (dim, wanted[0], wanted[0] + len(wanted), 1)
    editor.replace(node, editor.call(aten.slice.Tensor, x, *bounds, like=node))


def _selected(editor: Editor, node: fx.Node) -> None:
    cut, dim, index = operands(node)
    rank = len(shape(cut) or ()) if isinstance(cut, fx.Node) else 0
    order = list(range(rank))
    if is_call(cut, aten.permute.default, aten.transpose.int):
        order, cut = permutation(cut), operands(cut)[0]
    if not is_call(cut, *RESHAPES) or rank < 3:
        return
    at, size, outer = order[dim % rank], shape(cut) or (), shape(operands(cut)[0]) or ()
    parts, *inner = size[at:]
    if at == rank - 1 or not all(isinstance(s, int) for s in (index, parts, *inner)):
        return
    width = math.prod(inner)
    if len(inner) > 1 and (not outer or outer[-1] != parts * width):
        return
    leading = list(operands(cut)[1])[:at]
    whole = editor.call(
        aten.reshape.default, operands(cut)[0], [*leading, parts * width], like=cut, before=node
    )
    start = (index % parts) * width
    new = editor.call(aten.slice.Tensor, whole, at, start, start + width, 1, like=node, before=node)
    if len(inner) > 1:
        new = editor.call(aten.reshape.default, new, [*leading, *inner], like=node, before=node)
    order = [d - (d > at) for d in order if d != at]
    if order != list(range(rank - 1)):
        new = editor.call(aten.permute.default, new, order, like=node, before=node)
    editor.applied(node, f"index {index} of {parts} is a slice of the last dimension")
    editor.replace(node, new)


def _unbound(editor: Editor, node: fx.Node) -> None:
    if any(user.target is not operator.getitem for user in node.users):
        editor.refused(node, "its list of parts is passed on as a whole")
        return
    dim, count = int(argument(node, "dim")), len(node.meta["val"])
    editor.applied(node, f"{count} indices of dimension {dim}")
    for user in list(node.users):
        index = int(operands(user)[1]) % count
        part = editor.call(aten.select.int, operands(node)[0], dim, index, like=node, before=user)
        editor.replace(user, part)
    if not node._erased:
        editor.erase(node)


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
