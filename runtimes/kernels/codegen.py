"""TIR kernels to x86-64 object files with plain C signatures, and the C header that declares them.

A kernel is written once with TVM's IR builder and compiled once per instruction set; the objects need no
TVM to run: the lowering below leaves out ``MakePackedAPI`` and ``LowerTVMBuiltin``, so that pointer
parameters stay pointers (``void k(float* noalias x, int64_t n)``) and nothing is left undefined. What the
missing passes would have done is therefore not available inside a kernel: no ``T.parallel`` (take a range,
let the caller split it over its threads) and no large ``alloc_buffer`` (it would be a stack array; take
scratch memory as a parameter).

Writing a kernel::

    from .codegen import Isa, Kernel, T, for_range, load, store

    def _scale(isa: Isa, x: Buffer, y: Buffer, factor: Var, begin: Var, end: Var) -> None:
        with for_range(begin, end) as i:
            store(y, i * 16, load(x, i * 16) * T.broadcast(factor, 16))

    KERNELS = [Kernel("scale", "x: const f32*, y: f32*, factor: f32, begin: i64, end: i64", _scale)]

``emit`` is called once per instruction set, inside the function's frame; pointers arrive as flat buffers of
unknown length, scalars as variables. Python loops unroll, :func:`for_range` makes loops. It must be
picklable (a module-level function, or ``functools.partial`` of one), because objects are compiled in worker
processes.

Sixteen-lane float vectors are right for both instruction sets (LLVM splits them in two for AVX2); only what
uses an intrinsic has to look at ``isa``. No parameter may alias another one that is written (they are
``noalias``).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from .knobs import DEFAULTS, Settings, driver_values, using

__all__ = [
    "ISAS",
    "V3",
    "V4",
    "Isa",
    "Kernel",
    "Parameter",
    "T",
    "bind",
    "build_objects",
    "compile_object",
    "for_range",
    "header",
    "load",
    "registers",
    "store",
    "table",
    "when",
]

_UNBOUNDED = 1 << 40  # extent of a buffer whose length only the caller knows
_TYPES = {  # signature type -> (TVM dtype, C type)
    "f16": ("float16", "uint16_t"),
    "f32": ("float32", "float"),
    "f64": ("float64", "double"),
    "i8": ("int8", "int8_t"),
    "u8": ("uint8", "uint8_t"),
    "i16": ("int16", "int16_t"),
    "u16": ("uint16", "uint16_t"),
    "i32": ("int32", "int32_t"),
    "i64": ("int64", "int64_t"),
}
_PARAMETER = re.compile(r"(\w+)\s*:\s*(const\s+)?(\w+)\s*(\*?)")


@dataclass(frozen=True)
class Isa:
    """An instruction set that kernels are compiled for.

    Attributes:
        name: suffix of the symbols and of the object files (``v3``, ``v4``).
        mcpu: LLVM's processor name; attributes: LLVM's feature list.
        vnni: 512-bit ``vpdpbusd`` is there.
        registers: number of architectural vector registers.
    """

    name: str
    mcpu: str
    attributes: tuple[str, ...]
    vnni: bool
    registers: int

    def target(self, more: Sequence[str] = ()) -> tvm.target.Target:
        """TVM's target; generic in the processor model, so that an object runs on every machine of its
        level (which also has the features ``more``)."""
        spec: dict[str, Any] = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": self.mcpu}
        if self.attributes or more:
            spec["mattr"] = [*self.attributes, *more]
        return tvm.target.Target(spec)


V3 = Isa("v3", "x86-64-v3", (), False, 16)
V4 = Isa("v4", "x86-64-v4", ("+avx512vnni",), True, 32)
ISAS = (V3, V4)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel's C signature."""

    name: str
    dtype: str
    ctype: str
    pointer: bool

    @staticmethod
    def parse(text: str) -> Parameter:
        """``"x: const f32*"`` or ``"n: i64"``; raises ValueError for anything else."""
        match = _PARAMETER.fullmatch(text.strip())
        if match is None or match[3] not in _TYPES:
            known = ", ".join(_TYPES)
            expected = f"expected 'name: [const] type[*]', type one of {known}"
            raise ValueError(f"kernel parameter {text!r}: {expected}")
        dtype, ctype = _TYPES[match[3]]
        qualifier = "const " if match[2] else ""
        return Parameter(match[1], dtype, f"{qualifier}{ctype}{match[4]}", bool(match[4]))


