"""Complex numbers become pairs of real ones, and Fourier transforms products with constant matrices.

    z = a + b i  →  (a, b)           (a + b i)(c + d i)  →  (ac - bd, ad + bc)
    view_as_complex(x)  →  (x[..., 0], x[..., 1])          view_as_real(z)  →  stack([a, b], -1)

What moves elements moves both parts; products of matrices and einsums are bilinear and become up to four of their
kind. Fourier transforms are in `fourier.py`. No runtime then needs complex types, and what models say with them (rotary
embedding, spectra) is read like its real spelling.

All complex values of a program are taken apart, or none: where one comes in or goes out, or an operator has no rule
here, that is refused, with the place. Exactness: real.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..decompose import decompose, is_composite
from ..editor import Editor
from ..graph import argument, dtype, value
from ..passes import Guarantee, define_pass
from .fourier import FOURIER, Pair, transformed
from .match import aten, is_call, operands

_MOVES = (
    *(aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int),
    *(aten.t.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.expand.default, aten.slice.Tensor, aten.select.int, aten.flatten.using_ints, aten.unflatten.int),
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.index.Tensor),
    *(aten.index_select.default, aten.gather.default, aten.roll.default, aten.flip.default, aten.repeat.default),
    *(aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default, aten.cumsum.default),
    *(aten.cat.default, aten.stack.default, aten.neg.default, aten.movedim.int, aten.narrow.default),
    *(aten.slice_scatter.default, aten.select_scatter.default, aten.unfold.default, aten.expand_as.default),
    *(aten.lift_fresh_copy.default, aten.constant_pad_nd.default, aten.zeros_like.default, aten.split.Tensor),
    *(aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.copy.default),
)  # fmt: skip
"""Linear in all their tensors together: f(a + b i, c + d i) = f(a, c) + f(b, d) i."""
_BILINEAR = (
    *(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mul.Tensor, aten.mul.Scalar),
    *(aten.einsum.default, aten.outer.default, aten.mv.default, aten.dot.default, aten.vdot.default),
)  # fmt: skip
_MADE = (
    aten.zeros.default,
    aten.full.default,
    aten.new_zeros.default,
    aten.ones.default,
    aten.empty.memory_format,
)


@define_pass(Guarantee.REAL)
def split_complex_numbers(editor: Editor) -> None:
    """See the module."""
    if not any(_is_complex(node) for node in editor.graph.nodes):
        return
    if any(_is_complex(n) for n in editor.graph.nodes if n.op == "placeholder" or n in _outputs(editor)):
        editor.refused(_outputs(editor)[0], "the model takes or returns complex numbers")
        return
    _take_apart(editor)
    concerned = [n for n in editor.graph.nodes if n.op == "call_function" and _concerns(n)]
    without = [n for n in concerned if n.target is not operator.getitem and _reason(n) is not None]
    for node in without:
        editor.refused(node, str(_reason(node)))
    if without:
        return
    pairs = _Pairs(editor)
    for node in concerned:
        pairs.rewrite(node)
    for node in reversed([*pairs.old, *pairs.made]):
        if not node._erased and not node.users:
            editor.erase(node)
    editor.applied(_outputs(editor)[0], f"{len(concerned)} operators on complex numbers act on real ones")


def _outputs(editor: Editor) -> list[fx.Node]:
    output = next(node for node in reversed(editor.graph.nodes) if node.op == "output")
    return list(output.all_input_nodes)


def _is_complex(node: object) -> bool:
    found = value(node) if isinstance(node, fx.Node) else None
    leaves = found if isinstance(found, (tuple, list)) else [found]
    return any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in leaves)


def _concerns(node: fx.Node) -> bool:
    return _is_complex(node) or any(map(_is_complex, node.all_input_nodes))


def _take_apart(editor: Editor) -> None:
    """Composite operators without a rule (`fft_rfft2`, `stft`) in terms of others."""
    known = {*_RULES, *_MOVES, *_BILINEAR, *_MADE, *FOURIER}
    waiting = [n for n in editor.graph.nodes if n.op == "call_function" and _concerns(n)]
    while waiting:
        node = waiting.pop()
        if node.target not in known and is_composite(node.target):
            waiting.extend(decompose(editor, node) or [])


def _reason(node: fx.Node) -> str | None:
    """Why a call stays as it is."""
    if node.target in FOURIER:
        fake = value(operands(node)[0])
        dims = argument(node, "dim")
        if not all(isinstance(fake.shape[d], int) for d in dims):
            return "a Fourier transform along a dimension without a static size"
        return None
    known = node.target in _RULES or node.target in _MOVES or node.target in _BILINEAR or node.target in _MADE
    return None if known else f"{node.target} has no form on pairs of real numbers"


class _Pairs:
    """The parts of complex values, made node by node; an imaginary part of None is zero."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.parts: dict[fx.Node, Any] = {}
        self.old: list[fx.Node] = []
        self.made: list[fx.Node] = []
        self.tables: dict[Any, fx.Node] = {}
        self.at: fx.Node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call in the place of the node that is rewritten."""
        node = self.editor.call(target, *args, like=self.at, **kwargs)
        self.made.append(node)
        return node

    def rewrite(self, node: fx.Node) -> None:
        """Find the parts of a complex node, or replace a real one that reads complex values."""
        self.at = node
        if node.target is operator.getitem:
            source, index = operands(node)[:2]
            made: Any = self.parts[source][index]
        elif node.target in _RULES:
            made = _RULES[node.target](self, node)
        elif node.target in FOURIER:
            made = transformed(self, node, self.pair(operands(node)[0]))
        elif node.target in _BILINEAR:
            made = self.bilinear(node)
        elif node.target in _MADE:
            made = self.filled(node)
        else:
            made = self.moved(node)
        self.old.append(node)
        if isinstance(made, fx.Node):
            node.replace_all_uses_with(made, propagate_meta=False)
        else:
            self.parts[node] = made

    def pair(self, node: Any) -> Pair:
        """The two parts of an operand: a node or a number."""
        if not isinstance(node, fx.Node):
            z = complex(node)
            return z.real, z.imag or None
        if not _is_complex(node):
            return node, None
        if node not in self.parts:
            held, name = self.editor.tensor(node), self.editor.name_of(node)
            assert held is not None, f"{node} has no parts yet"
            made = [
                self.editor.constant(part, f"{name}_{which}")
                for part, which in ((held.real, "real"), (held.imag, "imag"))
            ]
            self.parts[node] = tuple(made)
        found: Pair = self.parts[node]
        return found

    def zeros(self, like: fx.Node) -> fx.Node:
        """An imaginary part that is zero, written out."""
        return self.call(aten.zeros_like.default, like)

    def real_call(self, node: fx.Node, args: Any = None, kwargs: Any = None) -> fx.Node:
        """The same call with other operands, complex dtypes as their real ones."""
        args, kwargs = (node.args, node.kwargs) if args is None else (args, kwargs)
        args, kwargs = pytree.tree_map(_real_dtype, (args, kwargs))
        return self.call(node.target, *args, **kwargs)

    def filled(self, node: fx.Node) -> Pair:
        """A tensor made of one number, or of none."""
        part = lambda which: pytree.tree_map(  # noqa: E731
            lambda leaf: getattr(leaf, which) if isinstance(leaf, complex) else leaf, (node.args, node.kwargs)
        )
        is_real = all(not leaf.imag for leaf in pytree.tree_leaves(node.args) if isinstance(leaf, complex))
        return self.real_call(node, *part("real")), None if is_real else self.real_call(node, *part("imag"))

    def moved(self, node: fx.Node) -> Any:
        """Both parts of an operator that is linear in all its tensors together."""
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        floats = [i for i, x in enumerate(leaves) if isinstance(x, fx.Node) and _may_be_complex(x)]
        pairs = {i: self.pair(leaves[i]) for i in floats}

        def one(part: int) -> fx.Node:
            given = list(leaves)
            for i, both in pairs.items():
                given[i] = both[part] if both[part] is not None else self.zeros(both[0])
            return self.real_call(node, *pytree.tree_unflatten(given, spec))

        real = one(0)
        imaginary = None if all(both[1] is None for both in pairs.values()) else one(1)
        if isinstance(value(node), Tensor):
            return real, imaginary
        get = lambda made, i: made and self.call(operator.getitem, made, i)  # noqa: E731
        return [(get(real, i), get(imaginary, i)) for i in range(len(value(node)))]

    def bilinear(self, node: fx.Node) -> Pair:
        """(a + b i)(c + d i), whatever the product."""
        if node.target == aten.einsum.default:
            equation, factors = operands(node)[:2]
            product: Callable[[Any, Any], fx.Node] = lambda x, y: self.call(  # noqa: E731
                aten.einsum.default, equation, [x, y]
            )
            if len(factors) != 2:
                only = self.pair(factors[0])
                return tuple(part and self.call(aten.einsum.default, equation, [part]) for part in only)  # type: ignore[return-value]
            x, y = factors
        else:
            x, y = operands(node)[:2]
            product = lambda x, y: self.product(node.target, x, y)  # noqa: E731
        (a, b), (c, d) = self.pair(x), self.pair(y)
        if node.target == aten.vdot.default and b is not None:
            b = self.call(aten.neg.default, b)
        return self.products(product, (a, b), (c, d))

    def product(self, target: Any, x: Any, y: Any) -> Any:
        """One product; of numbers where both are."""
        if not isinstance(x, fx.Node):
            x, y = y, x
        if not isinstance(x, fx.Node):
            return x * y
        if not isinstance(y, fx.Node):
            return x if y == 1 else self.call(aten.mul.Tensor, x, y)
        return self.call(target, x, y)

    def products(self, product: Callable[[Any, Any], Any], x: Pair, y: Pair) -> Pair:
        """The product of two pairs; products with zeros are left out."""
        (a, b), (c, d) = x, y
        times = lambda p, q: None if p is None or q is None or p == 0 or q == 0 else product(p, q)  # noqa: E731
        real = self.plus(times(a, c), times(b, d), -1)
        imaginary = self.plus(times(a, d), times(b, c), 1)
        if real is None:
            assert imaginary is not None
            real = self.zeros(imaginary)
        return real, imaginary

    def plus(self, x: Any, y: Any, sign: int) -> Any:
        """x + sign y, None for zero."""
        if y is None:
            return x
        if x is None:
            return y if sign == 1 else self.call(aten.neg.default, y)
        return self.call(aten.add.Tensor if sign == 1 else aten.sub.Tensor, x, y)


def _may_be_complex(node: fx.Node) -> bool:
    kind = dtype(node)
    return kind is not None and (kind.is_complex or kind.is_floating_point)


def _real_dtype(argument: Any) -> Any:
    return argument.to_real() if isinstance(argument, torch.dtype) and argument.is_complex else argument


# ---- operators with a rule of their own


def _sum(p: _Pairs, node: fx.Node) -> Pair:
    x, y = (p.pair(operand) for operand in operands(node)[:2])
    sign = 1 if node.target in (aten.add.Tensor, aten.add.Scalar) else -1
    alpha = argument(node, "alpha")
    if alpha != 1:
        y = tuple(part if part is None else p.product(None, part, alpha) for part in y)  # type: ignore[assignment]
    real, imaginary = (p.plus(a, b, sign) for a, b in zip(x, y, strict=True))
    shape = value(node).shape
    if imaginary is not None and tuple(value(imaginary).shape) != tuple(shape):
        imaginary = p.call(aten.add.Tensor, imaginary, p.zeros(real))
    if tuple(value(real).shape) != tuple(shape):
        real = p.call(aten.add.Tensor, real, p.zeros(imaginary))
    return real, imaginary


def _quotient(p: _Pairs, node: fx.Node) -> Pair:
    x, (c, d) = (p.pair(operand) for operand in operands(node)[:2])
    divide = lambda part, by: part and p.call(aten.div.Tensor, part, by)  # noqa: E731
    if d is None:
        return divide(x[0], c), divide(x[1], c)
    return _divided(p, x, (c, d))


def _divided(p: _Pairs, x: Pair, y: Pair) -> Pair:
    c, d = y
    multiply = lambda u, v: p.product(aten.mul.Tensor, u, v)  # noqa: E731
    size = p.plus(multiply(c, c), multiply(d, d), 1)
    real, imaginary = p.products(multiply, x, (c, p.call(aten.neg.default, d)))
    return p.call(aten.div.Tensor, real, size), imaginary and p.call(aten.div.Tensor, imaginary, size)


def _polar(p: _Pairs, size: fx.Node, angle: fx.Node) -> Pair:
    turn = [p.call(f, angle) for f in (aten.cos.default, aten.sin.default)]
    return tuple(p.call(aten.mul.Tensor, size, t) for t in turn)  # type: ignore[return-value]


def _exponential(p: _Pairs, node: fx.Node) -> Pair:
    a, b = p.pair(operands(node)[0])
    size = p.call(aten.exp.default, a)
    return (size, None) if b is None else _polar(p, size, b)


def _absolute(p: _Pairs, node: fx.Node) -> fx.Node:
    a, b = p.pair(operands(node)[0])
    if b is None:
        return p.call(aten.abs.default, a)
    squares = [p.call(aten.mul.Tensor, part, part) for part in (a, b)]
    return p.call(aten.sqrt.default, p.call(aten.add.Tensor, *squares))


def _angle(p: _Pairs, node: fx.Node) -> fx.Node:
    a, b = p.pair(operands(node)[0])
    return p.call(aten.atan2.default, p.zeros(a) if b is None else b, a)


def _imaginary(p: _Pairs, node: fx.Node) -> fx.Node:
    a, b = p.pair(operands(node)[0])
    return p.zeros(a) if b is None else b


def _stacked(p: _Pairs, node: fx.Node) -> fx.Node:
    a, b = p.pair(operands(node)[0])
    b = p.zeros(a) if b is None else b
    last = value(node).dim() - 1
    for user in list(node.users):
        # `z.real` arrives as the first of the two that `view_as_real` stacks.
        if is_call(user, aten.select.int) and operands(user)[1] % (last + 1) == last:
            user.replace_all_uses_with((a, b)[operands(user)[2]], propagate_meta=False)
            p.old.append(user)
    return p.call(aten.stack.default, [a, b], -1)


def _conjugate(p: _Pairs, node: fx.Node) -> Pair:
    a, b = p.pair(operands(node)[0])
    return a, b and p.call(aten.neg.default, b)


def _viewed(p: _Pairs, node: fx.Node) -> Pair:
    x = operands(node)[0]
    return p.call(aten.select.int, x, -1, 0), p.call(aten.select.int, x, -1, 1)


def _square(p: _Pairs, node: fx.Node) -> Pair:
    x = p.pair(operands(node)[0])
    return p.products(lambda u, v: p.product(aten.mul.Tensor, u, v), x, x)


def _cast(p: _Pairs, node: fx.Node) -> Any:
    a, b = p.pair(operands(node)[0])
    cast = lambda part: part and p.real_call(node, (part, *node.args[1:]), node.kwargs)  # noqa: E731
    return (cast(a), cast(b)) if _is_complex(node) else cast(a)


def _pair_of(p: _Pairs, node: fx.Node) -> Any:
    real, imaginary = operands(node)[:2]
    return real, imaginary


def _chosen(p: _Pairs, node: fx.Node) -> Pair:
    condition, *both = operands(node)[:3]
    x, y = map(p.pair, both)
    real = p.call(aten.where.self, condition, x[0], y[0])
    if x[1] is None and y[1] is None:
        return real, None
    return real, p.call(aten.where.self, condition, *(_imaginary_part(p, z) for z in (x, y)))


def _imaginary_part(p: _Pairs, pair: Pair) -> fx.Node:
    assert isinstance(pair[0], fx.Node)
    return p.zeros(pair[0]) if pair[1] is None else pair[1]


_RULES: dict[Any, Callable[[_Pairs, fx.Node], Any]] = {
    aten.complex.default: _pair_of,
    aten.polar.default: lambda p, node: _polar(p, *operands(node)[:2]),
    aten.view_as_complex.default: _viewed,
    aten.view_as_real.default: _stacked,
    aten.real.default: lambda p, node: p.pair(operands(node)[0])[0],
    aten.imag.default: _imaginary,
    aten.abs.default: _absolute,
    aten.angle.default: _angle,
    aten.exp.default: _exponential,
    aten.square.default: _square,
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar), _sum),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _quotient),
    **dict.fromkeys((aten.conj.default, aten._conj.default, aten.conj_physical.default), _conjugate),
    **dict.fromkeys((aten.resolve_conj.default, aten.resolve_neg.default), lambda p, n: p.pair(n.args[0])),
    aten.reciprocal.default: lambda p, node: _divided(p, (1.0, None), p.pair(operands(node)[0])),
    aten._to_copy.default: _cast,
    aten.to.dtype: _cast,
    aten.where.self: _chosen,
}
