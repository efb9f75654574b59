"""The command line as a user types it: results on stdout, progress and errors on stderr, nothing half-written."""

from __future__ import annotations

import html
import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from isofold.compiler.cli import app

from ..processes import PATIENCE, ended, interruptible

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


def make():
    torch.manual_seed(0)
    return Net(), (torch.randn(2, 8, 64),)


def broken():
    raise ValueError("no weights here")


def branching():
    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    return Branching(), (torch.randn(3),)


number = 3


def case(name):
    from isofold.models import registry

    found = registry.get(name)
    return found.module, found.args


def llama():
    return case("llama")


def bert():
    return case("bert")
"""


STANDS_STILL = """
import sys, time
from isofold.runtimes.onnx import export

def stands_still(*_, **__):
    print("writing", file=sys.stderr, flush=True)
    time.sleep(1000)

export._write_external = stands_still
"""
"""A model's file with which compiling stops while it writes weights, in the folder beside the output."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with net.py and its compiled artefact net-w8a8."""
    path = tmp_path_factory.mktemp("cli")
    (path / "net.py").write_text(MODEL)
    before = Path.cwd()
    os.chdir(path)
    try:
        done = CliRunner().invoke(app, ["compile", "python:net.py:make", "-o", "net-w8a8"])
        assert done.exit_code == 0, done.output
        yield path
    finally:
        os.chdir(before)


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def error_of(*words: str) -> str:
    """The text on stderr of a command that must fail as a user's error, with nothing on stdout."""
    done = invoke(*words, "--quiet")
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    return done.stderr


