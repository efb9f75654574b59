"""How far what a runtime computes is from what the program computes: whole results, and single operators.

The results of a whole network with quantized activations cannot be compared sharply: a sum in another order moves a
value across the rounding boundary of the next quantizer, and the difference grows from layer to layer. Then every
dialect operator is compared alone, on what it got in the program's own run (teacher forcing): float results differ by
rounding, codes by at most one step in few places. A runtime says how it runs itself and how it runs one operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from .dialect import (
    linear_packed,
    operator_of,
    packing,
    quantize_activation,
    quantize_activation_fp8,
    quantize_cache,
    quantize_linear_packed,
)
from .dialect.cache_packing import cut, pair_count, unpack_cache_codes
from .dialect.quantization import levels
from .errors import IsofoldError, VerificationError
from .graph import argument, value
from .interface import input_names
from .program import Program

_EXACT, _ROUNDED = 1e-3, 0.2
"""Largest relative difference to the program: float arithmetic in another order; roundings that fall the other way."""

_OPERATOR, _SHARE = 1e-4, 0.01
"""What one operator on the program's own inputs may differ by: of its norm, and the share of codes off by one step."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """One result of one operator.

    error: norm of the difference over norm (of codes: over their parameters' scales).
    steps, differing, codes: of codes, the largest difference in steps of the quantizer, how many differ at all, and
    how many there are.
    step: of a result computed from codes inside the operator that may differ, the error when all of them are off by
    one step, up or down at random. Where a share p of them is, expect sqrt(p) of it.
    """

    node: str
    op: str
    error: float
    steps: int = 0
    differing: int = 0
    codes: int = 0
    step: float = 0.0


def _plain(result: Any) -> np.ndarray:
    """A result as an array; a weight that is returned wants a gradient, which no array has."""
    return np.asarray(result.detach() if isinstance(result, torch.Tensor) else result)


def check_results(
    program: Program,
    where: str,
    run: Callable[[Arrays], Sequence[np.ndarray]],
    operators: Callable[[], list[Difference]],
) -> dict[str, Any]:
    """Largest relative difference between the results of `run` and the program's on the example inputs.

    run: from inputs by name (`input_names`) to all results, in order. operators: the differences of single operators;
    asked for only where roundings may explain a difference. Raises VerificationError where nothing explains it.
    """
    flat = program.flatten_inputs(program.example_args, program.example_kwargs)
    tensors = [v for v in flat if isinstance(v, torch.Tensor)]
    feed = {n: t.detach().cpu().numpy() for n, t in zip(input_names(program), tensors, strict=True)}
    try:
        got = run(feed)
    except IsofoldError:
        raise
    except Exception as failure:
        raise VerificationError(
            "The exported file fails on the example inputs",
            where=where,
            got=f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}",
            hint="this is a defect of isofold's lowering; please report it with the model",
        ) from failure
    with torch.no_grad():
        leaves = pytree.tree_leaves(program(*program.example_args, **program.example_kwargs))
    nodes = pytree.tree_leaves(program.output_node.args[0], is_leaf=lambda v: v is None)
    want = [leaf for leaf, node in zip(leaves, nodes, strict=True) if isinstance(node, fx.Node)]
    error = relative_difference([_plain(w) for w in want], got)
    rounds = rounds_activations(program)
    bound = _ROUNDED if rounds else _EXACT
    facts: dict[str, Any] = {"error": error, "bound": bound}
    if not error <= bound and rounds and math.isfinite(error):
        # Few bits amplify a rounding that falls the other way: then each operator has to agree by itself.
        facts["operators"] = check_operators(where, operators())
    elif not error <= bound:
        raise VerificationError(
            "The exported file does not compute what the program computes",
            where=where,
            expected=f"a relative difference of at most {bound:g}",
            got=f"{error:.3g}",
            hint="this is a defect of isofold's lowering; please report it with the model",
        )
    return facts


def check_operators(where: str, found: list[Difference]) -> dict[str, Any]:
    """The largest of these differences. Raises VerificationError that lists those which rounding does not explain."""
    wrong = [d for d in found if not d.error <= _bound(d) and not _few_flips(d)]
    if wrong or not found:
        raise VerificationError(
            "The exported file does not compute what the program computes",
            where="; ".join(f"{d.node} ({d.op})" for d in wrong[:5]) or where,
            expected=f"each operator within {_OPERATOR:g}, codes within one step in at most {_SHARE:.1%}",
            got="; ".join(
                f"{d.error:.3g}, {d.differing} of {d.codes} codes by up to {d.steps}" for d in wrong[:5]
            )
            or "no operators",
            hint="this is a defect of isofold's lowering; please report it with the model",
        )
    return {
        "compared": len(found),
        "error": max(d.error for d in found),
        "steps": max(d.steps for d in found),
        "differing": sum(d.differing for d in found),
        "codes": sum(d.codes for d in found),
    }


def _bound(difference: Difference) -> float:
    """Largest error of one operator: codes inside it may differ like those that are results."""
    return max(_OPERATOR, math.sqrt(_SHARE) * difference.step)


def _few_flips(difference: Difference) -> bool:
    """Whether codes differ by one step in a few places (one or two of a small tensor are a large share)."""
    return difference.steps <= 1 and 0 < difference.differing <= max(2, _SHARE * difference.codes)


def rounds_activations(program: Program) -> bool:
    """Whether the program quantizes activations, so that a different last bit may become a different code: by operators
    of the dialect, or written out with `aten.round`."""
    if program.graph.find_nodes(op="call_function", target=torch.ops.aten.round.default):
        return True
    quantizers = {
        "quantize_activation",
        "quantize_activation_fp8",
        "quantize_linear_packed",
        "norm_quantize",
        "conv_packed",
        "quantize_dequantize",
        "quantize_dequantize_fp8",
        "quantize_cache",
    }
    declared = (operator_of(node.target) for node in program.graph.nodes if node.op == "call_function")
    return any(operator is not None and operator.name in quantizers for operator in declared)


def relative_difference(want: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> float:
    """Largest difference over the largest magnitude, over all results; inf for other shapes or non-finite values."""
    worst = 0.0
    for expected, found in zip(want, got, strict=True):
        if expected.shape != found.shape:
            return math.inf
        if not expected.size:
            continue
        a, b = expected.astype(np.float64), found.astype(np.float64)
        finite = np.isfinite(a)
        if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(
            a[~finite], b[~finite], equal_nan=True
        ):
            return math.inf
        if finite.any():
            scale = max(float(np.abs(a[finite]).max()), 1e-30)
            worst = max(worst, float(np.abs(a[finite] - b[finite]).max()) / scale)
    return worst


def hides_codes(node: fx.Node) -> bool:
    """Whether another order of sums inside the operator may move codes that are no result."""
    return node.target == quantize_linear_packed.overload and bool(argument(node, "hadamard"))


def step_of(node: fx.Node, values: Mapping[fx.Node, Any]) -> float:
    """`Difference.step` of a linear with its quantizer inside."""
    declared = [a.name for a in quantize_linear_packed.overload._schema.arguments]
    given = {name: argument(node, name) for name in declared}
    given = {name: values[held] if isinstance(held, fx.Node) else held for name, held in given.items()}
    rounding = [given[name] for name in ("pre_shift", "pre_scale", "input_bits", "hadamard")]
    align = packing.alignment(given["group_size"])
    u, pair = quantize_activation.reference(given["x"], given["params"], align, *rounding)
    random = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(0, 2, u.shape, generator=random) - 1
    moved = (u.int() + signs).clamp(0, int(levels(given["input_bits"]))).to(torch.uint8)
    rest = [given[name] for name in declared[declared.index("weight") : declared.index("input_bits")]]
    return _relative(array_of(linear_packed.reference(moved, pair, *rest)), array_of(values[node]))


def plain_codes(
    node: fx.Node, pairs: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """Results of an operator (got, expected), codes of a cache a byte each and by groups, codes of FP8 in the order of
    their values, for `compare_results`."""
    if node.target == quantize_activation_fp8.overload:
        codes, scales = pairs
        ordered = [np.where(c >= 128, 255 - c.astype(np.int64), 127 + c.astype(np.int64)) for c in codes]
        zero = [np.stack([s, np.zeros_like(s)], -1)[..., 0, :] for s in scales]
        return [(ordered[0].astype(np.uint8), ordered[1].astype(np.uint8)), (zero[0], zero[1])]
    if node.target != quantize_cache.overload or any(a.shape != b.shape for a, b in pairs):
        return pairs
    depth, bits = int(value(argument(node, "x")).shape[-1]), int(argument(node, "bits"))
    count = pair_count(depth, int(argument(node, "group")))

    def codes_of(packed: np.ndarray) -> np.ndarray:
        return array_of(unpack_cache_codes(cut(torch.from_numpy(packed), count), depth // count, bits))

    codes, params = pairs
    by_group = [p.reshape(*p.shape[:-1], count, 2) for p in params]
    return [(codes_of(codes[0]), codes_of(codes[1])), (by_group[0], by_group[1])]


def share_of_codes(differences: Sequence[Difference]) -> float:
    """Share of all codes that differ; of one small tensor's codes a single one may be a percent."""
    return sum(d.differing for d in differences) / max(sum(d.codes for d in differences), 1)


def array_of(tensor: Any) -> np.ndarray:
    assert isinstance(tensor, torch.Tensor)
    array: np.ndarray = np.ascontiguousarray(tensor.detach().cpu().numpy())
    return array if tensor.dim() else array.reshape(())


def compare_results(node: str, op: str, results: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Difference]:
    """Differences of one node's results (got, expected); codes are read with the parameters that follow them."""
    found: list[Difference] = []
    index = 0
    while index < len(results):
        got, expected = results[index]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            found.append(Difference(node, op, float("inf"), 255, got.size, got.size))
        elif expected.dtype == np.uint8:
            index += 1
            found.append(_codes(node, op, (got, expected), results[index]))
        else:
            found.append(Difference(node, op, _relative(got, expected)))
        index += 1
    return found


def _codes(
    node: str, op: str, codes: tuple[np.ndarray, np.ndarray], params: tuple[np.ndarray, np.ndarray]
) -> Difference:
    """Codes count from their zero points: a zero point that rounds the other way takes its codes with it."""
    got, expected = (
        u.astype(np.int64) - p[..., 1:].astype(np.int64) for u, p in zip(codes, params, strict=True)
    )
    away = np.abs(got - expected)
    error = _relative(params[0][..., 0], params[1][..., 0])
    return Difference(node, op, error, int(away.max(initial=0)), int(np.count_nonzero(away)), away.size)


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over norm; infinite where one side alone is not finite."""
    a, b = got.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    return float(np.linalg.norm(a[finite] - b[finite]) / max(float(np.linalg.norm(b[finite])), 1e-30))
