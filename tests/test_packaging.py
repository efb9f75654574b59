"""What pyproject.toml declares is what is there."""

from __future__ import annotations

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
