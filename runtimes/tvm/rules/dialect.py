"""The dialect: operators of the op library through its host, and decoding of weights that are not packed.

A library operator is one call of `isofold_op` (host.cc) with its description and the tensors that are there. Decoding
runs once, when the executable is opened, where all of it is constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from tvm import ir, relax, te, tirx

from ....compiler.dialect import OPERATORS, Operator
from ....compiler.dialect.element_formats import element_format, scale_values
from ....compiler.dialect.quantization import LEAST_SCALE, levels
from ....compiler.dialect.quantization_fp8 import LARGEST
from ....compiler.errors import UnsupportedError
from ....compiler.graph import value
from ..builder import Builder, Kernel, dtype_name, fake
from .pointwise import cast, constant
from .reductions import reduced
from .registry import rule

Expr = Any

DECODED = (
    "quantize_dequantize",
    "quantize_dequantize_fp8",
    "dequantize_cache",
    "dequantize_codebook",
    "dequantize_coded",
    "dequantize_outliers",
    "dequantize_weight",
    "linear_grouped",
)
"""Operators that are kernels of TVM; all others are in the op library."""

EXTERN = "isofold_op"


def is_tensor(argument: Any) -> bool:
    """Whether an argument of a torch schema is a tensor (else it is an attribute)."""
    return str(argument.type) in ("Tensor", "Optional[Tensor]")


def describe_attribute(kind: str, given: Any) -> str:
    """An attribute's value in a description (host.cc)."""
    if kind == "float":
        return "f:" + float(given).hex()
    if kind in ("int", "bool"):
        return f"i:{int(given)}"
    if kind == "List[int]":
        return "l:" + ",".join(str(int(v)) for v in given)
    if kind == "str":
        return f"s:{given}"
    raise UnsupportedError("An operator of the dialect has an attribute of a new kind", got=kind)


def description(operator: Operator, arguments: dict[str, Any], outputs: list[bool], place: str) -> str:
    """The line that tells the host which operator, which inputs and outputs, and its attributes.

    place: the node's name, for profiles.
    """
    declared = operator.overload._schema.arguments
    given = "".join("01"[arguments[d.name] is not None] for d in declared if is_tensor(d))
    wanted = "".join("01"[w] for w in outputs)
    attributes = [
        f"{d.name}={describe_attribute(str(d.type), arguments[d.name])}" for d in declared if not is_tensor(d)
    ]
    return " ".join([operator.onnx_name, f"in={given}", f"out={wanted}", *attributes, f"node=s:{place}"])


def call_library(
    b: Builder, node: fx.Node, text: str, tensors: list[Any], fakes: list[Tensor], wanted: list[bool]
) -> list[Any]:
    """Emit a call of the op library; the results that are not wanted are None."""
    types = [b.type_of(f) for f, w in zip(fakes, wanted, strict=True) if w]
    made = b.emit(relax.call_dps_packed(EXTERN, [ir.StringImm(text), *tensors], types), node)
    several = range(len(types)) if len(types) > 1 else []
    parts = [b.emit(relax.TupleGetItem(made, i), node) for i in several] or [made]
    return [parts.pop(0) if w else None for w in wanted]


def _read_results(node: fx.Node, count: int) -> list[bool]:
    """Which results something reads."""
    if any(user.op == "output" for user in node.users):
        return [True] * count
    read = {user.args[1] for user in node.users if len(user.users) > 0}
    return [i in read for i in range(count)]


OPTIONAL_RESULTS = {"norm": (0, 1), "norm_quantize": (0, 1)}
"""Results that the op library leaves out where nothing reads them."""


