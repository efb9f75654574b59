"""Kernels become objects with plain C signatures that need nothing but memcpy and memset."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from isofold.runtimes.kernels import linear, quantize
from isofold.runtimes.kernels.codegen import (
    ISAS,
    V3,
    V4,
    Kernel,
    Parameter,
    build_objects,
    compile_object,
    for_range,
    header,
    load,
    store,
)


def _copy(isa: Any, x: Any, y: Any, n: Any) -> None:
    with for_range(0, n) as i:
        store(y, i, load(x, i, 1), 1)


COPY = Kernel("copy", "x: const f32*, y: f32*, n: i64", _copy)


def test_signature() -> None:
    assert [p.ctype for p in COPY.parameters] == ["const float*", "float*", "int64_t"]
    with pytest.raises(ValueError, match=r"kernel parameter 'x: double\*'.*type one of f16"):
        Parameter.parse("x: double*")


def test_header_declares_both_instruction_sets() -> None:
    text = header([COPY])
    for isa in ISAS:
        assert f"void copy_{isa.name}(const float* x, float* y, int64_t n);" in text
        assert f"isofold_kernels_{isa.name} = {{copy_{isa.name}, " in text


def test_names_must_differ(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="used twice: copy"):
        build_objects([COPY, COPY], tmp_path)


def test_build_reports_progress_and_leaves_only_results(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    # The package's own kernels: the compiling processes import them by name, which they cannot do with a test's.
    paths = build_objects(quantize.KERNELS, tmp_path, lambda *step: seen.append(step), workers=1)
    assert [p.name for p in paths] == ["quantize_v3.o", "quantize_v4.o"]
    assert [(done, total) for _, done, total in seen] == [(1, 2), (2, 2)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kernels.h", "quantize_v3.o", "quantize_v4.o"]


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_objects_are_self_contained(tmp_path: Path, isa: Any) -> None:
    some = [k for k in linear.KERNELS if k.name in ("tile8_pc_8x2", "gemv4_g_1", "epilogue_pc_gelu")]
    path = compile_object([*some, *quantize.KERNELS], isa, tmp_path / "some.o")
    symbols = subprocess.run(["nm", "-u", str(path)], check=True, capture_output=True, text=True).stdout
    assert {line.split()[-1] for line in symbols.splitlines()} <= {"memcpy", "memset"}


def test_object_code_is_deterministic(tmp_path: Path) -> None:
    a, b = (compile_object(quantize.KERNELS, V4, tmp_path / name).read_bytes() for name in ("a.o", "b.o"))
    assert a == b


def test_instruction_levels(tmp_path: Path) -> None:
    """v3 must not contain a 512-bit register; the v4 tile must be dot products without spills in its loop."""
    some = [k for k in linear.KERNELS if k.name == "tile8_pc_8x2"]
    v3 = compile_object(some, V3, tmp_path / "v3.s", assembly=True).read_text()
    v4 = compile_object(some, V4, tmp_path / "v4.s", assembly=True).read_text()
    assert "%zmm" not in v3
    assert v4.count("vpdpbusd") == 8 * 2 * linear.STEPS
    spills = [line for line in v4.splitlines() if "%zmm" in line and "(%rsp)" in line]
    assert spills == []
