"""CodedLinear and CodebookLinear: threads, instruction sets, several sessions, no rows, errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from isofold.compiler.dialect.element_formats import FORMATS
from isofold.compiler.dialect.packing_codebook import CodebookMatrix, pack_codebook
from isofold.compiler.dialect.packing_coded import pack_coded
from isofold.passes.code_ranges import quantize_codes

Check = Callable[..., None]
Run = Callable[..., list[Tensor]]
WEIGHTS = ("weight", "scale", "table", "codebooks", "bias")
LOOKED_UP = 560
"""Output features from which products with codebooks of 8 bits are looked up (ISOFOLD_LOOKUP_FEATURES), and some."""
NAMES = ["nf4", "table4", "e4m3", "mxfp6_e2m3", "nvfp4", "1x8", "2x8", "1x16"]


def arguments_of(name: str, rows: int, n: int, k: int) -> tuple[str, list[Any]]:
    """The operator and its arguments, with bias, residual and an activation."""
    g = torch.Generator().manual_seed(rows)
    x, bias, residual = (torch.randn(*shape, generator=g) for shape in ((rows, k), (n,), (rows, n)))
    if name in FORMATS:
        weight = torch.randn(n, k, generator=g)
        p = pack_coded(quantize_codes(weight, name, FORMATS[name].group_sizes[0], "absmax"))
        tail = (n, k, name, p.group_size, p.scale_multiplier, "gelu", False)
        return "linear_coded", [x, p.weight, p.scale, p.table, bias, residual, *tail]
    count, bits = (int(word) for word in name.split("x"))
    codes = torch.randint(0, 2**bits, (n, -(-k // 8), count), generator=g, dtype=torch.int32)
    books = torch.randn(count, 2**bits, 8, generator=g).half().float()
    dtype = torch.uint8 if bits == 8 else torch.uint16
    c = pack_codebook(CodebookMatrix(codes.to(dtype), books, torch.rand(n, generator=g) * 0.1, k))
    return "linear_codebook", [x, c.weight, c.codebooks, c.scale, bias, residual, n, k, name, "gelu", False]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_threads(check: Check, name: str, threads: int, rows: int) -> None:
    operator, arguments = arguments_of(name, rows, 300 if name in FORMATS else LOOKED_UP, 1100)
    check(operator, arguments, constants=WEIGHTS, threads=threads)


def test_rows_whose_products_cannot_be_looked_up(check: Check) -> None:
    operator, arguments = arguments_of("2x8", 3, LOOKED_UP, 4096)
    arguments[0][1, 7] = 1e6
    check(operator, arguments, constants=WEIGHTS, threads=2)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_and_weights_that_are_not_constant(run_operator: Run, check: Check, name: str) -> None:
    operator, arguments = arguments_of(name, 0, 48, 64)
    assert run_operator(operator, arguments, constants=WEIGHTS)[0].shape == (0, 48)
    operator, arguments = arguments_of(name, 4, 33, 45)
    check(operator, arguments)


@pytest.mark.parametrize("name", ["nf4", "2x8"])
def test_several_sessions_at_once(check: Check, name: str) -> None:
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            operator, arguments = arguments_of(name, 1 + seed, LOOKED_UP, 520)
            for _ in range(5):
                check(operator, arguments, constants=WEIGHTS, threads=2)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


WRONG: list[tuple[str, dict[int, Any], str]] = [
    ("nf4", {8: "nf5"}, r"attribute 'format' is 'nf5'; expected one of nf4, table4"),
    ("nf4", {9: 16}, r"'group_size' is 16; expected 32, 64 or 128 for format nf4"),
    ("e4m3", {9: 48}, r"'group_size' is 48; expected 0, 32, 64 or 128 for format e4m3"),
    ("nvfp4", {9: 32}, r"'group_size' is 32; expected 16 for format nvfp4"),
    ("nf4", {3: torch.zeros(16)}, r"input 3 \(table\): only the format table4 takes one"),
    ("table4", {3: None}, r"input 3 \(table\): the format table4 needs one"),
    ("nf4", {2: torch.zeros(3, 1, 16)}, r"input 2 \(scale\): expected float16 \[3, 1, 16\], got float32"),
    (
        "mxfp4",
        {1: torch.zeros(3, 5, 16, 4, dtype=torch.uint8)},
        r"input 1 \(weight\): expected uint8 \[3, 8, 16, 4\]",
    ),
    ("2x8", {8: "9x8"}, r"attribute 'format' is '9x8'; expected one of 1x8, 2x8"),
    ("2x8", {8: "1x8"}, r"input 1 \(weight\): expected uint8 \[3, 8, 16, 1\], got uint8 \[3, 8, 16, 2\]"),
    ("1x16", {8: "1x8"}, r"expected uint8 \[3, 8, 16, 1\], got uint16"),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG)
def test_wrong_inputs_are_named(run_operator: Run, name: str, changes: dict[int, Any], message: str) -> None:
    operator, arguments = arguments_of(name, 2, 40, 64)
    for index, value in changes.items():
        arguments[index] = value
    with pytest.raises(Exception, match=message):
        run_operator(operator, arguments, constants=WEIGHTS)
