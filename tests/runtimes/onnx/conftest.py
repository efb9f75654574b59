"""The op library, built at most once per machine."""

from __future__ import annotations

import pytest

from isofold.compiler.errors import ToolchainError
from isofold.runtimes.onnx.oplib.build import library_path


@pytest.fixture(scope="session")
def library() -> str:
    try:
        return str(library_path())
    except ToolchainError as error:
        pytest.skip(f"the op library cannot be built here: {error}")
