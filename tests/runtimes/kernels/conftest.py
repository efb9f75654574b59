"""One shared library with the kernels of this folder and their drivers, built once for all processes of a test run."""

from __future__ import annotations

import ctypes
import fcntl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isofold.runtimes import kernels
from isofold.runtimes.kernels import (
    codebook,
    codebook_tables,
    coded,
    dense,
    hadamard,
    linear,
    linear_float,
    outliers,
    quantize,
    sparse,
    sparse_blocks,
    sparse_groups,
    sparse_int4,
    sparse_many,
    sparse_panels,
    sparse_windows,
)
from isofold.runtimes.kernels.codegen import build_objects

FOLDER = Path(kernels.__file__).parent
ISAS = ("v3", "v4")
SOURCE = """
#include "kernels.h"
#include "linear_driver.h"
#include "linear_float_driver.h"
#include "coded_driver.h"
#include "codebook_driver.h"
#include "dense_driver.h"
#include "hadamard_driver.h"
#include "sparse_driver.h"
static const struct isofold_kernels* pick(int isa) { return isa == 3 ? &isofold_kernels_v3 : &isofold_kernels_v4; }
const struct isofold_kernels* test_kernels(int isa) { return pick(isa); }
int64_t test_tasks(const struct isofold_linear* l, int64_t m) { return isofold_linear_tasks(l, m); }
int64_t test_scratch(const struct isofold_linear* l, int64_t m) { return isofold_linear_scratch_bytes(l, m); }
void test_prepare(int isa, const struct isofold_linear* l, const struct isofold_linear_call* c, int64_t a, int64_t b) {
  isofold_linear_prepare(pick(isa), (enum isofold_isa)isa, l, c, a, b);
}
void test_run(int isa, const struct isofold_linear* l, const struct isofold_linear_call* c, int64_t a, int64_t b) {
  isofold_linear_run(pick(isa), (enum isofold_isa)isa, l, c, a, b);
}
int64_t test_float_tasks(const struct isofold_linear* l, int64_t m) { return isofold_linear_float_tasks(l, m); }
void test_float_run(int isa, const struct isofold_linear* l, const struct isofold_linear_float_call* c, int64_t a,
                    int64_t b) {
  isofold_linear_float_run(pick(isa), l, c, a, b);
}
void test_coded_run(int isa, const struct isofold_coded* l, const struct isofold_linear_float_call* c, int64_t a,
                    int64_t b) {
  isofold_coded_run(pick(isa), l, c, a, b);
}
int64_t test_dense_tasks(const struct isofold_linear* l, int64_t m) { return isofold_dense_tasks(l, m); }
void test_dense_run(int isa, const struct isofold_linear* l, const struct isofold_linear_float_call* c, int64_t a,
                    int64_t b) {
  isofold_dense_run(pick(isa), l, c, a, b);
}
static int32_t sparse_table[ISOFOLD_SPARSE_TABLE];
const int32_t* test_sparse_table(void) { isofold_sparse_tables(sparse_table); return sparse_table; }
int test_expands(void) {
  return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vpopcntdq");
}
int64_t test_sparse_tasks(const struct isofold_linear* l) { return isofold_sparse_tasks(l); }
void test_sparse_shape(struct isofold_sparse* s) { isofold_sparse_shape(s); }
int64_t test_sparse_scratch(const struct isofold_sparse* s, int64_t m) { return isofold_sparse_scratch_bytes(s, m); }
void test_sparse_prepare(int isa, const struct isofold_sparse* s, const struct isofold_sparse_call* c, int64_t a,
                         int64_t b) {
  isofold_sparse_prepare(pick(isa), s, c, a, b);
}
void test_sparse_run(int isa, const struct isofold_linear* l, const struct isofold_sparse* s,
                     const struct isofold_sparse_call* c, int64_t a, int64_t b) {
  isofold_sparse_run(pick(isa), (enum isofold_isa)isa, l, s, c, a, b);
}
void test_codebook_run(int isa, struct isofold_codebook* l, const struct isofold_linear_float_call* c, int64_t a,
                       int64_t b) {
  isofold_codebook_run(pick(isa), l, c, a, b);
}
void test_codebook_expand(int isa, const struct isofold_codebook* l, const uint16_t* stored, float* out) {
  isofold_codebook_expand(pick(isa), l, stored, out);
}
int64_t test_lookup_bytes(const struct isofold_codebook* c) { return isofold_lookup_bytes(c); }
// All tasks, with tables made and rows looked up in `parts` pieces; 0: a row has no tables.
int test_lookup(const struct isofold_codebook* c, const uint16_t* stored, const struct isofold_linear_float_call* call,
                void* scratch, int64_t parts) {
  const struct isofold_kernels* k = pick(4);
  struct isofold_lookup l = isofold_lookup_start(k, c, stored, scratch);
  int64_t tasks = isofold_lookup_tasks(c);
  for (int64_t m = 0; m < call->m; ++m) {
    if (!isofold_lookup_row(c, &l, call->x + m * call->k, call->k)) return 0;
    for (int64_t chunk = 0; chunk < isofold_lookup_chunks(c); ++chunk) {
      int64_t units = isofold_lookup_units(c, chunk);
      for (int64_t i = 0; i < parts; ++i)
        isofold_lookup_tables(k, c, &l, chunk, units * i / parts, units * (i + 1) / parts);
      for (int64_t i = 0; i < parts; ++i)
        isofold_lookup_run(k, c, &l, call, m, chunk, tasks * i / parts, tasks * (i + 1) / parts);
    }
  }
  return 1;
}
int test_core(int64_t order) { return isofold_hadamard_find(order); }
void test_expand(int position, int transpose, float* matrix) {
  isofold_hadamard_expand(position, transpose, matrix);
}
void test_hadamard(int isa, const struct isofold_hadamard* h, const float* x, float* y, int64_t blocks,
                   float* scratch) {
  isofold_hadamard_run(pick(isa), (enum isofold_isa)isa, h, x, y, blocks, scratch);
}
"""


