"""What happens to the CUDA source that TVM generates: a cubin, or a library of the emulator.

TVM 0.27 hands the source of a module's kernels to the global function `ffi.Module.create.cuda` and keeps what it
returns as the host module's import. :func:`creating` puts a function of ours there for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

CREATE = "ffi.Module.create.cuda"
DEVICE_HEADER = Path(__file__).with_name("device.h")


@dataclass(frozen=True)
class KernelInfo:
    """What a host function passes to a kernel: the types of its arguments, then launch parameters of these tags."""

    name: str
    arguments: tuple[str, ...]
    launch: tuple[str, ...]


@dataclass(frozen=True)
class DeviceSource:
    """The source of a module's kernels as TVM generated it, and their signatures (`handle`: TVM's own record)."""

    code: str
    kernels: tuple[KernelInfo, ...]
    handle: Any


def with_header(code: str) -> str:
    """Generated source below the device functions it calls."""
    return f"{DEVICE_HEADER.read_text()}\n{code}"


def kernel_infos(records: Any) -> tuple[KernelInfo, ...]:
    """TVM's map of function records as plain data."""
    return tuple(
        KernelInfo(str(name), tuple(map(str, info.arg_types)), tuple(map(str, info.launch_param_tags)))
        for name, info in records.items()
    )


@contextmanager
def creating(create: Callable[[DeviceSource], Any]) -> Iterator[None]:
    """While active, `create` makes the device modules of everything that is built for CUDA."""
    before = tvm.get_global_func(CREATE, allow_missing=True)

    def hook(code: Any, _format: str, records: Any, *_: Any) -> Any:
        text = code if isinstance(code, str) else bytes(code).decode()
        return create(DeviceSource(text, kernel_infos(records), records))

    tvm_ffi.register_global_func(CREATE, hook, override=True)
    try:
        yield
    finally:
        if before is None:
            tvm_ffi.remove_global_func(CREATE)
        else:
            tvm_ffi.register_global_func(CREATE, before, override=True)


def target_for(arch: str, device_type: int = 2) -> tvm.target.Target:
    """TVM's target of an architecture such as sm_80. device_type: where its host functions expect tensors (DLPack)."""
    return tvm.target.Target(
        {
            "kind": "cuda",
            "arch": arch,
            "max_threads_per_block": 1024,
            "host": {"kind": "llvm"},
            "target_device_type": device_type,
        }
    )


def build_kernels(functions: dict[str, tirx.PrimFunc], target: tvm.target.Target) -> Any:
    """Build TIR kernels with whatever makes device modules at the moment: those of `builder.prim_func`, or scheduled
    ones of TVM's, which its other pipeline is for."""
    blocks = any((f.attrs or {}).get("s_tir") for f in functions.values())
    return tvm.tirx.build(tvm.IRModule(functions), target, "s_tir" if blocks else "tirx")