def test_help_is_quick_for_it_imports_nothing_large() -> None:
    """Of what isofold depends on only what reads the command line and prints: torch alone takes over a second."""
    code = """
import sys
import sysconfig
from isofold.compiler.cli import main
sys.argv = ["isofold", "--help"]
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    large = {
        "torch",
        "numpy",
        "onnx",
        "onnxruntime",
        "onnx_ir",
        "onnxscript",
        "tvm",
        "transformers",
        "safetensors",
    }
    assert loaded & (large | {"pydantic", "yaml", "jinja2", "psutil"}) == set()
    assert {"typer", "rich"} <= loaded


def test_help_lists_every_command() -> None:
    done = invoke("--help")
    assert done.exit_code == 0
    for name in ("compile", "export", "run", "bench", "inspect", "build", "demo"):
        assert name in done.stdout


def test_compile_says_what_it_did_and_writes_the_report(folder: Path) -> None:
    done = invoke("compile", "python:net.py:make", "-o", "net-w8a8", "--force")
    assert done.exit_code == 0
    assert "times smaller" in done.stdout
    assert "98.7 % quantized in 2 layers" in done.stdout
    assert "quantize_weights" in done.stderr
    assert "quantize_weights" not in done.stdout
    page = (folder / "net-w8a8" / "report.html").read_text()
    assert "Net, compiled with w8a8" in page
    report = json.loads((folder / "net-w8a8" / "report.json").read_text())
    assert [row["module"] for row in report["layers"]] == ["up", "down"]
    assert all(row["microseconds"] >= 0 for row in report["layers"]), "None where it was not measured"


def test_json_is_all_of_stdout(folder: Path) -> None:
    done = invoke("compile", "python:net.py:make", "-r", "w4a16", "--json", "--no-verify")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["artefact"] == "make-w4a16"
    assert facts["recipe"]["name"] == "w4a16"
    assert (folder / "make-w4a16" / "model.onnx").is_file()


def test_the_fp8_preset_compiles_and_runs(folder: Path) -> None:
    done = invoke("compile", "python:net.py:make", "-r", "fp8", "-o", "net-fp8", "-q")
    assert done.exit_code == 0, done.stderr
    report = json.loads((folder / "net-fp8" / "report.json").read_text())
    assert report["recipe"]["activations"]["format"] == "e4m3"
    assert "bits" not in report["recipe"]["activations"]
    assert {row["operator"] for row in report["layers"]} == {"linear_fp8"}
    assert invoke("run", "net-fp8", "--json", "-q").exit_code == 0


def test_export_writes_one_file_that_onnxruntime_opens(folder: Path) -> None:
    import onnxruntime

    done = invoke("export", "python:net.py:make", "net.onnx", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    session = onnxruntime.InferenceSession("net.onnx")
    assert session.run(None, {"x": np.zeros((2, 8, 64), np.float32)})[0].shape == (2, 8, 64)
    assert "The output file exists already" in error_of("export", "python:net.py:make", "net.onnx")


def test_run_writes_what_the_model_computes(folder: Path) -> None:
    x = np.random.default_rng(0).standard_normal((2, 8, 64)).astype(np.float32)
    np.savez("x.npz", x=x)
    done = invoke("run", "net-w8a8", "--inputs", "x.npz", "--outputs", "y.npz")
    assert done.exit_code == 0, done.stderr
    assert "written to y.npz" in done.stdout
    sys.path.insert(0, str(folder))
    try:
        import net  # type: ignore[import-not-found] # written by the fixture
    finally:
        sys.path.remove(str(folder))
    module, _ = net.make()
    want = module(torch.from_numpy(x)).detach().numpy()
    with np.load("y.npz") as written:
        (got,) = written.values()
    assert np.abs(got - want).max() < 0.03 * np.abs(want).max()
    assert "The output file exists already" in error_of("run", "net-w8a8", "-i", "x.npz", "-o", "y.npz")


def test_run_without_inputs_takes_the_examples(folder: Path) -> None:
    done = invoke("run", "net-w8a8", "--json", "-q")
    summary = json.loads(done.stdout)
    assert summary["inputs"] == {"x": {"dtype": "float32", "shape": [2, 8, 64]}}
    assert all(facts["not_finite"] == 0 for facts in summary["outputs"].values())


def test_bench_compares_in_turns(folder: Path) -> None:
    if not Path("net-float32").exists():
        assert (
            invoke("compile", "python:net.py:make", "-r", "float32", "-o", "net-float32", "-q").exit_code == 0
        )
    words = (
        "bench",
        "net-w8a8",
        "--against",
        "net-float32",
        "--against",
        "net-float32/model.onnx",
        "--seconds",
        "0.1",
    )
    rows = json.loads(invoke(*words, "--json", "-q").stdout)
    assert [row["name"] for row in rows] == ["net-w8a8", "net-float32", "net-float32/model.onnx"]
    assert len({row["runs"] for row in rows}) == 1
    assert rows[0]["ratio"] == 1.0
    assert all(
        row["least"] <= row["first_quartile"] <= row["median"] <= row["third_quartile"] for row in rows
    )
    assert rows[0]["bytes"] < rows[1]["bytes"] / 2
    assert "median" in invoke(*words).stdout


def test_inspect_a_model_shows_what_becomes_of_each_weight(folder: Path) -> None:
    facts = json.loads(invoke("inspect", "python:net.py:make", "-r", "w4a8", "--json", "-q").stdout)
    becomes = {row["name"]: row["becomes"] for row in facts["weights"]}
    assert becomes["up.weight"].startswith("int4, groups of 32")
    table = invoke("inspect", "python:net.py:make", "-r", "float32", "-q").stdout
    assert "stays float: not chosen by the recipe" in table


def rows_of(table: str, first: str) -> list[str]:
    """The lines of a table that begin with a word, their cells one space apart."""
    return [" ".join(line.split()) for line in table.splitlines() if line.startswith(first)]


def test_inspect_shows_the_channel_spaces_of_a_decoder(folder: Path) -> None:
    done = invoke("inspect", "python:net.py:llama", "--spaces", "-q")
    assert done.exit_code == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("llama: 11 channel spaces; 5 of 5 gains fold; ")
    rows = rows_of("\n".join(rest), "space")[1:]
    assert len(rows) == 11
    assert rows[0].startswith(
        "space0 64 orthogonal 21 model.model.embed_tokens.weight (1), all fold rms_norm"
    )
    assert "modeling_llama.py:" in done.stdout
    assert "and 18 more" in done.stdout
    for start in (
        "space3 16 x 2 rotary pairs 2 ",
        "space4 16 x 2 general 2 ",
        "space5 96 permutations 3 ",
        "space10 96 permutations 3 ",
    ):
        assert any(row.startswith(start) for row in rows), (start, rows)
    assert "that stay" not in done.stdout


def test_inspect_says_why_gains_do_not_fold(folder: Path) -> None:
    done = invoke("inspect", "python:net.py:bert", "--spaces", "-q")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("bert: 8 channel spaces; 0 of 5 gains fold; ")
    assert rows_of(done.stdout, "space3")[0].startswith("space3 96 permutations 3 ")
    because = done.stdout.partition("that stay (decided at)")[2]
    assert "layer_norm of a scaled value" in because
    assert "it is an output of the program" in because


def test_inspect_spaces_as_json(folder: Path) -> None:
    facts = json.loads(invoke("inspect", "python:net.py:make", "--spaces", "--json", "-q").stdout)
    assert facts["kind"] == "spaces"
    assert set(facts) == {"kind", "model", "summary", "spaces", "gains"}
    assert set(facts["summary"]) == {"spaces", "gains", "foldable", "free_scales", "free_shifts"}
    (hidden,) = facts["spaces"]
    assert hidden["channels"] == 256
    assert hidden["group"] == "permutations"
    assert hidden["copies"] == 1
    assert hidden["gains"] == []
    assert [(m["name"], m["axis"]) for m in hidden["parameters"]] == [
        ("up.weight", 0),
        ("up.bias", 0),
        ("down.weight", 1),
    ]
    assert set(hidden["bound"]) == {"group", "why", "module", "node", "source"}
    assert "relu" in hidden["bound"]["why"]
    assert "net.py" in hidden["bound"]["source"]
    (gain,) = facts["gains"]
    assert gain["name"] == "norm.weight"
    assert not gain["folds"]
    assert "output" in gain["kept"]["why"]


def test_inspect_an_artefact_verifies_its_files(folder: Path, tmp_path: Path) -> None:
    done = invoke("inspect", "net-w8a8", "--html", str(tmp_path / "page.html"))
    assert done.exit_code == 0, done.stderr
    assert "all files are as they were written" in done.stdout
    assert "PackedLinear" in done.stdout
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_inspect_names_a_changed_file(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree("net-w8a8", copy)
    content = bytearray((copy / "weights.bin").read_bytes())
    content[0] ^= 1
    (copy / "weights.bin").write_bytes(content)
    done = invoke("inspect", str(copy))
    assert done.exit_code == 2
    assert "damaged: weights.bin has another content than was written" in done.stdout


def test_build_is_quick_the_second_time() -> None:
    facts = json.loads(invoke("build", "--json", "-q").stdout)
    assert Path(facts["path"]).is_file()
    assert facts["target"] == "cpu"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("compile", "python:net.py:make", "-r", "w8a7"), ("Unknown recipe 'w8a7'", "did you mean 'w8a8'")),
        (("compile", "python:net.py:make", "--target", "gpu"), ("Unknown target 'gpu'", "expected: cpu")),
        (("compile", "python:net.py:mke"), ("has no 'mke'", "did you mean 'make'")),
        (
            ("compile", "python:net.py:broken"),
            ("raised an error", "net.py:23", "ValueError: no weights here"),
        ),
        (("compile", "python:net.py:number"), ("does not give a model", "got: int")),
        (("compile", "python:net.py"), ("The Python reference is incomplete", "python:file.py:name")),
        (("compile", "python:nowhere.py:make"), ("There is no such Python file", "nowhere.py")),
        (("compile", "python:no_such_module:make"), ("'no_such_module' cannot be imported",)),
        (
            ("compile", "nt.py"),
            ("There is no such model", "got: no such file or folder", "did you mean 'net.py'"),
        ),
        (
            ("compile", "net-w8a8"),
            ("This is a compiled artefact, not a model", "isofold inspect, run and bench"),
        ),
        (
            ("compile", "python:net.py:make", "-o", "net-w8a8"),
            ("The output folder exists", "allow overwriting"),
        ),
        (("compile", "python:net.py:branching"), ("net.py:29", "torch.where")),
        (("compile", "python:net.py:make", "-r", "w8a8-static"), ("static activation ranges", "calibration")),
        (("compile", "python:net.py:make", "-r", "fp8-static"), ("static activation ranges", "calibration")),
        (
            ("compile", "python:net.py:make", "--calibration", "none.npz"),
            ("There is no such data file", "where: none.npz"),
        ),
        (("run", "nowhere"), ("This is not an isofold artefact", "got: no such folder")),
        (
            ("inspect", "python:net.py:make", "--html", "page.html"),
            ("A page can only be written for an artefact",),
        ),
        (("inspect", "net-w8a8", "--spaces"), ("Channel spaces are those of a model", "where: net-w8a8")),
        (("inspect", "python:net.py:mke", "--spaces"), ("has no 'mke'", "did you mean 'make'")),
        (
            ("inspect", "python:net.py:make", "--spaces", "--html", "page.html"),
            ("A page can only be written for an artefact",),
        ),
        (
            ("compile", "python:net.py:make", "-r", "w8a8-smooth"),
            ("The recipe has transforms, which are chosen on data", "fold.scale: cle"),
        ),
        (("bench", "net-w8a8", "--against", "none.onnx"), ("There is no such file", "none.onnx")),
    ],
)
def test_errors_say_what_where_and_what_to_try(
    folder: Path, words: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    text = error_of(*words)
    assert text.startswith("error: ")
    for part in expected:
        assert part in text, text
    assert "Traceback" not in text


def test_inputs_with_other_names_are_listed(folder: Path) -> None:
    np.savez("wrong.npz", X=np.zeros((2, 8, 64), np.float32))
    text = error_of("run", "net-w8a8", "-i", "wrong.npz")
    assert "The file's arrays are not the model's inputs" in text
    assert "expected: x float32[2, 8, 64]" in text
    assert "got: X" in text


def test_inputs_of_the_wrong_shape_are_an_error(folder: Path) -> None:
    np.savez("short.npz", x=np.zeros((2, 8, 32), np.float32))
    assert "x: expected shape [2, 8, 64], got [2, 8, 32]" in error_of("run", "net-w8a8", "-i", "short.npz")


def test_a_file_that_is_no_archive_is_an_error(folder: Path) -> None:
    Path("noise.npz").write_bytes(b"not a zip file")
    assert "The data file cannot be read" in error_of("run", "net-w8a8", "-i", "noise.npz")


def test_calibration_data_with_nan_is_an_error(folder: Path) -> None:
    np.savez("nan.npz", **{"x.0": np.full((2, 8, 64), np.nan, np.float32)})
    text = error_of(
        "compile", "python:net.py:make", "-r", "w8a8-static", "--calibration", "nan.npz", "-o", "static"
    )
    assert "NaN" in text or "not finite" in text
    assert not Path("static").exists()


def test_static_ranges_come_from_numbered_batches(folder: Path) -> None:
    noise = np.random.default_rng(0)
    np.savez(
        "calibration.npz",
        **{f"x.{i}": noise.standard_normal((2, 8, 64)).astype(np.float32) for i in range(3)},
    )
    done = invoke(
        *("compile", "python:net.py:make", "-r", "w8a8-static", "--calibration", "calibration.npz"),
        *("-o", "net-static", "-q", "--force"),
    )
    assert done.exit_code == 0, done.stderr


def test_debug_shows_the_traceback(folder: Path) -> None:
    done = invoke("compile", "python:net.py:make", "-r", "w8a7", "--debug", "-q")
    assert done.exit_code == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert "error: Unknown recipe 'w8a7'" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_leaves_nothing_behind(
    folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "net.py").write_text(MODEL + STANDS_STILL)
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, "-m", "isofold.compiler.cli", "compile", "python:net.py:make", "-o", "out"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    with ended(process):
        assert process.stderr is not None
        assert "writing\n" in process.stderr  # reads on until the line comes
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".out.")]
        process.send_signal(number)
        _, rest = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, rest
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["net.py"]
    if number == signal.SIGINT:
        assert "interrupted" in rest


def test_shell_completion_offers_presets_and_targets() -> None:
    cases = (("isofold compile x --recipe w4", {"w4a8", "w4a16"}), ("isofold compile x --target c", {"cpu"}))
    for words, expected in cases:
        environment = {
            **os.environ,
            "_ISOFOLD_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": "4",
        }
        script = str(Path(sysconfig.get_path("scripts"), "isofold"))
        done = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
        assert expected <= set(done.stdout.split()), done


def test_a_transformers_config_needs_no_examples(folder: Path) -> None:
    config: dict[str, object] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128,
    }
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    Path("tiny").mkdir(exist_ok=True)
    Path("tiny/config.json").write_text(json.dumps(config))
    done = invoke("compile", "tiny", "-r", "w4a8", "-q", "--json", "--force")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["artefact"] == "tiny-w4a8"
    # The table is quantized for the lookup and for the head.
    assert 0.9 < facts["totals"]["quantized_share"] < 1


def test_a_damaged_pt2_file_is_an_error(folder: Path) -> None:
    Path("bad.pt2").write_bytes(b"PK nothing")
    text = error_of("compile", "bad.pt2")
    assert "The file is not a readable .pt2 archive" in text
    assert "where: bad.pt2" in text


def test_a_pt2_file_brings_its_inputs(folder: Path) -> None:
    module = torch.nn.Linear(32, 64)
    torch.export.save(torch.export.export(module, (torch.randn(4, 32),)), "linear.pt2")
    done = invoke("compile", "linear.pt2", "-q", "--force")
    assert done.exit_code == 0, done.stderr
    assert (folder / "linear-w8a8" / "isofold.json").is_file()


def test_a_pipe_that_closes_is_no_error(folder: Path) -> None:
    words = f"{sys.executable} -m isofold.compiler.cli inspect net-w8a8 -q --json | head -c 20"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", words], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


CONFIGS: dict[str, dict[str, object]] = {
    "decoder": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "encoder": {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 96, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "recipe"), [("decoder", "w4a4kv4-rotate"), ("encoder", "w4a8-rotate")])
def test_folds_from_a_transformers_folder_to_an_artefact_that_runs(
    folder: Path, name: str, recipe: str
) -> None:
    Path(name).mkdir(exist_ok=True)
    Path(name, "config.json").write_text(json.dumps(CONFIGS[name]))
    done = invoke("compile", name, "-r", recipe, "-o", f"{name}-folded", "-q")
    assert done.exit_code == 0, done.stderr
    assert "\nfolds     " in done.stdout
    assert "transforms left to run time" in done.stdout
    summary = json.loads(invoke("run", f"{name}-folded", "-q", "--json").stdout)
    assert all(result["not_finite"] == 0 for result in summary["outputs"].values())
    page = Path(f"{name}-folded", "report.html").read_text()
    report = json.loads(Path(f"{name}-folded", "report.json").read_text())
    assert report["spaces"]["spaces"]
    assert report["hadamards"]
    folds = {row["pass"]: row for row in report["folds"]}
    assert all(row["error"] < 2e-5 for row in report["folds"] if row["applied"])
    assert folds["fold_rotation"]["applied"]
    # The norms behind a post-norm model's sums keep their gains, and the report says why.
    assert bool(folds["fold_norm_affine"]["refused"]) == (name == "encoder")
    for space in report["spaces"]["spaces"]:
        assert space["name"] in page
    for row in report["folds"]:
        assert all(group["reason"] in html.unescape(page) for group in row["refused"])
    plain = invoke("compile", name, "-r", recipe, "-o", f"{name}-folded", "-q")
    assert plain.exit_code == 2
    assert "The output folder exists" in plain.stderr


def test_a_recipe_with_wrong_folds_lists_every_problem(folder: Path) -> None:
    Path("folds.yaml").write_text("weights: {bits: 4}\nfold: {rotation: hadamrd, scale: awk, onlin: off}\n")
    text = error_of("compile", "python:net.py:make", "-r", "folds.yaml")
    for part in ("where: folds.yaml", "fold.rotation", "'hadamrd'", "fold.scale", "did you mean 'online'"):
        assert part in text
