"""Memory: how much there is, and an error before it runs out instead of a killed process."""

from __future__ import annotations

import psutil

from .errors import InputError


def require_memory(needed: int, what: str) -> None:
    """Raise InputError when `needed` bytes for `what` exceed the memory that is available now."""
    available = int(psutil.virtual_memory().available)
    if needed > available:
        raise InputError(
            f"Not enough memory for {what}",
            expected=f"{needed / 2**30:.2f} GiB",
            got=f"{available / 2**30:.2f} GiB available",
            hint="close other programs, use a machine with more memory, or compile a smaller model",
        )
