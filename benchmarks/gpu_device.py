"""The GPU as benchmarks/gpu.py needs it: the one that tuning measures on, with a benchmark's errors."""

from __future__ import annotations

from typing import Any

from harness import BenchmarkError
from isofold.compiler.errors import IsofoldError
from isofold.runtimes.tvm.cuda.gpu import Gpu as Device


class Gpu(Device):
    """GPU 0. Raises BenchmarkError where there is none."""

    def __init__(self) -> None:
        try:
            super().__init__()
        except IsofoldError as error:
            raise BenchmarkError(f"this machine has no GPU that can be used\n{error}") from error

    def _check(self, function: str, *arguments: Any) -> None:
        try:
            super()._check(function, *arguments)
        except RuntimeError as error:
            raise BenchmarkError(str(error)) from error
