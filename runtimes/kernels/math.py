"""Elementary functions as TIR expressions over float32 vectors of any number of lanes.

LLVM turns a vector `exp` into one libm call per lane, so every transcendental a kernel needs is a
polynomial here. Each function takes and returns a TIR expression; the number of lanes is that of its
argument. A value used more than once is bound with `let`: an expression tree would otherwise repeat the
whole subtree at every use.

- `exp`: argument reduction by ln 2 in two parts, degree 6 (coefficients of Cephes' `expf`), 2 ulp;
  exactly 0 below -87.33 (so -inf gives 0), saturated above 88.37.
- `softmax_weight`: 2**(x log2 e), degree 5, for x <= 0 only.
- `gelu`: exact form `x * Phi(x)`; (Phi(x) - 1/2) / x is even, and a polynomial of degree 14 in x**2 (moved to
  -1..1, where its coefficients are small) up to |x| = 5.4: 4e-7 absolute below 1, relative above. No `exp`:
  half the instructions, and it is the epilogue of every feed-forward block.
- `gelu_tanh`, `silu`: x * sigmoid(.).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from .codegen import T, bind

Expr = Any  # TIR expressions have no common public base class in tvm 0.27

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
"""Activation names in the order of their integer codes in the kernels' C interface."""

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_EXP2 = (0.0013276468962430954, 0.009675540961325169, 0.05550713464617729, 0.24022120237350464,
         0.6931469440460205, 1.0)  # fmt: skip
_GELU = (0.0003156370366923511, -0.0009620148921385407, 0.0010992914903908968, -0.0013732975348830223,
         0.003408040851354599, -0.00651519326493144, 0.009786759503185749, -0.014064830727875233,
         0.019608788192272186, -0.025721829384565353, 0.03212103247642517, -0.03920932486653328,
         0.04849940165877342, -0.06532798707485199, 0.13092811405658722)  # fmt: skip
_GELU_END = 5.4  # |x| beyond which Phi is 0 or 1 to 1.8e-7 / |x|


def lanes_of(x: Expr) -> int:
    """Number of lanes of a TIR expression (1 for a scalar)."""
    dtype = str(x.ty.dtype)
    return int(dtype.rpartition("x")[2]) if "x" in dtype else 1


def splat(value: float, like: Expr) -> Expr:
    """The float32 constant `value` in as many lanes as `like` has."""
    lanes = lanes_of(like)
    return T.float32(value) if lanes == 1 else T.broadcast(T.float32(value), lanes)


def let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """`body(v)` with v bound to `value`, computed once."""
    var = tirx.Var("v", str(value.ty.dtype))
    return tirx.Let(var, value, body(var))


def polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Horner's rule with fused multiply-adds, highest power first."""
    result = splat(coefficients[0], x)
    for coefficient in coefficients[1:]:
        result = T.fma(result, x, splat(coefficient, x))
    return result


def round_half_even(x: Expr) -> Expr:
    """Round to the nearest integer, ties to even (the default rounding mode of the machine)."""
    return T.nearbyint(x)


def _power_of_two(n: Expr) -> Expr:
    """2**n for integer-valued float n in -126..127, built in the exponent field."""
    lanes = lanes_of(n)
    suffix = "" if lanes == 1 else f"x{lanes}"
    bias, shift = (T.int32(127), T.int32(23)) if lanes == 1 else (
        T.broadcast(T.int32(127), lanes), T.broadcast(T.int32(23), lanes))  # fmt: skip
    return T.reinterpret("float32" + suffix, T.shift_left(T.cast(n, "int32" + suffix) + bias, shift))


def exp(x: Expr) -> Expr:
    """e**x; 0 where x < -87.33, saturated above 88.37."""

    def reduced(x: Expr, n: Expr) -> Expr:
        r = T.fma(n, splat(-0.6931471824645996, n), x)
        r = T.fma(n, splat(1.904654323148236e-09, n), r)
        return let(r, lambda r: T.fma(polynomial(r, _EXP), r * r, r) + splat(1.0, r)) * _power_of_two(n)

    def clamped(v: Expr) -> Expr:
        inside = T.min(T.max(v, splat(-87.33, v)), splat(88.37, v))
        log2e = splat(1.4426950408889634, v)
        scaled = let(inside, lambda c: let(round_half_even(c * log2e), lambda n: reduced(c, n)))
        return T.Select(v < splat(-87.33, v), splat(0.0, v), scaled)

    return let(x, clamped)


