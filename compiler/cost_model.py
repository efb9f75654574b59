"""What a linear costs on a machine: predicted from its bytes and elements, with rates that were measured once.

    seconds = overhead + max(weight bytes / bandwidth(working set), elements * pace(kind, rows))

The working set is the bytes of weights that one run of the model reads: a model that fits a cache reads at the cache's
bandwidth. The pace is seconds for one weight and all rows with weights in the cache, so decoding, dot products and
epilogue are in it; it is measured for each *kind*, an operator with its format, by running it (`machine.py`), because
instruction counts from a manual are wrong where decoders meet real pipelines. Between measured points both
curves are straight in the logarithm.

What is left out: memory and arithmetic overlap only in part on one core, so that a kind whose two terms are
close takes up to a third longer; and other users of a shared machine.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import optimization_hint

from .dialect.operator import OPERATORS, Operator, operator_of
from .errors import InputError
from .graph import argument, value

FLOAT_LINEAR = "float32"
"""Kind of a linear that stays in float32 and runs as the runtime's own matrix multiplication."""
MARGIN = 1.1
"""Predicted times closer than this are taken as equal."""

_SAME = {
    "quantize_linear_packed": "linear_packed",
    "linear_outliers": "linear_packed",
    "linear_outliers_float": "linear_packed_float",
}
"""Operators that share their paces: a quantizer inside, or a percent of outliers, costs little beside the linear."""

_LIKE = {
    "table4": "nf4",
    "nvfp4": "mxfp4",
    "e5m2": "e4m3",
    "mxfp8_e4m3": "e4m3",
    "mxfp8_e5m2": "e4m3",
}
"""Formats of codes → one that kernels decode alike, whose pace serves where their own was not measured."""

_LIKE_OPERATOR = {"linear_fp8": "linear_coded"}
"""The same for operators: FP8 activations become floats first, and are few beside the weights."""

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Work:
    """One linear or convolution on given inputs. elements: entries of its matrix; weight_bytes: as stored."""

    kind: str
    rows: int
    elements: int
    weight_bytes: int


@dataclass(frozen=True)
class Prediction:
    """Seconds, and what they are spent on most: `memory`, `arithmetic` or `overhead`."""

    seconds: float
    limit: str