@dataclass(frozen=True)
class Kernel:
    """A kernel: C name without the suffix of the instruction set, signature, and the function that emits
    its body.

    ``group`` names the object file the kernel goes to: kernels of a group are compiled together, groups in
    parallel. ``attributes``: features beyond v4 that the kernel's v4 form uses; its caller must look for them
    (its v3 form has none). All kernels of a group have the same.
    """

    name: str
    signature: str
    emit: Callable[..., None]
    group: str = "kernels"
    attributes: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parsed signature."""
        return tuple(Parameter.parse(part) for part in self.signature.split(","))

    def symbol(self, isa: Isa) -> str:
        """The C symbol for one instruction set."""
        return f"{self.name}_{isa.name}"

    def prim_func(self, isa: Isa, settings: Settings = DEFAULTS) -> tirx.PrimFunc:
        """The TIR function for one instruction set, with these values of its group's knobs."""
        knobs = using(settings, isa.name, self.group)
        with knobs, IRBuilder() as builder, T.prim_func(False, True):
            T.func_name(self.symbol(isa))
            T.func_attr({"tirx.noalias": True, "global_symbol": self.symbol(isa)})
            variables = []
            for p in self.parameters:
                variables.append(T.arg(p.name, T.handle(p.dtype) if p.pointer else getattr(T, p.dtype)()))
            values = []
            for p, variable in zip(self.parameters, variables, strict=True):
                whole = (_UNBOUNDED,)
                values.append(
                    T.decl_buffer(whole, p.dtype, data=variable, layout=None) if p.pointer else variable
                )
            self.emit(isa, *values)
        return builder.get()


def for_range(begin: Any, end: Any) -> Any:
    """``for (int64_t i = begin; i < end; ++i)`` as a context manager that yields i; bounds int64
    expressions or ints."""
    begin, end = (tirx.const(v, "int64") if isinstance(v, int) else v for v in (begin, end))
    return T.serial(begin, end)


def when(condition: Any) -> Any:
    """``if (condition)`` as a context manager (use ``T.If``, ``T.Then`` and ``T.Else`` where there is an
    else)."""
    return _When(condition)


class _When:
    def __init__(self, condition: Any) -> None:
        self._frames = (T.If(condition), T.Then())

    def __enter__(self) -> None:
        for frame in self._frames:
            frame.__enter__()

    def __exit__(self, *error: Any) -> None:
        for frame in reversed(self._frames):
            frame.__exit__(*error)


def bind(value: Any) -> Any:
    """Name a value, so that an expression used several times is computed once."""
    return T.Bind(value)


def _index(offset: Any, lanes: int) -> Any:
    offset = tirx.const(offset, "int64") if isinstance(offset, int) else offset
    return offset if lanes == 1 else T.ramp(offset, tirx.const(1, "int64"), lanes)


def load(buffer: Any, offset: Any, lanes: int = 16) -> Any:
    """``lanes`` consecutive elements from an element offset (unaligned)."""
    return tirx.BufferLoad(buffer, [_index(offset, lanes)])


def store(buffer: Any, offset: Any, value: Any, lanes: int = 16) -> None:
    """Write ``lanes`` consecutive elements at an element offset (unaligned)."""
    T.buffer_store(buffer, value, [_index(offset, lanes)])


def registers(count: int, dtype: str, lanes: int = 16) -> Any:
    """A local array of ``count`` vectors; LLVM promotes it to registers when all offsets are constants.

    Element offset of vector i is ``i * lanes``.
    """
    return T.alloc_buffer((count * lanes,), dtype, scope="local", layout=None)


def _lower(functions: dict[str, tirx.PrimFunc], target: tvm.target.Target) -> tvm.IRModule:
    module = tvm.IRModule(functions)
    return tvm.ir.transform.Sequential(
        [
            tirx.transform.BindTarget(target),
            s_tir.transform.StmtSimplify(),
            tirx.transform.FlattenBuffer(),
            tirx.transform.VectorizeLoop(True),
            tirx.transform.UnrollLoop(),
            tirx.transform.StmtSimplify(),
            tirx.transform.RemoveNoOp(),
            tirx.transform.LowerIntrin(),
        ]
    )(module)


