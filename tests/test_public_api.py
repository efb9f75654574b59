"""The public API is small, pinned, and costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys

import isofold


def test_names_are_pinned() -> None:
    assert sorted(isofold.__all__) == [
        "Guarantee",
        "IsofoldError",
        "PRESETS",
        "PassResult",
        "Program",
        "Recipe",
        "Step",
        "capture",
        "compile",
        "define_pass",
        "export",
        "load",
        "machine",
        "tune",
    ]


def test_every_name_resolves_and_has_a_docstring() -> None:
    for name in isofold.__all__:
        assert getattr(isofold, name).__doc__, name


def test_importing_and_loading_names_needs_no_torch() -> None:
    code = "import isofold, sys; isofold.load; isofold.IsofoldError; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
