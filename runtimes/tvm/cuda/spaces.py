"""Which values of a kernel's knobs a chip can run at all: threads, shared memory, and registers of sums.

Only nvcc knows registers exactly; what would need more for its sums alone is left out before it is compiled, what nvcc
then has to spill after.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ....compiler.dialect.packing import LANES, ceil_to
from ...tuning.search import Candidate, Space
from .dense import DEPTH, PANEL
from .knobs import knobs_of, values_of, with_values
from .skinny import TILE

SHARED = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90a": 227 << 10}
"""Most bytes of a block's dynamic shared memory."""
STATIC = 48 << 10
"""Most bytes of a block's arrays that are not dynamic."""
THREADS, REGISTERS = 1024, 65536
_SUMS = 192
"""Registers that a thread may have for sums: what is left of 255 with operands and addresses."""
_WARP = 32


def space_of(kernel: Any, archs: Sequence[str]) -> Space | None:
    """The values that are tried for a kernel on chips of all these architectures; None where there is no choice."""
    if not is_measurable(kernel):
        return None
    default = values_of(kernel)
    values = {knob.field: knob.values for knob in knobs_of(kernel)}
    if default.get("splits") == 1:  # there is no second kernel that would combine ranges
        values["splits"] = (1,)
    for field, value in default.items():
        if value not in values[field]:
            values[field] = tuple(sorted({*values[field], value}))

    def legal(candidate: Candidate) -> bool:
        return candidate == default or fits(with_values(kernel, candidate), archs)

    space = Space(values, default, exact=False, legal=legal)
    return space if size_of(space)[0] else None


def size_of(space: Space) -> tuple[int, int]:
    """How many candidates a space has beside the default, and how many values it leaves out."""
    every = [
        dict(zip(space.values, chosen, strict=True)) for chosen in itertools.product(*space.values.values())
    ]
    others = [candidate for candidate in every if candidate != space.default]
    good = sum(space.legal(candidate) for candidate in others)
    return good, len(others) - good


def is_measurable(kernel: Any) -> bool:
    """Whether invented tensors will do: offsets of sparse entries would have to fit each other."""
    if not knobs_of(kernel):
        return False
    tensors = kernel.tensors() if hasattr(kernel, "tensors") else kernel.inputs()
    return all(tensor.name != "offsets" for tensor in tensors)


def fits(kernel: Any, archs: Sequence[str]) -> bool:
    """Whether chips of all these architectures can run a kernel."""
    threads, shared, sums, static = demands(kernel)
    limit = STATIC if static else min(SHARED[arch] for arch in archs)
    return (
        threads <= THREADS
        and shared <= limit
        and sums <= _SUMS
        and threads * sums <= REGISTERS
        and _even(kernel)
    )


def demands(kernel: Any) -> tuple[int, int, int, bool]:
    """Threads of a block, bytes of its shared memory, registers of sums, and whether the memory is not dynamic."""
    return _DEMANDS[type(kernel).__name__](kernel)


def _even(kernel: Any) -> bool:
    """Whether the kernel has the parts that its values say."""
    kind = type(kernel).__name__
    if kind == "Skinny":
        return bool(kernel.split()[2] == kernel.warps)  # else it is the same as with fewer
    if kind == "ManyQueries":
        pieces = ceil_to(kernel.shape.depth, 32) // 8
        return kernel.keys * pieces % (_WARP * kernel.warps) == 0
    if kind == "DenseMany":
        return kernel.tokens % kernel.warps == 0
    return kind != "Rows" or kernel.k <= 64 * kernel.threads


def _gemm(kernel: Any) -> tuple[int, int, int, bool]:
    tile, codes, weights = kernel.tile, kernel.activations != "float", kernel.weights
    units, pieces = 8 if codes else 4, weights.layout.words // 4
    stage = tile.features // LANES * units * 64 * pieces + tile.tokens * 64
    sums = tile.rows * tile.columns * 8 * (2 if weights.grouped else 1)
    sums += tile.columns * 4 if codes and weights.zero else 0
    return tile.threads, kernel.stages * stage, sums, False


def _skinny(kernel: Any) -> tuple[int, int, int, bool]:
    _, chunk, warps = kernel.split()
    weights = kernel.weights
    step = 32 * sum(count for _, count in weights.layout.loads(0, 0))
    ring = kernel.depth * (chunk * step + 32 * weights.scale_bytes + (128 if weights.zero else 0))
    board = 4 * 8 * kernel.tiles * TILE
    return _WARP * warps, warps * max(ring, board), 16 * kernel.tiles + kernel.active_words, False


def _dense_few(kernel: Any) -> tuple[int, int, int, bool]:
    return _WARP * kernel.warps, 4 * kernel.warps * kernel.tokens * PANEL, 4 * kernel.tokens, True


def _dense_many(kernel: Any) -> tuple[int, int, int, bool]:
    return _WARP * kernel.warps, 4 * DEPTH * (PANEL + kernel.tokens), kernel.tokens // kernel.warps, True


def _few_queries(kernel: Any) -> tuple[int, int, int, bool]:
    groups, depth, width = 4 * kernel.warps, ceil_to(kernel.shape.depth, 32), ceil_to(kernel.shape.width, 32)
    sums = (kernel.rows + 1) * (depth + width) // 8
    return _WARP * kernel.warps, 4 * groups * (width + 2), sums, True


def _many_queries(kernel: Any) -> tuple[int, int, int, bool]:
    shape, words = kernel.shape, kernel.keys // 2 + 4
    steps, columns = ceil_to(shape.depth, 32) // 32, ceil_to(shape.width, 8) // 8
    row = 64 * steps + (64 if steps % 2 == 0 else 0)
    shared = kernel.keys * row + columns * 8 * words * 4
    return _WARP * kernel.warps, shared, kernel.keys // 2 + columns * 4 + steps * 8, False


def _rows(kernel: Any) -> tuple[int, int, int, bool]:
    return kernel.threads, 4 * kernel.k, 1, False


_DEMANDS = {
    "Gemm": _gemm,
    "Skinny": _skinny,
    "DenseFew": _dense_few,
    "DenseMany": _dense_many,
    "FewQueries": _few_queries,
    "ManyQueries": _many_queries,
    "Rows": _rows,
}
