"""The activation quantizers equal the formula of docs/dialect.md bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from isofold.compiler.dialect.quantization import LEAST_SCALE

from .conftest import ISAS, guarded

SHAPES = [(1, 1), (3, 7), (5, 16), (4, 63), (2, 64), (7, 65), (3, 1000), (9, 768)]


def pair(x: np.ndarray, levels: float = 255.0) -> np.ndarray:
    low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    s = ((high - low) / np.float32(levels)).astype(np.float32)
    s = np.where(s < LEAST_SCALE, np.float32(1), s)
    z = np.clip(np.rint(-low / s), 0, levels)
    return np.stack([s, z], 1).astype(np.float32)


def codes(x: np.ndarray, params: np.ndarray, kp: int, levels: float = 255.0) -> np.ndarray:
    inverse = np.float32(1) / params[:, :1]
    u = np.clip(np.rint(x * inverse) + params[:, 1:], 0, levels).astype(np.uint8)
    return np.pad(u, ((0, 0), (0, kp - x.shape[1])))


def inputs(m: int, k: int) -> list[np.ndarray]:
    rng = np.random.default_rng(m * 1000 + k)
    x = rng.standard_normal((m, k)).astype(np.float32)
    ties = (rng.integers(-255, 256, (m, k)) / 2).astype(
        np.float32
    )  # x / s halfway between integers where s = 1
    ties[:, 0] = 255
    if k > 1:
        ties[:, 1] = 0
    positive = np.abs(x) + np.float32(1)
    return [
        x * np.float32(37),
        x + np.float32(5),
        positive,
        -positive,
        np.zeros_like(x),
        x * np.float32(1e-20),
        x * np.float32(1e-41),
        ties,
    ]


Vectors = tuple[np.ndarray | None, np.ndarray | None]


def transforms(k: int) -> list[tuple[int, Vectors]]:
    """Flags, and (shift, scale) vectors of k."""
    rng = np.random.default_rng(k)
    shift = rng.standard_normal(k).astype(np.float32)
    scale = rng.standard_normal(k).astype(np.float32)
    return [(0, (None, None)), (1, (shift, None)), (2, (None, scale)), (3, (shift, scale))]


def transformed(x: np.ndarray, vectors: Vectors) -> np.ndarray:
    shift, scale = vectors
    x = x if shift is None else x - shift
    return x if scale is None else x * scale


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("levels", [255.0, 15.0])
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_dynamic(kernel: Callable[..., None], isa: str, levels: float, m: int, k: int) -> None:
    for kp, (flags, vectors) in product((-(-k // 32) * 32, -(-k // 128) * 128), transforms(k)):
        for x in inputs(m, k):
            u, intact = guarded((m, kp), np.uint8, 9)
            params, params_intact = guarded((m, 2), np.float32)
            kernel(isa, "quantize_rows", x, *vectors, u, params, m, k, kp, flags, levels)
            assert intact()
            assert params_intact()
            moved = transformed(x, vectors)
            assert np.array_equal(params, pair(moved, levels))
            assert np.array_equal(u, codes(moved, params, kp, levels))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("levels", [255.0, 15.0])
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_static(kernel: Callable[..., None], isa: str, levels: float, m: int, k: int) -> None:
    kp = -(-k // 32) * 32
    for x, (flags, vectors) in product(inputs(m, k), transforms(k)):
        for s, z in ((0.01, 3.0), (0.5, levels), (1.0, 0.0)):
            u, intact = guarded((m, kp), np.uint8, 9)
            params = np.array([[s, z]], np.float32)
            kernel(isa, "quantize_rows_static", x, *vectors, u, params, m, k, kp, flags, levels)
            assert intact()
            assert np.array_equal(u, codes(transformed(x, vectors), params, kp, levels))


@pytest.mark.parametrize("isa", ISAS)
def test_range_in_parts(kernel: Callable[..., None], isa: str) -> None:
    """The pair of a row that several threads share is the pair of the row."""
    x = np.random.default_rng(0).standard_normal((1, 1000)).astype(np.float32)
    ranges = np.zeros((3, 2), np.float32)
    for i, (a, b) in enumerate(((0, 100), (100, 517), (517, 1000))):
        kernel(isa, "row_range", np.ascontiguousarray(x[0, a:b]), b - a, ranges[i])
    whole = np.array([ranges[:, 0].min(), ranges[:, 1].max()], np.float32)
    params = np.zeros(2, np.float32)
    kernel(isa, "range_to_params", whole, params)
    assert np.array_equal(params, pair(x)[0])