class Linear(ctypes.Structure):
    """struct isofold_linear."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("wsum", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("kp", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group_size", ctypes.c_int64),
        ("scale_multiplier", ctypes.c_float),
        ("activation", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("outliers", ctypes.c_void_p),
    ]


class Call(ctypes.Structure):
    """struct isofold_linear_call."""

    _fields_ = [
        ("u", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("static_params", ctypes.c_int32),
        ("scratch", ctypes.c_void_p),
    ]


class Sparse(ctypes.Structure):
    """struct isofold_sparse."""

    _fields_ = [
        ("places", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("k", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("layout", ctypes.c_int32),
        ("value", ctypes.c_int32),
        ("expands", ctypes.c_int32),
        ("table", ctypes.c_void_p),
        ("quantized", ctypes.c_int32),
        ("cells", ctypes.c_int64),
        ("words", ctypes.c_int64),
        ("padded", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("heads", ctypes.c_int64),
    ]


class SparseCall(ctypes.Structure):
    """struct isofold_sparse_call."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("ldx", ctypes.c_int64),
        ("params", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("static_params", ctypes.c_int32),
        ("scratch", ctypes.c_void_p),
    ]


class FloatCall(ctypes.Structure):
    """struct isofold_linear_float_call."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
    ]


class Coded(ctypes.Structure):
    """struct isofold_coded."""

    _fields_ = [
        ("linear", Linear),
        ("table", ctypes.c_void_p),
        ("element", ctypes.c_int32),
        ("scale", ctypes.c_int32),
    ]


class Codebook(ctypes.Structure):
    """struct isofold_codebook."""

    _fields_ = [
        ("linear", Linear),
        ("books", ctypes.c_void_p),
        ("total", ctypes.c_int64),
        ("code_bits", ctypes.c_int32),
    ]


def address(array: Any) -> int:
    """Where a contiguous numpy array or torch tensor lies; 0 for None."""
    if array is None:
        return 0
    if isinstance(array, torch.Tensor):
        assert array.is_contiguous()
        return array.data_ptr()
    assert array.flags.c_contiguous
    return array.ctypes.data


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All kernels for both instruction sets, and the test entry points above."""
    own = tmp_path_factory.getbasetemp()
    folder = (
        own.parent if own.name.startswith("popen-") else own
    ) / "kernels"  # of all workers of pytest-xdist
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "test.so").exists():
            build_library(folder)
    loaded = ctypes.CDLL(str(folder / "test.so"))
    for name in (
        "test_tasks",
        "test_scratch",
        "test_float_tasks",
        "test_dense_tasks",
        "test_sparse_tasks",
        "test_sparse_scratch",
        "test_lookup_bytes",
    ):
        getattr(loaded, name).restype = ctypes.c_int64
    loaded.test_sparse_table.restype = ctypes.c_void_p
    return loaded


def build_library(folder: Path) -> None:
    """`test.so`, which is there when it is whole."""
    sparse_modules = (
        sparse,
        sparse_many,
        sparse_windows,
        sparse_groups,
        sparse_blocks,
        sparse_int4,
        sparse_panels,
    )
    codes = (coded, codebook, codebook_tables)
    modules = (quantize, linear, linear_float, outliers, *codes, dense, hadamard, *sparse_modules)
    objects = build_objects([k for module in modules for k in module.KERNELS], folder)
    (folder / "hadamard_signs.h").write_text(hadamard.signs_header())
    (folder / "test.c").write_text(SOURCE)
    command = ["gcc", "-std=c11", "-O2", "-Wall", "-Werror", "-Wno-unused-function", "-shared", "-fPIC"]
    command += [
        f"-I{folder}",
        f"-I{FOLDER}",
        "-Wl,--no-undefined",
        "-o",
        "made.so",
        "test.c",
        *map(str, objects),
    ]
    subprocess.run(command, cwd=folder, check=True)
    (folder / "made.so").replace(folder / "test.so")


@pytest.fixture(scope="session")
def kernel(library: ctypes.CDLL) -> Callable[..., None]:
    """Call ``kernel(isa, name, *arguments)``; arrays become pointers, ints int64, floats float32."""

    def call(isa: str, name: str, *arguments: Any) -> None:
        converted: list[Any] = []
        for a in arguments:
            if isinstance(a, int):
                converted.append(ctypes.c_int64(a))
            elif isinstance(a, float):
                converted.append(ctypes.c_float(a))
            else:
                converted.append(ctypes.c_void_p(address(a)))
        getattr(library, f"{name}_{isa}")(*converted)

    return call


def guarded(shape: tuple[int, ...], dtype: Any, value: float = 0) -> tuple[np.ndarray, Callable[[], bool]]:
    """An array with canaries around it, and a function that says whether they are intact."""
    size = int(np.prod(shape))
    whole = np.full(size + 128, value, dtype)
    whole[:64] = whole[-64:] = 77
    return whole[64:-64].reshape(shape), lambda: bool((whole[:64] == 77).all() and (whole[-64:] == 77).all())