@dataclass(frozen=True)
class Machine:
    """Rates of one machine with one number of threads.

    bandwidth: (bytes of the working set, bytes a second). paces: kind → (rows, seconds an element for all of them).
    overhead: seconds of a node that does nothing. sparse: `layout value` → (rows, share of weights that are not zero,
    seconds a weight for all rows). All with the threads together.
    """

    name: str
    threads: int
    overhead: float
    bandwidth: Curve
    paces: Mapping[str, Curve]
    sparse: Mapping[str, list[tuple[float, float, float]]] = field(default_factory=dict)

    def predict(self, work: Work, working_set: float) -> Prediction | None:
        """None where neither the kind nor one that is computed alike was measured."""
        curve = self.pace_of(work.kind)
        if curve is None or work.rows < 1:
            return None
        memory = work.weight_bytes / _at(self.bandwidth, max(working_set, work.weight_bytes))
        pace = _at(curve, work.rows)
        most = curve[-1][0]
        if work.rows > most:  # a tile more takes as long as the one before
            pace *= work.rows / most
        parts = {"memory": memory, "arithmetic": work.elements * pace, "overhead": self.overhead}
        limit = max(parts, key=lambda name: parts[name])
        return Prediction(self.overhead + max(memory, parts["arithmetic"]), limit)

    def pace_of(self, kind: str) -> Curve | None:
        """The pace of a kind, or of the nearest that was measured: of the same codes with scales by rows or groups, or
        of codes that are decoded alike."""
        grouped = kind.endswith(" in groups")
        name = kind.removesuffix(" in groups")
        operator, _, codes = name.partition(" ")
        operators = [operator, *([_LIKE_OPERATOR[operator]] if operator in _LIKE_OPERATOR else [])]
        names = [f"{o} {c}" for o in operators for c in (codes, _LIKE.get(codes)) if c] if codes else [name]
        spelled = [f"{n}{' in groups' if g else ''}" for n in names for g in (grouped, not grouped)]
        return next((self.paces[s] for s in spelled if s in self.paces), None)

    def to_json(self) -> dict[str, Any]:
        """A mapping that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Machine:
        """The inverse of `to_json`. Raises InputError."""
        try:
            return cls(
                name=str(data["name"]),
                threads=int(data["threads"]),
                overhead=float(data["overhead"]),
                bandwidth=[(float(a), float(b)) for a, b in data["bandwidth"]],
                paces={
                    str(kind): [(float(a), float(b)) for a, b in points]
                    for kind, points in data["paces"].items()
                },
                sparse={
                    str(form): [(float(a), float(b), float(c)) for a, b, c in points]
                    for form, points in data.get("sparse", {}).items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError("This is not the description of a machine", got=repr(error)) from error


def _at(curve: Curve, x: float) -> float:
    """The curve at x, straight in the logarithms between its points and flat outside."""
    places = [point[0] for point in curve]
    i = bisect.bisect_left(places, x)
    if i == 0 or i == len(curve):
        return curve[min(i, len(curve) - 1)][1]
    (x0, y0), (x1, y1) = curve[i - 1], curve[i]
    t = (math.log(x) - math.log(x0)) / (math.log(x1) - math.log(x0))
    return math.exp((1 - t) * math.log(y0) + t * math.log(y1))


def kind_of(node: fx.Node) -> str | None:
    """The kind of a linear or convolution: operator and format, such as `linear_packed 4 bits in groups`."""
    if node.target is torch.ops.aten.linear.default:
        return FLOAT_LINEAR
    declared = operator_of(node.target) if node.op == "call_function" else None
    if declared is None or "n" not in _arguments(declared):
        return None
    words = [_SAME.get(declared.name, declared.name)]
    for name in ("format", "bits"):
        given = argument(node, name) if name in _arguments(declared) else None
        if given is not None:
            words.append(str(given) if name == "format" else f"{given} bits")
    if "group_size" in _arguments(declared) and argument(node, "group_size"):
        words.append("in groups")
    return " ".join(words)


def work_of(node: fx.Node) -> Work | None:
    """The work of a node on the program's example inputs, None for what is neither linear nor convolution.

    A size that depends on the data (the rows that a router sends to an expert) counts as 1: weights are read for it
    once, however many rows there are.
    """
    kind, made = kind_of(node), _sized(value(node))
    if kind is None or not isinstance(made, Tensor):
        return None
    if kind == FLOAT_LINEAR:
        weight = value(argument(node, "weight"))
        elements = int(weight.numel())
        rows = int(made.numel()) // max(int(weight.shape[0]), 1)
        return Work(kind, rows, elements, elements * weight.element_size())
    declared = operator_of(node.target)
    assert declared is not None
    cost = declared.cost(*(_fake(argument(node, name)) for name in _arguments(declared)))
    rows = int(made.numel()) // int(argument(node, "n"))
    return Work(kind, rows, cost.operations // max(2 * rows, 1), cost.weight_bytes)


def thin_works(node: fx.Node) -> list[Work]:
    """The two products of a part of low rank, `(x A^T) B^T`, that a linear takes as its residual."""
    declared = operator_of(node.target) if node.op == "call_function" else None
    if declared is None or "residual" not in _arguments(declared):
        return []
    product = argument(node, "residual")
    if not isinstance(product, fx.Node) or product.target is not torch.ops.aten.matmul.default:
        return []
    narrow, matrix = product.args
    made = _sized(value(product))
    if not isinstance(matrix, fx.Node) or matrix.op != "get_attr" or not isinstance(made, Tensor):
        return []
    first = work_of(narrow) if isinstance(narrow, fx.Node) else None
    if first is None:
        return []
    held = value(matrix)
    rows = int(made.numel()) // max(int(held.shape[-1]), 1)
    return [Work(FLOAT_LINEAR, rows, int(held.numel()), int(held.numel()) * held.element_size()), first]


def _arguments(declared: Operator) -> list[str]:
    return [a.name for a in declared.overload._schema.arguments]


def _fake(given: Any) -> Any:
    return _sized(value(given)) if isinstance(given, fx.Node) else given


def _sized(made: Any) -> Any:
    """A fake tensor of symbolic sizes as one of the example's."""
    if not isinstance(made, Tensor):
        return made
    return torch.empty([optimization_hint(size, 1) for size in made.shape], dtype=made.dtype, device="meta")


def working_set(graph: fx.Graph) -> int:
    """Bytes of the weights that one run reads in linears and convolutions."""
    works = (work_of(node) for node in graph.nodes)
    return sum(work.weight_bytes for work in works if work is not None)


def dense_alternatives(work: Work) -> dict[str, Work]:
    """The same matrix as dense int8 and int4 with the same kind of activations, by name, its own format left out.

    int4 (groups of 32) is compared only with what needs no more bytes than it does.
    """
    declared = OPERATORS.get(work.kind.split()[0])
    if declared is None:
        return {}
    operator = "linear_packed" if "params" in _arguments(declared) else "linear_packed_float"
    found = {
        "int8": Work(f"{operator} 8 bits", work.rows, work.elements, work.elements),
        "int4": Work(f"{operator} 4 bits in groups", work.rows, work.elements, work.elements * 9 // 16),
    }
    if work.weight_bytes > found["int4"].weight_bytes * MARGIN:
        del found["int4"]
    return {name: other for name, other in found.items() if other.kind != work.kind}