def compile_object(
    kernels: Sequence[Kernel],
    isa: Isa,
    path: str | os.PathLike[str],
    settings: Settings = DEFAULTS,
    *,
    assembly: bool = False,
) -> Path:
    """Compile kernels for one instruction set into one object file (or assembly, for reading), atomically.

    settings: values of knobs by group (knobs.py).

    Returns:
        the path written.
    """
    more = {k.attributes for k in kernels}
    if len(more) > 1:
        raise ValueError(f"kernels of one object differ in their features: {sorted(more)}")
    target = isa.target(more.pop() if more and isa.vnni else ())
    with target:
        module = _lower({k.symbol(isa): k.prim_func(isa, settings) for k in kernels}, target)
        built = tvm.get_global_func("target.build.llvm")(module, target)
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        name = "object.s" if assembly else "object.o"
        built.write_to_file(str(Path(scratch, name)), "asm" if assembly else "o")
        os.replace(Path(scratch, name), path)
    return path


def header(
    kernels: Sequence[Kernel],
    guard: str = "ISOFOLD_KERNELS_H",
    settings: Mapping[str, Settings] | None = None,
) -> str:
    """The C header: a prototype per kernel and instruction set, a table of pointers, and one table per
    instruction set.

    ``struct isofold_kernels`` has one member per kernel and one int64_t per knob of the drivers;
    ``isofold_kernels_v3`` and ``isofold_kernels_v4`` are filled constants of it, so that a caller picks the
    instruction set once: ``k = has_vnni ? &isofold_kernels_v4 : ...``.

    settings: values of knobs, by the instruction set's name.
    """
    lines = ["// Generated by isofold; do not edit.", f"#ifndef {guard}", f"#define {guard}"]
    lines += ["#include <stdint.h>"]
    lines += ["#ifdef __cplusplus", 'extern "C" {', "#endif"]
    for isa in ISAS:
        for k in kernels:
            arguments = ", ".join(f"{p.ctype} {p.name}" for p in k.parameters)
            lines.append(f"void {k.symbol(isa)}({arguments});")
    lines += ["#ifdef __cplusplus", "}", "#endif", "struct isofold_kernels {"]
    for k in kernels:
        arguments = ", ".join(f"{p.ctype} {p.name}" for p in k.parameters)
        lines.append(f"  void (*{k.name})({arguments});")
    lines += [f"  int64_t {name};" for name in driver_values(DEFAULTS, V3.name)]
    lines.append("};")
    for isa in ISAS:
        chosen = (settings or {}).get(isa.name, DEFAULTS)
        lines.append(f"static {table(kernels, isa, f'isofold_kernels_{isa.name}', chosen)}")
    return "\n".join([*lines, "#endif", ""])


def table(
    kernels: Sequence[Kernel], isa: Isa, name: str, settings: Settings, groups: Collection[str] | None = None
) -> str:
    """The C definition of one filled ``struct isofold_kernels``; kernels outside of ``groups`` are null."""
    members = [k.symbol(isa) if groups is None or k.group in groups else "0" for k in kernels]
    members += [str(chosen) for chosen in driver_values(settings, isa.name).values()]
    return f"const struct isofold_kernels {name} = {{{', '.join(members)}}};"


def build_objects(
    kernels: Sequence[Kernel],
    out_dir: str | os.PathLike[str],
    progress: Callable[[str, int, int], None] | None = None,
    workers: int | None = None,
    settings: Mapping[str, Settings] | None = None,
) -> list[Path]:
    """Compile all kernels for all instruction sets into ``out_dir``, one object per group and instruction
    set.

    The header is written beside them as ``kernels.h``. The v3 objects come first in the result, and must
    come first on the linker's command line: every object carries weak copies of LLVM's float16 helpers
    compiled for its own level, and the linker keeps the first.

    Args:
        progress: called as ``progress(what, done, total)`` after each object.
        workers: processes; by default the number of usable cores.
        settings: values of knobs, by the instruction set's name.

    Raises:
        ValueError: two kernels of one name.
    """
    names = [k.name for k in kernels]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"kernel names used twice: {', '.join(twice)}")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Kernel]] = {}
    for k in kernels:
        groups.setdefault(k.group, []).append(k)
    jobs = [(members, isa, out / f"{name}_{isa.name}.o") for isa in ISAS for name, members in groups.items()]
    workers = min(len(jobs), workers or len(os.sched_getaffinity(0)))
    # spawn: a forked child would inherit the locks of the parent's thread pools (torch) in unknown states
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        slowest_first = sorted(jobs, key=lambda job: -len(job[0]))
        futures = {
            pool.submit(compile_object, *job, (settings or {}).get(job[1].name, DEFAULTS)): job[2]
            for job in slowest_first
        }
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            if progress is not None:
                progress(futures[future].name, done, len(jobs))
    scratch = out / f"kernels.h.{os.getpid()}"
    scratch.write_text(header(kernels, settings=settings))
    os.replace(scratch, out / "kernels.h")
    return [path for _, _, path in jobs]
