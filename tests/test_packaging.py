"""What pyproject.toml declares is what is there."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path


def test_every_package_is_listed(root: Path) -> None:
    declared = set(tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    tops = ("compiler", "passes", "runtimes", "models")
    folders = [p.parent.relative_to(root) for top in tops for p in (root / top).rglob("__init__.py")]
    assert declared == {"isofold"} | {".".join(("isofold", *f.parts)) for f in folders}


def test_every_dependency_has_its_reason(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    reasons = (root / "docs/dependencies.md").read_text()
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {
        line.split("[")[0].split("=")[0].split(">")[0].split("~")[0] for group in groups for line in group
    }
    assert [name for name in sorted(names - {"isofold"}) if name not in reasons] == []


def test_every_dependency_is_imported(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    modules = {"apache-tvm": "tvm", "apache-tvm-ffi": "tvm", "onnx-ir": "onnx_ir", "pyyaml": "yaml"}
    # torch.onnx imports onnxscript itself and fails without it.
    indirect = {"onnxscript"}
    files = [f for top in ("compiler", "passes", "runtimes") for f in (root / top).rglob("*.py")]
    source = "\n".join(f.read_text() for f in files)
    names = {re.split(r"[~=><\[]", line)[0] for line in project["dependencies"]} - indirect
    found = {n for n in names if re.search(rf"^\s*(import|from) {modules.get(n, n)}\b", source, re.M)}
    assert names - found == set()


def test_no_architecture_is_named_in_compiler_or_passes(root: Path) -> None:
    families = (
        "bert",
        "llama",
        "qwen",
        "whisper",
        "mamba",
        "bamba",
        "neox",
        "hifigan",
        "convnext",
        "resnet",
        "wav2vec",
    )
    found = []
    for top in ("compiler", "passes"):
        for file in sorted((root / top).rglob("*.py")):
            if file.name == "demo.py":  # the demonstration loads one real model by its package's name
                continue
            text = file.read_text().lower()
            found += [f"{file.relative_to(root)}: {family}" for family in families if family in text]
    assert found == []


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "isofold", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == importlib.metadata.version("isofold")
