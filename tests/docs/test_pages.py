"""What the pages name exists: links, files, commands and options, presets, recipe fields, operators."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from isofold import PRESETS, Recipe
from isofold.compiler import errors, formats
from isofold.compiler.cli import app
from isofold.compiler.dialect import OPERATORS

from ..conftest import ROOT

PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "runtimes/*/*.md")
    for path in ROOT.glob(pattern)
)
SOURCES = {path.relative_to(ROOT) for path in ROOT.rglob("*.*") if ".venv" not in path.parts}
NOT_SOURCES = {
    "isofold.json",
    "config.json",
    "report.json",
    "kernels.h",
    "hadamard_signs.h",
    "other.jsonl",
    "tuning.jsonl",
    "cuda_fp16.h",
}
"""Files that isofold writes, or that others bring."""
FORMATS: dict[str, type[BaseModel]] = {
    "weights": formats.WeightFormat,
    "activations": formats.ActivationFormat,
    "embeddings": formats.EmbeddingFormat,
    "convolutions": formats.ConvolutionFormat,
    "kv": formats.CacheFormat,
    "sparsity": formats.Sparsity,
    "prune": formats.Prune,
    "fold": formats.Fold,
}
every_page = pytest.mark.parametrize("page", PAGES, ids=str)


def text_of(page: str | Path) -> str:
    return (ROOT / page).read_text()


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        there = ROOT / page.parent / file if file else ROOT / page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@every_page
def test_named_files_exist(page: Path) -> None:
    named = set(re.findall(r"`(?:\.\./)?([\w./*-]+\.(?:py|h|cc|jsonl?|c|jinja))`", text_of(page)))
    missing = [name for name in named - NOT_SOURCES if not any(path.match(name) for path in SOURCES)]
    assert not missing


@every_page
def test_commands_and_their_options_exist(page: Path) -> None:
    text = text_of(page)
    lines = re.findall(r"^(?: {4})?(isofold [a-z].*)$", text, re.M) + re.findall(
        r"`(isofold [a-z][^`|]*)`", text
    )
    for line in lines:
        _, name, *words = shlex.split(line, comments=True)
        command: Any = typer.main.get_command(app)
        command = command.commands[name]
        options = {word for option in command.params for word in option.opts}
        assert {word for word in words if word.startswith("-")} <= options, line


@every_page
def test_benchmarks_and_their_options_exist(page: Path) -> None:
    harness = text_of("benchmarks/harness.py")
    for name, rest in re.findall(r"`(?:python benchmarks/)?(\w+)\.py((?: [^`]*)?)`", text_of(page)):
        script = ROOT / f"benchmarks/{name}.py"
        for option in re.findall(r"--[a-z-]+", rest) if script.exists() else ():
            assert f'"{option}"' in script.read_text() + harness, f"{name}.py {option}"


@every_page
def test_python_is_python_and_imports_what_exists(page: Path) -> None:
    for code in re.findall(r"^```python\n(.*?)^```", text_of(page), re.S | re.M):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), {})


def test_commands_and_errors_are_those_of_the_page() -> None:
    page = text_of("docs/command-line.md")
    start, *_, errors_table = page.split("\n## ")
    command: Any = typer.main.get_command(app)
    assert re.findall(r"^\| `(\w+)`", start, re.M) == list(command.commands)
    classes = {
        name for name, held in vars(errors).items() if isinstance(held, type) and name.endswith("Error")
    }
    assert {*re.findall(r"^\| `(\w+)`", errors_table, re.M), "IsofoldError"} == classes


def test_presets_are_those_of_the_table() -> None:
    table = text_of("docs/recipes.md").split("## Presets")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)`", table, re.M)) == sorted(PRESETS)


def test_fields_are_those_of_the_tables() -> None:
    rows = re.findall(r"^\| `(\w+)\.(\w+)`([^|]*)", text_of("docs/recipes.md"), re.M)
    named = {
        (kind, field) for kind, first, rest in rows for field in (first, *re.findall(r"`\.(\w+)`", rest))
    }
    assert named == {(kind, field) for kind, form in FORMATS.items() for field in form.model_fields}
    assert set(Recipe.model_fields) == {*FORMATS, "name", "fuse", "layers"}


def test_yaml_is_a_recipe() -> None:
    for text in re.findall(r"^```yaml\n(.*?)^```", text_of("docs/recipes.md"), re.S | re.M):
        Recipe.from_yaml(text)


def test_operators_are_those_of_the_page_with_their_arguments() -> None:
    page = re.sub(r"\s+", " ", text_of("docs/dialect.md"))
    for operator in OPERATORS.values():
        arguments = re.sub(r"\s+", " ", str(operator.overload._schema).partition("(")[2].partition(") ->")[0])
        assert f"`({arguments}) ->" in page, operator.name
        assert f"{operator.name} → `{operator.onnx_name}`" in page
