"""An activation quantizer and the one linear that reads its codes become one operator.

    linear_packed(quantize_activation(x, ...), weight, ...) → quantize_linear_packed(x, ..., weight, ...)

Kernels then keep the codes in their own scratch memory, and a runtime starts one node less. That is worth most where
a linear has few rows: after a layer's weights have streamed through the caches, all that a runtime holds about the next
node has to come back from memory.

Side conditions: that linear is the only reader of the codes and of their pairs. A quantizer with more readers (queries,
keys and values that did not become one linear) stays, as each reader would quantize anew; so does one whose codes the
program returns. This runs after the fusions that make readers fewer or put the quantizer into the norm before it.

Exactness: BITWISE; the operator is the composition of the two.
"""

from __future__ import annotations

import operator

from torch import fx

from ..compiler.canonicalize.match import is_call
from ..compiler.dialect import linear_packed, quantize_activation, quantize_linear_packed
from ..compiler.editor import Editor
from ..compiler.passes import Guarantee, define_pass
from .packed_rows import arguments

_RENAMED = {"shift": "pre_shift", "scale": "pre_scale", "bits": "input_bits"}
"""Arguments of the quantizer whose names the linear has for its own."""


@define_pass(Guarantee.BITWISE)
def fuse_quantizers(editor: Editor) -> None:
    """See the module."""
    for quantizer in editor.calls(quantize_activation.overload):
        reader = _only_reader(quantizer)
        if isinstance(reader, str):
            editor.refused(quantizer, reader)
            continue
        given = arguments(reader)
        given |= {_RENAMED.get(name, name): held for name, held in arguments(quantizer).items()}
        names = [declared.name for declared in quantize_linear_packed.overload._schema.arguments]
        new = editor.call(quantize_linear_packed.overload, *(given[name] for name in names), like=reader)
        editor.applied(new, "quantizer in the linear that reads its codes")
        editor.replace(reader, new)


def _only_reader(quantizer: fx.Node) -> fx.Node | str:
    """The linear that alone reads the quantizer's codes and pairs, or why there is none."""
    readers = list(dict.fromkeys(user for part in quantizer.users for user in part.users))
    if len(readers) != 1:
        return f"{len(readers)} operators read its codes, and each would have to quantize"
    reader = readers[0]
    if not is_call(reader, linear_packed.overload):
        if reader.op == "output":
            return "the program returns its codes"
        return f"{reader.name} ({reader.target}) reads its codes, and has no form with a quantizer inside"
    given = arguments(reader)
    parts = [given["u"], given["params"]]
    if [(part.target, part.args) for part in parts] != [(operator.getitem, (quantizer, i)) for i in (0, 1)]:
        return f"{reader.name} reads its codes with other pairs, or its pairs with other codes"
    return reader