def softmax_weight(difference: Expr) -> Expr:
    """e**difference for a difference <= 0 from the largest logit, 2e-7 relative; never below 2**-126.

    Cheaper than `exp`: powers of two need no second reduction step, and what a masked key is left with, 1e-38,
    vanishes beside the largest logit's own weight of 1.
    """

    def scaled(t: Expr) -> Expr:
        return let(round_half_even(t), lambda n: polynomial_of(t - n) * _power_of_two(n))

    def polynomial_of(r: Expr) -> Expr:
        return let(r, lambda r: polynomial(r, _EXP2))

    log2e = splat(1.4426950408889634, difference)
    return let(T.max(difference * log2e, splat(-126.0, difference)), scaled)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e**-x)."""
    return splat(1.0, x) / (splat(1.0, x) + exp(splat(0.0, x) - x))


def tanh(x: Expr) -> Expr:
    """1 - 2 / (1 + e**2x), 1e-7 absolute."""
    return splat(1.0, x) - splat(2.0, x) / (splat(1.0, x) + exp(x + x))


def gelu(x: Expr) -> Expr:
    """x * Phi(x), the exact (erf) form."""

    def scaled(x: Expr, inside: Expr) -> Expr:
        position = T.fma(inside * inside, splat(2.0 / _GELU_END**2, x), splat(-1.0, x))
        half = let(position, lambda v: inside * polynomial(v, _GELU))  # Phi(x) - 1/2
        # The polynomial overshoots at the end by an ulp or so: clamped, large negative x give exactly 0.
        return T.fma(x, T.max(half, splat(-0.5, x)), x * splat(0.5, x))

    def body(x: Expr) -> Expr:
        inside = T.min(T.max(x, splat(-_GELU_END, x)), splat(_GELU_END, x))
        return let(inside, lambda inside: scaled(x, inside))

    return let(x, body)


def gelu_tanh(x: Expr) -> Expr:
    """The tanh approximation of GELU: x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x**3))."""
    inner = lambda x: x * T.fma(x * x, splat(0.07135481627260025, x), splat(1.5957691216057308, x))  # noqa: E731
    return let(x, lambda x: x * sigmoid(inner(x)))


def silu(x: Expr) -> Expr:
    """x * sigmoid(x)."""
    return let(x, lambda x: x * sigmoid(x))


def relu(x: Expr) -> Expr:
    """max(x, 0)."""
    return T.max(x, splat(0.0, x))


def activate(x: Expr, activation: str) -> Expr:
    """Apply the activation named in `ACTIVATIONS`."""
    functions: dict[str, Callable[[Expr], Expr]] = {
        "none": lambda v: v, "relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu}  # fmt: skip
    return functions[activation](x)


def shuffle(a: Expr, b: Expr, indices: Sequence[int]) -> Expr:
    """Lanes of the concatenation of a and b, by constant index."""
    return tirx.Shuffle([a, b], [tirx.const(i, "int32") for i in indices])


def reduce_lanes(vector: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine all lanes of a vector, pairwise, to a scalar (a statement per step)."""
    width = lanes_of(vector)
    while width > 1:
        width //= 2
        low = tirx.Shuffle([vector], [tirx.const(i, "int32") for i in range(width)])
        high = tirx.Shuffle([vector], [tirx.const(width + i, "int32") for i in range(width)])
        vector = bind(combine(low, high))
    return vector


def transpose16(rows: list[Expr]) -> list[Expr]:
    """Transpose 16 vectors of 16 floats in registers: four rounds of pairwise interleaves.

    Interleaving row i with row i + 8 moves one bit of the row index to the lowest bit of the lane index; four
    rounds exchange the two indices.
    """
    low = [k // 2 + 16 * (k % 2) for k in range(16)]
    high = [8 + i for i in low]
    for _ in range(4):
        rows = [bind(shuffle(rows[i // 2], rows[i // 2 + 8], high if i % 2 else low)) for i in range(16)]
    return rows
