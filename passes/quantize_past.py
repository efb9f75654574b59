"""Past keys and values that a decoder takes and returns are kept as codes: its caches become 2 to 8 times smaller.

    keys = cat(past, new), returned        →  codes = cat(past codes, codes of new), returned; the same of the pairs
    sdpa(q, f(keys), values)               →  sdpa(q, dequantize_cache(codes), dequantize_cache(...))

f: nothing, or what folds put on the edge: a product with a constant vector, then an online Hadamard transform per head
(`place_hadamards`). Both work inside one token, `f(cat(past, new)) = cat(f(past), f(new))`, so f moves in front of the
quantizer of new tokens: cached tokens are turned once, and not again in every step. `fuse_attention` then lets the
attention read the codes.

A cache is found by the graph's algebra alone: an input `[B, H, T, D]` joined in front of new tokens along T, read by
attentions as keys or as values, and returned as it is. The pass changes what the program is called with: each input and
output of floats becomes a tuple of codes and pairs (`change_interface`), recorded in `Program.caches`.

LOSSY: each element moves by at most half a step of its token, head and group, once, when it is added.

Side conditions: float32; static heads and their size; keys and values of an attention are both caches of one format;
nothing else reads the floats (sizes may be asked for, they are those of the codes).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.canonicalize.match import is_call, vector
from ..compiler.change_interface import drop_inputs, split_inputs, split_outputs
from ..compiler.coded_cache import CodedCache, renumbered
from ..compiler.dialect import dequantize_cache, hadamard
from ..compiler.dialect import quantize_cache as quantize
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype, module_path, shape, value
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import CacheFormat, Recipe
from .layers import ATTENTIONS, called, set_argument

aten = torch.ops.aten
_READ = ("key", "value")


@dataclass(frozen=True)
class Past:
    """A cache of floats. joined: the past and the new tokens; scale, orders: what its attentions read it through."""

    input: fx.Node
    joined: fx.Node
    new: fx.Node
    output: int
    kind: str
    scale: fx.Node | None
    orders: tuple[int, ...]
    form: CacheFormat

    @property
    def depth(self) -> int:
        """Dimensions of a head."""
        return int((shape(self.joined) or ())[3])


@define_pass(Guarantee.LOSSY)
def quantize_past(editor: Editor, *, recipe: Recipe) -> None:
    """Keep past keys and values as codes where the recipe's `kv` says `storage: codes`."""
    found: dict[fx.Node, list[Past]] = {}
    for node in editor.calls(*ATTENTIONS):
        form = recipe.format_for(module_path(node), "kv")
        if form is None or form.storage != "codes":
            continue
        sides = [_past(editor, node, name, form) for name in _READ]
        reasons = [
            f"its {n}s stay floats: {side}"
            for n, side in zip(_READ, sides, strict=True)
            if isinstance(side, str)
        ]
        if reasons:
            editor.refused(node, "; ".join(reasons))
        else:
            found[node] = [side for side in sides if isinstance(side, Past)]
    _drop_shared(editor, found)
    if found:
        _rewrite(editor, found)


