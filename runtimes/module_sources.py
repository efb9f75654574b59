"""What measurements of a generated kernel depend on: the module that emits it, and what that imports of its folder."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path


def sources_digest(folder: Path, module: str, more: Iterable[Path] = (), salt: bytes = b"") -> str:
    """A hash of a module of `folder` with those of the folder that it imports, directly or not, and of more files."""
    digest = hashlib.sha256(salt)
    for path in sorted({*module_closure(folder, module), *more}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def module_closure(folder: Path, module: str) -> set[Path]:
    """The files of `folder` that a module of it consists of: its own, and those it imports relatively, in turn."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        path = folder / f"{waiting.pop()}.py"
        if path in found or not path.exists():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                waiting += [node.module] if node.module else [alias.name for alias in node.names]
    return found
