"""Public architectures as examples, coverage tests and benchmark subjects.

`names()` lists them, `get(name, size="tiny")` builds one from its `transformers` configuration with seeded
random weights. Nothing else in isofold imports this folder.
"""

from __future__ import annotations

from .registry import get, names, sizes

__all__ = ["get", "names", "sizes"]