def _past(editor: Editor, attention: fx.Node, name: str, form: CacheFormat) -> Past | str:
    """The cache that an attention reads as its keys or values, or why there is none."""
    x = argument(attention, name)
    orders: tuple[int, ...] = ()
    if is_call(x, hadamard.overload) and not argument(x, "transpose"):
        orders, x = tuple(argument(x, "orders")), argument(x, "x")
    scale: fx.Node | None = None
    if is_call(x, aten.mul.Tensor) and _undone(vector(editor, x.args[1], (shape(x) or (None,))[-1])):
        scale, x = argument(x, "other"), argument(x, "self")
    if isinstance(x, fx.Node) and x.op == "placeholder":
        return f"the input {x.name} is read as it is, and no new tokens are joined to it"
    if not is_call(x, aten.cat.default):
        return f"they come from {called(x)}, not from an input that new tokens are joined to"
    parts, along = argument(x, "tensors"), argument(x, "dim")
    sizes = shape(x) or ()
    held = parts[0] if parts else None
    if not isinstance(held, fx.Node) or held.op != "placeholder":
        later = [part.name for part in parts[1:] if isinstance(part, fx.Node) and part.op == "placeholder"]
        return (
            f"the input {later[0]} is joined behind other tokens" if later else "no input is joined in front"
        )
    if len(parts) != 2:
        return f"{len(parts)} values are joined, not an input and the new tokens"
    if dtype(held) != torch.float32 or dtype(parts[1]) != torch.float32:
        return f"the input {held.name} is {dtype(held)} and the new tokens are {dtype(parts[1])}, not float32"
    if len(sizes) != 4 or int(along) % 4 != 2:
        return (
            f"the input {held.name} {[str(s) for s in sizes]} is joined along dimension {along}: "
            "codes are kept as [batch, heads, tokens, ...]"
        )
    if not isinstance(sizes[1], int) or not isinstance(sizes[3], int):
        return "the number or the size of the heads is not static"
    if form.group and sizes[3] > form.group and sizes[3] % form.group:
        return f"groups of {form.group} do not divide heads of {sizes[3]} dimensions"
    outputs = [i for i, leaf in enumerate(_outputs(editor)) if leaf is x]
    if len(outputs) != 1:
        return f"the joined tokens are returned {len(outputs)} times, not once"
    return Past(held, x, parts[1], outputs[0], name, scale, orders, form)


def _undone(factors: Tensor | None) -> bool:
    """Whether a product with these can be undone."""
    return factors is not None and bool((torch.isfinite(factors) & (factors != 0)).all())


def _outputs(editor: Editor) -> list[Any]:
    output = next(node for node in reversed(editor.graph.nodes) if node.op == "output")
    return list(output.args[0])  # exported programs return a flat sequence


def _drop_shared(editor: Editor, found: dict[fx.Node, list[Past]]) -> None:
    """Leave out attentions whose caches have other readers, until none is left that only some of them could read."""
    while True:
        refused = [(node, reason) for node in found if (reason := _against(found, node)) is not None]
        if not refused:
            return
        for node, reason in refused:
            editor.refused(node, reason)
            del found[node]


def _against(found: Mapping[fx.Node, list[Past]], node: fx.Node) -> str | None:
    for past in found[node]:
        reader = next(
            (user for user in past.input.users if user is not past.joined and not _asks_size(user)), None
        )
        if reader is not None:
            return f"its {past.kind}s stay floats: {called(reader)} reads the input {past.input.name} too"
        same = [other for sides in found.values() for other in sides if other.joined is past.joined]
        if any(other != replace(past, kind=other.kind) for other in same):
            return f"its {past.kind}s stay floats: {past.joined.name} is read in two formats or behind two transforms"
        stranger = _stranger(
            past, {reader for reader, sides in found.items() if past.joined in [s.joined for s in sides]}
        )
        if stranger is not None:
            return f"its {past.kind}s stay floats: {called(stranger)} reads them too"
    return None


def _stranger(past: Past, attentions: set[fx.Node]) -> fx.Node | None:
    """A reader of the joined floats that codes could not serve."""
    waiting = list(past.joined.users)
    while waiting:
        user = waiting.pop()
        if user.op == "output" or user in attentions or _asks_size(user):
            continue
        through = is_call(user, hadamard.overload) if past.orders else False
        if through or (
            past.scale is not None and is_call(user, aten.mul.Tensor) and user.args[1] is past.scale
        ):
            waiting.extend(user.users)
            continue
        return user
    return None


def _asks_size(node: fx.Node) -> bool:
    return is_call(node, aten.sym_size.int) and int(argument(node, "dim")) % 4 != 3


