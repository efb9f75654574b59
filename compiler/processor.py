"""What identifies this machine, and where its files are kept. Imports nothing heavy."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path


def cache_folder() -> Path:
    """`ISOFOLD_CACHE`, else `XDG_CACHE_HOME`/isofold, else ~/.cache/isofold."""
    chosen = os.environ.get("ISOFOLD_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "isofold"


def processor() -> str:
    """The processor's name with family and model, which hypervisors leave in place when they shorten the name."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, text = line.partition(":")
            facts.setdefault(name.strip(), text.strip())
    except OSError:
        return platform.processor() or platform.machine()
    return f"{facts.get('model name', platform.machine())} ({facts.get('cpu family')}/{facts.get('model')})"


def expands_bytes() -> bool:
    """Whether the op library will use its kernels for AVX512-VBMI2 here."""
    needed = {"avx512vbmi", "avx512_vbmi2", "avx512_bitalg", "avx512_vpopcntdq", "avx512_vnni"}
    return os.environ.get("ISOFOLD_ISA") != "v3" and needed <= _flags()


@lru_cache(maxsize=1)
def _flags() -> frozenset[str]:
    """Features of the first processor in /proc/cpuinfo; empty where there is no such file."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, text = line.partition(":")
            if name.strip() == "flags":
                return frozenset(text.split())
    except OSError:
        pass
    return frozenset()
