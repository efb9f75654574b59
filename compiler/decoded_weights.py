"""The float32 matrix that a packed operator computes with, decoded from its packed bytes.

The decoders are those of the layouts (`dialect/*packing*.py`), so the result is what the artefact holds, not what a
quantizer meant to write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .dialect.dense_packing import unpack_dense
from .dialect.linear_packed import packed_rows
from .dialect.operator import operator_of
from .dialect.outlier_packing import unpack_outliers
from .dialect.packing import dequantize, split_gated, unpack_embedding_codes, unpack_groups, unpack_weight
from .dialect.packing_codebook import unpack_codebook
from .dialect.packing_coded import unpack_coded
from .dialect.sparse_packing import unpack_sparse
from .graph import argument
from .program import Program


def decoded(program: Program, node: fx.Node) -> Tensor:
    """The matrix `[rows, K]` that a packed operator multiplies by or looks up, without padding.

    Of a gated operator the rows of the gate come first; the matrices of several experts are one above the other.
    """
    declared = operator_of(node.target)
    assert declared is not None, f"{node} is no packed operator"
    call = _Call(program, node)
    matrix = _DECODERS.get(declared.name, _integers)(call)
    return torch.cat(split_gated(matrix, call["n"])) if call.is_gated else matrix


@dataclass(frozen=True)
class _Call:
    """The arguments of a packed operator by name: numbers, and the tensors of constants."""

    program: Program
    node: fx.Node

    def __getitem__(self, name: str) -> Any:
        read = argument(self.node, name)
        is_constant = isinstance(read, fx.Node) and read.op == "get_attr"
        return self.program.tensors[str(read.target)] if is_constant else read

    def all(self, *names: str) -> tuple[Any, ...]:
        return tuple(self[name] for name in names)

    @property
    def is_gated(self) -> bool:
        assert isinstance(self.node.target, torch._ops.OpOverload)
        return any(a.name == "gated" for a in self.node.target._schema.arguments) and bool(self["gated"])

    @property
    def rows(self) -> int:
        """Rows of the stored matrix without the padding of the last panel."""
        return packed_rows(self["n"], self.is_gated)


def _integers(call: _Call) -> Tensor:
    weight, scale, zero = call.all("weight", "scale", "zero")
    k, bits, group_size, multiplier = call.all("k", "bits", "group_size", "scale_multiplier")
    return unpack_weight(weight, scale, zero, call.rows, k, bits, group_size, multiplier, torch.float32)


def _outliers(call: _Call) -> Tensor:
    places, values, offsets, k, multiplier = call.all(
        "places", "values", "offsets", "k", "outlier_multiplier"
    )
    return _integers(call) + unpack_outliers(places, values, offsets, call.rows, k, multiplier, torch.float32)


def _coded(call: _Call, table: Tensor | None = None) -> Tensor:
    weight, scale = call.all("weight", "scale")
    k, form, group_size, multiplier = call.all("k", "format", "group_size", "scale_multiplier")
    return unpack_coded(weight, scale, table, call.rows, k, form, group_size, multiplier, torch.float32)


def _codebooks(call: _Call) -> Tensor:
    weight, codebooks, scale = call.all("weight", "codebooks", "scale")
    return unpack_codebook(weight, codebooks, scale, call.rows, call["k"], torch.float32)


def _sparse_floats(call: _Call, bits: int = 8) -> Tensor:
    layout, places, values, offsets = call.all("layout", "places", "values", "offsets")
    return unpack_sparse(layout, places, values, offsets, call.rows, call["k"], bits).float()


def _sparse_integers(call: _Call) -> Tensor:
    k, group_size = call.all("k", "group_size")
    scale = unpack_groups(call["scale"], call.rows, k, group_size).float() * call["scale_multiplier"]
    return dequantize(_sparse_floats(call, call["bits"]), scale, None, group_size)


def _experts(call: _Call) -> Tensor:
    weight, scale, zero = call.all("weight", "scale", "zero")
    n, k, bits, group_size, multiplier = call.all("n", "k", "bits", "group_size", "scale_multiplier")
    zeros = [None] * len(weight) if zero is None else zero
    each = zip(weight, scale, zeros, strict=True)
    return torch.cat(
        [unpack_weight(w, s, z, n, k, bits, group_size, multiplier, torch.float32) for w, s, z in each]
    )


def _embedding(call: _Call) -> Tensor:
    codes = unpack_embedding_codes(call["weight"], call["dim"], call["bits"])
    return dequantize(codes, call["scale"].float(), call["zero"], call["group_size"])


def _convolution(call: _Call) -> Tensor:
    weight, scale = call.all("weight", "scale")
    return unpack_weight(weight, scale, None, call["n"], weight.shape[1] * 4, 8, 0, 1.0, torch.float32)


_DECODERS: dict[str, Callable[[_Call], Tensor]] = {
    "conv_packed": _convolution,
    "embedding_packed": _embedding,
    "linear_codebook": _codebooks,
    "linear_coded": lambda call: _coded(call, call["table"]),
    "linear_dense": lambda call: unpack_dense(call["weight"], call.rows),
    "linear_fp8": _coded,
    "linear_grouped_dense": lambda call: torch.cat([unpack_dense(p, call["n"]) for p in call["weight"]]),
    "linear_grouped_packed": _experts,
    "linear_grouped_packed_float": _experts,
    "linear_outliers": _outliers,
    "linear_outliers_float": _outliers,
    "linear_sparse": _sparse_integers,
    "linear_sparse_float": _sparse_floats,
}
"""By the operator's name; others hold integers, as `linear_packed` does."""