def _rewrite(editor: Editor, found: Mapping[fx.Node, list[Past]]) -> None:
    pasts = list({past.joined: past for sides in found.values() for past in sides}.values())
    examples = _examples(editor, pasts)
    caches = {past.joined: _cache(editor, past) for past in pasts}
    parts: dict[fx.Node, dict[str, Tensor]] = {}
    for past in pasts:
        codes, pairs = caches[past.joined].encode(examples[past.input])
        parts[past.input] = {"codes": codes, "pairs": pairs}
    inputs = split_inputs(editor, parts)
    made: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    floats: dict[fx.Node, fx.Node] = {}
    for past in pasts:
        cache = caches[past.joined]
        made[past.joined] = _join(editor, past, cache, inputs[past.input])
        decoded = (cache.depth, cache.bits, cache.group)
        floats[past.joined] = editor.call(
            dequantize_cache.overload, *made[past.joined], *decoded, like=past.joined
        )
    for node, sides in found.items():
        for name, past in zip(_READ, sides, strict=True):
            set_argument(node, name, floats[past.joined])
    split_outputs(editor, {past.output: made[past.joined] for past in pasts})
    for past in pasts:
        _forget(editor, past, made[past.joined][0], inputs[past.input][0])
    drop_inputs(editor, parts)
    editor.caches = renumbered(editor.caches, list(caches.values()))
    for node, sides in found.items():
        _report(editor, node, sides)


def _examples(editor: Editor, pasts: list[Past]) -> dict[fx.Node, Tensor]:
    flat = editor.program.flatten_inputs(editor.example_args, editor.example_kwargs)
    placeholders = [node for node in editor.graph.nodes if node.op == "placeholder"]
    wanted = {past.input for past in pasts}
    return {node: held for node, held in zip(placeholders, flat, strict=True) if node in wanted}


def _cache(editor: Editor, past: Past) -> CodedCache:
    scale = None if past.scale is None else editor.tensor(past.scale)
    factors = () if scale is None else tuple(scale.flatten().tolist())
    name = past.input.name
    inputs, form = (f"{name}_codes", f"{name}_pairs"), past.form
    group = 0 if form.group and past.depth % form.group else form.group
    return CodedCache(
        name, f"{past.kind}s", inputs, past.output, past.depth, form.bits, group, past.orders, factors
    )


def _join(editor: Editor, past: Past, cache: CodedCache, inputs: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """Codes and pairs of all tokens."""
    at, new = past.joined, past.new
    if past.scale is not None:
        new = editor.call(aten.mul.Tensor, new, past.scale, like=at)
    orders = list(past.orders)
    if cache.group and orders:  # groups are of what the whole head was turned into
        new, orders = editor.call(hadamard.overload, new, orders, False, like=at), []
    both = editor.call(quantize.overload, new, None, cache.bits, orders, cache.group, like=at)
    parts = [editor.call(operator.getitem, both, i, like=at) for i in range(2)]
    codes, pairs = (
        editor.call(aten.cat.default, [old, part], 2, like=at)
        for old, part in zip(inputs, parts, strict=True)
    )
    return codes, pairs


def _forget(editor: Editor, past: Past, codes: fx.Node, input_codes: fx.Node) -> None:
    """Let who asks for sizes ask the codes, and erase the floats."""
    for old, new in ((past.joined, codes), (past.input, input_codes)):
        for user in list(old.users):
            if _asks_size(user):
                user.replace_input_with(old, new)
    waiting = [past.joined]
    while waiting:
        node = waiting.pop()
        waiting.extend(node.users)
        if not node.users:
            editor.erase(node)


def _report(editor: Editor, node: fx.Node, sides: list[Past]) -> None:
    form, names = sides[0].form, [past.input.name for past in sides]
    turned = [f"{past.kind}s turned by a Hadamard transform first" for past in sides if past.orders]
    sizes = [value(past.new) for past in sides]
    facts: dict[str, Any] = {
        "bits": form.bits,
        "group": form.group,
        "inputs": names,
        "head_size": [past.depth for past in sides],
        "heads": [int(size.shape[1]) for size in sizes],
    }
    per = f"group of {form.group} dimensions" if form.group else "head"
    what = f"its caches {' and '.join(names)} are uint{form.bits} codes with pairs per token and {per}, in and out"
    editor.applied(node, ", ".join([what, *turned]), **facts)
