"""Hadamard matrices of many orders, from constructions, and how to split a size into them.

A Hadamard matrix of order m has entries +1 and -1 and H H^T = m I. Orders 1, 2 and multiples of 4:

- Sylvester: a power of two, H[i, j] = (-1)^popcount(i & j). Symmetric.
- Paley II: 2 (q + 1) for a prime power q = 1 mod 4, from the quadratic character of GF(q). Symmetric.
- Paley I: q + 1 for a prime power q = 3 mod 4. I + skew, not symmetric; used where Paley II has nothing.
- Goethals and Seidel (Canad. J. Math. 1967): 4 t from four circulant matrices of order t whose squared spectra sum
  to 4 t; used where neither is there. The four were found by searching unions of orbits of a group of multipliers
  and are kept as the orbits' representatives. Not symmetric.
- Kronecker products of Hadamard matrices.

Entries are a format: weights folded with a matrix need the same one at run time, so neither the constructions nor their
order of preference may change. numpy only, because the op library's build reads it without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

LARGEST_CORE = 252
"""Largest order of a matrix that is no Kronecker product: a dense step costs its order per element."""

# t: (generator of the multipliers, four sets of representatives of orbits in Z_t whose entries are -1)
_CIRCULANTS: dict[int, tuple[int, tuple[tuple[int, ...], ...]]] = {
    23: (22, ((1, 2, 5, 7, 9), (1, 2, 4, 6), (0, 3, 6, 7, 8), (3, 4, 5, 8, 9))),
    29: (
        28,
        (
            (3, 5, 8, 9, 10, 12),
            (0, 2, 3, 4, 5, 6, 8, 9, 10, 12),
            (0, 1, 4, 5, 8, 10, 11),
            (0, 1, 2, 5, 6, 8, 10, 11),
        ),
    ),
    39: (29, ((0, 2, 3, 4, 7), (0, 3, 4, 6, 7), (2, 4, 6), (0, 2, 3, 4))),
    43: (4, ((0, 1, 2, 3), (0, 2, 7), (1, 6, 7), (1, 3, 7))),
}


def is_power_of_two(n: int) -> bool:
    """1, 2, 4, 8, ..."""
    return n > 0 and n & (n - 1) == 0


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    e = 0
    while q % p == 0:
        q, e = q // p, e + 1
    return (p, e) if q == 1 else None


def _digits(q: int, p: int, e: int) -> NDArray[np.int64]:
    """Elements of GF(p^e) as coefficients `[q, e]`, lowest first."""
    return np.arange(q)[:, None] // p ** np.arange(e) % p


def _squares(elements: NDArray[np.int64], tail: tuple[int, ...], p: int) -> NDArray[np.int64] | None:
    """Indices of x^2 for every element modulo x^e + tail, or None where the ring is no field."""
    q, e = elements.shape
    full = np.zeros((q, q, 2 * e - 1), dtype=np.int64)
    for i, j in product(range(e), repeat=2):
        full[:, :, i + j] += elements[:, None, i] * elements[None, :, j]
    for top in range(2 * e - 2, e - 1, -1):
        for i in range(e):
            full[:, :, top - e + i] -= full[:, :, top] * tail[i]
    index = (full[:, :, :e] % p) @ p ** np.arange(e)
    if (index[1:, 1:] == 0).any():
        return None
    return np.diagonal(index).copy()


@cache
def _character_matrix(q: int) -> NDArray[np.int64]:
    """Q[i, j] = chi(a_i - a_j) over the elements of GF(q), chi the quadratic character."""
    found = _prime_power(q)
    assert found is not None
    p, e = found
    elements = _digits(q, p, e)
    squares = None
    for tail in product(range(p), repeat=e):
        squares = _squares(elements, tail, p)
        if squares is not None:
            break
    assert squares is not None, "every finite field has an irreducible polynomial"
    chi = np.full(q, -1, dtype=np.int64)
    chi[squares] = 1
    chi[0] = 0
    difference = (elements[:, None, :] - elements[None, :, :]) % p
    matrix: NDArray[np.int64] = chi[difference @ p ** np.arange(e)]
    return matrix


def _bordered(q: int, corner: int) -> NDArray[np.int64]:
    """[[0, 1], [corner, Q]]: the conference matrix of order q + 1."""
    matrix = np.ones((q + 1, q + 1), dtype=np.int64)
    matrix[0, 0] = 0
    matrix[1:, 0] = corner
    matrix[1:, 1:] = _character_matrix(q)
    return matrix


def _paley_1(q: int) -> NDArray[np.int64]:
    return np.eye(q + 1, dtype=np.int64) + _bordered(q, -1)


def _paley_2(q: int) -> NDArray[np.int64]:
    on, off = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    matrix: NDArray[np.int64] = np.kron(_bordered(q, 1), on) + np.kron(np.eye(q + 1, dtype=np.int64), off)
    return matrix


def _goethals_seidel(t: int) -> NDArray[np.int64]:
    multiplier, sets = _CIRCULANTS[t]
    orbit = {1}
    while (following := {u * multiplier % t for u in orbit} | orbit) != orbit:
        orbit = following
    shift = (np.arange(t)[None, :] - np.arange(t)[:, None]) % t
    a, b, c, d = (
        np.where(np.isin(np.arange(t), [r * u % t for r in chosen for u in orbit]), -1, 1)[shift]
        for chosen in sets
    )

    def turned(matrix: NDArray[np.int64]) -> NDArray[np.int64]:
        return matrix[:, ::-1]

    return np.block(
        [
            [a, turned(b), turned(c), turned(d)],
            [-turned(b), a, -turned(d.T), turned(c.T)],
            [-turned(c), turned(d.T), a, -turned(b.T)],
            [-turned(d), -turned(c.T), turned(b.T), a],
        ]
    )


CORES: tuple[int, ...] = tuple(
    m
    for m in range(12, LARGEST_CORE + 1, 8)  # m - 1 = 3 and m / 2 - 1 = 1 mod 4
    if m // 4 in _CIRCULANTS or _prime_power(m - 1) is not None or _prime_power(m // 2 - 1) is not None
)
"""Known orders 4 t with odd t > 1: 12, 20, 28, ..., all up to 252 but 188 and 236."""


def _unknown(order: int) -> InputError:
    return InputError(
        "There is no Hadamard matrix of this order here",
        expected=f"a power of two, or one of {', '.join(map(str, CORES))}",
        got=str(order),
        hint="factor(n) gives orders that divide a size",
    )


@cache
def signs(order: int) -> NDArray[np.int8]:
    """The Hadamard matrix of a power of two or of one of `CORES`, int8 `[order, order]` of +1 and -1, read-only.

    Raises InputError for any other order.
    """
    if is_power_of_two(order):
        matrix = np.ones((1, 1), dtype=np.int64)
        while len(matrix) < order:
            matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    elif order not in CORES:
        raise _unknown(order)
    elif _prime_power(order // 2 - 1) is not None:
        matrix = _paley_2(order // 2 - 1)
    elif _prime_power(order - 1) is not None:
        matrix = _paley_1(order - 1)
    else:
        matrix = _goethals_seidel(order // 4)
    result = matrix.astype(np.int8)
    result.flags.writeable = False
    return result


def check_orders(orders: Sequence[int], size: int) -> tuple[int, ...]:
    """`orders` as a tuple. Raises InputError unless they are of `CORES`, but the last may be a power of two, and their
    product divides `size`."""
    total = 1
    for position, order in enumerate(orders):
        if order not in CORES and not is_power_of_two(order):
            raise _unknown(order)
        if order not in CORES and position < len(orders) - 1:
            raise InputError(
                "Orders of a Hadamard transform are in the wrong places",
                expected="a power of two only as the last",
                got=str(list(orders)),
            )
        total *= order
    if size % total:
        raise InputError(
            "The orders of a Hadamard transform do not fit the last dimension",
            expected=f"a multiple of {total}",
            got=str(size),
            hint="factor(n) gives orders that divide n",
        )
    return tuple(orders)


def _cost(cores: tuple[int, ...]) -> int:
    """Additions per element, beside the log2 n of a power of two: each core replaces two of its steps."""
    return sum(cores) - 2 * len(cores)


@cache
def _split(odd: int, twos: int) -> tuple[int, ...] | None:
    """The cheapest cores whose product is `odd` times at most `twos` factors of two, largest first, or None."""
    if odd == 1:
        return ()
    best: tuple[int, ...] | None = None
    for core in CORES:
        if twos >= 2 and odd % (core // 4) == 0:
            rest = _split(odd // (core // 4), twos - 2)
            if rest is not None and (best is None or _cost((core, *rest)) < _cost(best)):
                best = tuple(sorted((core, *rest), reverse=True))
    return best


@cache
def factor(n: int) -> tuple[int, ...]:
    """Orders of the Hadamard transform of a last dimension of size n: cores, then a power of two.

    Their product is n where a matrix of order n is known, else the largest divisor of n for which one is (the
    transform is then block diagonal). () where that is 1: n is odd. Of several splits the cheapest.
    Raises InputError unless n is positive.
    """
    if n < 1:
        raise InputError("A Hadamard transform needs a positive size", got=str(n))
    for size in sorted((d for d in range(1, n + 1) if n % d == 0), reverse=True):
        twos = (size & -size).bit_length() - 1
        cores = _split(size >> twos, twos)
        if cores is not None:
            rest = 2 ** (twos - 2 * len(cores))
            return cores if rest == 1 else (*cores, rest)
    return ()
