"""A shift, a scale and a Hadamard transform in front of an activation quantizer become part of it.

    quantize_activation(hadamard(mul(sub(x, shift), scale), orders), params)
        → quantize_activation(x, params, shift, scale, orders)      and quantize_activation_fp8 likewise

The quantizer reads x anyway, and its kernel subtracts and multiplies in registers and transforms in the cache: the
sweeps over memory go, and so do the nodes. This is how transforms on an edge (a shift and scale per channel, or a
rotation, in front of quantized layers) come to cost little. Any of the three may be missing; `add(x, c)` is a
shift by -c.

Side conditions: float32; the vectors are constants over the last dimension, or numbers that float32 holds, and do not
broadcast x; whatever reads an absorbed node is a quantizer or a node that is absorbed itself, as its result would
otherwise be computed for the other reader too. Exactly this order is taken: a scale in front of a shift, or two of a
kind, would need constants that are rounded anew, which moves codes, so the rest stays in the graph.

Exactness: BITWISE, the operator subtracts, multiplies and transforms in this order, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.canonicalize.match import ADDITIONS, MULTIPLICATIONS, SUBTRACTIONS, equal_shapes, is_call
from ..compiler.dialect import hadamard, quantize_activation, quantize_activation_fp8
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype, shape, static_size
from ..compiler.passes import Guarantee, define_pass
from .packed_rows import arguments, call_with

_SHIFTS = (*SUBTRACTIONS, *ADDITIONS)
_AFFINE = (*_SHIFTS, *MULTIPLICATIONS)
_QUANTIZERS = (quantize_activation.overload, quantize_activation_fp8.overload)


@define_pass(Guarantee.BITWISE)
def fuse_quantizer_inputs(editor: Editor) -> None:
    """See the module."""
    constants: dict[fx.Node, fx.Node] = {}
    for quantizer in editor.calls(*_QUANTIZERS):
        absorbed: list[str] = []
        while True:
            name = _absorb(editor, quantizer, constants)
            if name is None:
                break
            absorbed.append(name)
            quantizer = _again(editor, quantizer, name, constants)
        if absorbed:
            editor.applied(
                quantizer, f"{' and '.join(reversed(absorbed))} of its input in the quantizer's pass"
            )


def _absorb(editor: Editor, quantizer: fx.Node, constants: dict[fx.Node, fx.Node]) -> str | None:
    """Which of `shift | scale | hadamard` the node in front of the quantizer can become, or None."""
    given = arguments(quantizer)
    step = given["x"]
    vector: Tensor | str | None = None
    if is_call(step, hadamard.overload):
        name = "hadamard"
    elif is_call(step, *_AFFINE):
        name = "shift" if step.target in _SHIFTS else "scale"
        vector = _vector(editor, step, name)
        if vector is None:
            return None
    else:
        return None
    reason = vector if isinstance(vector, str) else _reason_against(editor, step, given, name)
    if reason is not None:
        editor.refused(step, f"stays in front of the quantizer: {reason}")
        return None
    if isinstance(vector, Tensor) and step not in constants:
        constants[step] = editor.constant(vector, f"{step.name}_{name}")
    return name


def _again(editor: Editor, quantizer: fx.Node, name: str, constants: dict[fx.Node, fx.Node]) -> fx.Node:
    """The quantizer without the node in front of it, which goes with its last reader."""
    step = argument(quantizer, "x")
    changes: dict[str, Any] = (
        {"x": argument(step, "x"), "hadamard": list(argument(step, "orders"))}
        if (name == "hadamard")
        else {"x": _input(editor, step), name: constants[step]}
    )
    new = call_with(editor, quantizer, **changes)
    editor.replace(quantizer, new)
    return new


def _input(editor: Editor, step: fx.Node) -> fx.Node:
    """The operand that is not the constant."""
    first, second = step.args[:2]
    chosen = second if not isinstance(first, fx.Node) or editor.tensor(first) is not None else first
    assert isinstance(chosen, fx.Node)
    return chosen


def _vector(editor: Editor, step: fx.Node, name: str) -> Tensor | str | None:
    """The step's constant as float32 `[K]`; None where it has none (a sum of two values), or why it will not do."""
    first, second = step.args[:2]
    constant: Any = None
    for operand in (second, first):
        if isinstance(operand, (int, float)) or editor.tensor(operand) is not None:
            constant = operand
            break
    if constant is None:
        return None
    if constant is first and step.target in SUBTRACTIONS:
        return "it subtracts the value from a constant"
    x = _input(editor, step)
    width = static_size((shape(x) or (None,))[-1])
    if dtype(x) != torch.float32 or dtype(step) != torch.float32:
        return f"it computes in {dtype(step)}, not float32"
    if width is None or not equal_shapes(x, step):
        return f"it broadcasts {[str(s) for s in shape(x) or ()]} to {[str(s) for s in shape(step) or ()]}"
    held = torch.tensor(float(constant)) if isinstance(constant, (int, float)) else editor.tensor(constant)
    assert held is not None
    if not isinstance(constant, fx.Node) and float(held) != constant:
        return f"its constant {constant} is no float32 number"
    if (
        held.numel() not in (1, width)
        or held.dtype != torch.float32
        or (held.dim() and held.shape[-1] != held.numel())
    ):
        return f"its constant {list(held.shape)} is no vector over the last dimension"
    if name == "shift":
        if argument(step, "alpha") != 1:
            return f"it multiplies its constant by alpha = {argument(step, 'alpha')}"
        held = -held if step.target in ADDITIONS else held
    return held.reshape(-1).expand(width).clone()


def _reason_against(editor: Editor, step: fx.Node, given: dict[str, Any], name: str) -> str | None:
    order = ("shift", "scale", "hadamard")
    taken = [other for other in order if (given[other] if other == "hadamard" else given[other] is not None)]
    if name in taken:
        return f"the quantizer has a {name} already, and the product of two would be rounded anew"
    before = [other for other in taken if order.index(other) < order.index(name)]
    if before:
        return f"a {name} before the {before[-1]} would have to be worked into its constants, which rounds them anew"
    if name == "hadamard" and argument(step, "transpose"):
        return "it is the transposed transform"
    other = _other_reader(editor, step)
    return None if other is None else f"{other.name} ({other.target}) also reads it"


def _other_reader(editor: Editor, step: fx.Node) -> fx.Node | None:
    """A reader of the node that needs its value, or None where all are quantizers."""
    for user in step.users:
        if is_call(user, *_QUANTIZERS):
            continue
        if not (
            is_call(user, hadamard.overload)
            or (is_call(user, *_AFFINE) and isinstance(_vector(editor, user, "scale"), Tensor))
        ):
            return user
        deeper = _other_reader(editor, user)
        if deeper is not None:
            return deeper
    return None