def _library_rule(operator: Operator) -> Callable[[Builder, fx.Node, dict[str, Any]], Any]:
    declared = operator.overload._schema.arguments

    def lower(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
        inputs = [a[d.name] for d in declared if is_tensor(d) and a[d.name] is not None]
        found = value(node)
        several = isinstance(found, (tuple, list))
        fakes = list(found) if several else [found]
        wrong = [
            f.dtype
            for f in (*fakes, fake(inputs[0]))
            if f.dtype in (torch.float16, torch.bfloat16, torch.float64)
        ]
        if wrong:
            raise UnsupportedError(
                "The op library computes in float32",
                got=str(wrong[0]),
                hint="convert the model with .float()",
            )
        wanted = [True] * len(fakes)
        if operator.name in OPTIONAL_RESULTS:
            read = _read_results(node, len(fakes))
            wanted = [r or i not in OPTIONAL_RESULTS[operator.name] for i, r in enumerate(read)]
            if not any(wanted):
                wanted[-1] = True
        text = description(operator, a, wanted, node.name)
        made = call_library(b, node, text, [b[n] for n in inputs], fakes, wanted)
        return tuple(made) if several else made[0]

    return lower


for _operator in OPERATORS.values():
    if _operator.name not in DECODED:
        rule(_operator.overload)(_library_rule(_operator))


# ---- decoding


def _groups(k: Kernel, tensor: te.Tensor, n: Expr, at: Expr, size: int) -> Expr:
    """A group's value of row n at flat column `at`."""
    return tensor(n, tirx.floordiv(at, size) if size else 0)


@rule(OPERATORS["dequantize_weight"].overload)
def _dequantize_weight(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = dtype_name(fake(node).dtype)
    size = a["group_size"]

    experts = fake(a["scale"]).dim() == 3  # a matrix for each

    def describe(k: Kernel) -> te.Tensor:
        codes, scale = k.tensor(a["codes"]), k.tensor(a["scale"])
        zero = k.tensor(a["zero"]) if a["zero"] is not None else None
        shape = k.shape(node)

        def of_expert(e: Expr, n: Expr, i: Expr) -> Expr:
            group = tirx.floordiv(i, size) if size else 0
            v = codes(e, n, i).astype(dtype)
            if zero is not None:
                v = v - cast(zero(e, n, group), dtype)
            return v * scale(e, n, group)

        if experts:
            return te.compute(shape, of_expert, name="y")

        def element(n: Expr, *i: Expr) -> Expr:
            at: Expr = tirx.IntImm("int64", 0)
            for index, extent in zip(i, shape[1:], strict=True):
                at = at * extent + index
            v = codes(n, *i).astype(dtype)
            if zero is not None:
                v = v - cast(_groups(k, zero, n, at, size), dtype)
            return v * _groups(k, scale, n, at, size)

        return te.compute(shape, element, name="y")

    return b.kernel(node, describe)


@rule(OPERATORS["linear_grouped"].overload)
def _linear_grouped(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    """Weights as they are, for those that no pass could store in panels."""
    dtype, experts = dtype_name(fake(node).dtype), int(fake(a["weight"]).shape[0])

    def describe(k: Kernel) -> te.Tensor:
        x, expert, weight = (k.tensor(a[name]) for name in ("input", "expert", "weight"))
        bias = k.tensor(a["bias"]) if a["bias"] is not None else None
        axis = te.reduce_axis((0, weight.shape[2]), "k")
        shape = k.shape(node)

        def own(s: Expr) -> Expr:
            return tirx.max(tirx.min(expert(s), tirx.IntImm("int64", experts - 1)), tirx.IntImm("int64", 0))

        sums = te.compute(
            shape, lambda s, n: te.sum(x(s, axis) * weight(own(s), n, axis), axis=axis), name="sums"
        )

        def element(s: Expr, n: Expr) -> Expr:
            v = sums(s, n) if bias is None else sums(s, n) + bias(own(s), n)
            return tirx.Select(tirx.EQ(own(s), expert(s)), v, constant(0, dtype))

        return te.compute(shape, element, name="y")

    return b.kernel(node, describe)


@rule(OPERATORS["dequantize_coded"].overload)
def _dequantize_coded(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype, form, size = dtype_name(fake(node).dtype), element_format(a["format"]), a["group_size"]
    real = fake(node).dtype

    def describe(k: Kernel) -> te.Tensor:
        codes, scale, multiplier = k.tensor(a["codes"]), k.tensor(a["scale"]), k.tensor(a["multiplier"])
        if a["table"] is not None and form.name == "table4":
            values = k.tensor(a["table"])
        else:
            values = k.table(form.values().to(real))
        scales = None
        if form.scale != "float":
            every = torch.arange(256, dtype=torch.int64).to(torch.uint8)
            scales = k.table(scale_values(every, form, real))

        def element(n: Expr, i: Expr) -> Expr:
            own = _groups(k, scale, n, i, size)
            own = cast(own, dtype) if scales is None else scales(own.astype("int64"))
            return cast(values(codes(n, i).astype("int64")), dtype) * (own * multiplier())

        return te.compute(k.shape(node), element, name="y")

    return b.kernel(node, describe)


@rule(OPERATORS["dequantize_codebook"].overload)
def _dequantize_codebook(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = dtype_name(fake(node).dtype)
    count, width = (int(fake(a["codebooks"]).shape[d]) for d in (0, 2))

    def describe(k: Kernel) -> te.Tensor:
        codes, books, scale = k.tensor(a["codes"]), k.tensor(a["codebooks"]), k.tensor(a["scale"])

        def element(n: Expr, i: Expr) -> Expr:
            group, place = tirx.floordiv(i, width), tirx.floormod(i, width)
            total: Expr = None
            for m in range(count):
                entry = cast(books(m, codes(n, group, m).astype("int64"), place), dtype)
                total = entry if total is None else total + entry
            return total * cast(scale(n), dtype)

        return te.compute(k.shape(node), element, name="y")

    return b.kernel(node, describe)


@rule(OPERATORS["dequantize_outliers"].overload)
def _dequantize_outliers(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype, size = dtype_name(fake(node).dtype), a["group_size"]
    count = int(fake(a["places"]).shape[1])
    factor = constant(a["multiplier"], dtype)

    def describe(k: Kernel) -> te.Tensor:
        codes, scale = k.tensor(a["codes"]), k.tensor(a["scale"])
        zero = k.tensor(a["zero"]) if a["zero"] is not None else None
        places, values = k.tensor(a["places"]), k.tensor(a["values"])
        shape = k.shape(node)

        def entry(n: Expr, i: Expr, j: Expr) -> Expr:
            there = places(n, j).astype("int64") == i
            return tirx.Select(there, cast(values(n, j), dtype) * factor, constant(0, dtype))

        beside = (
            reduced(k, [*shape, tirx.IntImm("int64", count)], [2], False, entry, shape, te.sum, "beside")
            if count
            else None
        )

        def element(n: Expr, i: Expr) -> Expr:
            v = codes(n, i).astype(dtype)
            if zero is not None:
                v = v - cast(_groups(k, zero, n, i, size), dtype)
            v = v * _groups(k, scale, n, i, size)
            return v if beside is None else v + beside(n, i)

        return te.compute(shape, element, name="y")

    return b.kernel(node, describe)


@rule(OPERATORS["dequantize_cache"].overload)
def _dequantize_cache(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype, bits = dtype_name(fake(node).dtype), a["bits"]

    def describe(k: Kernel) -> te.Tensor:
        codes, params = k.tensor(a["codes"]), k.tensor(a["params"])

        def element(*i: Expr) -> Expr:
            *lead, d = i
            if bits == 8:
                u = codes(*lead, d)
            else:  # blocks of 32: the low nibbles of 16 bytes, then the high ones (`cache_packing`)
                block, inside = tirx.floordiv(d, 32), tirx.floormod(d, 32)
                byte = codes(*lead, block * 16 + tirx.floormod(inside, 16)).astype("int32")
                u = tirx.Select(inside < 16, byte & 15, byte >> 4)
            pair = 2 * tirx.floordiv(d, a["group"]) if a["group"] else tirx.IntImm("int64", 0)
            return params(*lead, pair) * (u.astype(dtype) - params(*lead, pair + 1))

        return te.compute(k.shape(node), element, name="y")

    return b.kernel(node, describe)


@rule(OPERATORS["quantize_dequantize"].overload)
def _quantize_dequantize(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source, dtype = a["x"], dtype_name(fake(node).dtype)
    rank = fake(source).dim()
    dims = [rank - 1] if a["granularity"] == "token" else list(range(1, rank))
    largest, zero, one = constant(levels(a["bits"]), dtype), constant(0, dtype), constant(1, dtype)

    def describe(k: Kernel) -> te.Tensor:
        x, shape = k.tensor(source), k.shape(source)
        if a["params"] is not None:
            pair = k.tensor(a["params"])
            scale = lambda i: cast(pair(0), dtype)  # noqa: E731
            point = lambda i: cast(pair(1), dtype)  # noqa: E731
        else:
            kept = [tirx.IntImm("int64", 1) if d in dims else s for d, s in enumerate(shape)]
            low = reduced(k, shape, dims, True, lambda *i: x(*i), kept, te.min, "low")
            high = reduced(k, shape, dims, True, lambda *i: x(*i), kept, te.max, "high")

            def width(*i: Expr) -> Expr:
                v = (tirx.max(high(*i), zero) - tirx.min(low(*i), zero)) / largest
                return tirx.Select(v >= tirx.const(LEAST_SCALE, dtype), v, one)

            steps = te.compute(kept, width, name="scale")

            def middle(*i: Expr) -> Expr:
                v = tirx.nearbyint((zero - tirx.min(low(*i), zero)) / steps(*i))
                return tirx.min(tirx.max(v, zero), largest)

            points = te.compute(kept, middle, name="zero")
            scale = lambda i: steps(*(0 if d in dims else at for d, at in enumerate(i)))  # noqa: E731
            point = lambda i: points(*(0 if d in dims else at for d, at in enumerate(i)))  # noqa: E731

        def element(*i: Expr) -> Expr:
            code = tirx.nearbyint(x(*i) * (one / scale(i))) + point(i)
            return scale(i) * (tirx.min(tirx.max(code, zero), largest) - point(i))

        return te.compute(shape, element, name="y")

    return b.kernel(node, describe)


@rule(OPERATORS["quantize_dequantize_fp8"].overload)
def _quantize_dequantize_fp8(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    """To whole steps: an eighth of the value's power of two, which is its exponent's bits, from 2^-6 on."""
    source, dtype = a["x"], dtype_name(fake(node).dtype)
    if dtype != "float32":
        raise UnsupportedError(
            "FP8 activations are rounded from float32", got=dtype, hint="convert the model with .float()"
        )
    last = fake(source).dim() - 1
    one, least, largest = (constant(v, dtype) for v in (1.0, LEAST_SCALE, LARGEST))

    def describe(k: Kernel) -> te.Tensor:
        x, shape = k.tensor(source), k.shape(source)
        if a["params"] is not None:
            held = k.tensor(a["params"])
            scale = lambda i: held(0)  # noqa: E731
        else:
            kept = [tirx.IntImm("int64", 1) if d == last else s for d, s in enumerate(shape)]
            top = reduced(k, shape, [last], True, lambda *i: tirx.abs(x(*i)), kept, te.max, "top")

            def width(*i: Expr) -> Expr:
                v = top(*i) / largest
                return tirx.Select(v < least, one, v)

            steps = te.compute(kept, width, name="scale")
            scale = lambda i: steps(*(0 if d == last else at for d, at in enumerate(i)))  # noqa: E731

        def element(*i: Expr) -> Expr:
            y = x(*i) * (one / scale(i))
            y = tirx.min(tirx.max(y, constant(-LARGEST, dtype)), largest)
            power = tirx.reinterpret("int32", tirx.max(tirx.abs(y), constant(2.0**-6, dtype))) & tirx.IntImm(
                "int32", 0x7F800000
            )
            step = tirx.reinterpret("float32", power) * constant(0.125, dtype)
            return tirx.Select(tirx.isnan(x(*i)), x(*i), tirx.nearbyint(y / step) * step) * scale(i)

        return te.compute(shape, element, name="y")

    return b.kernel(node, describe)
