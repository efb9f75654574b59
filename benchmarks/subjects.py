"""Models that several benchmarks measure, built once into the cache: seeded random weights, so speed only.

The file name carries a hash of the configuration and of the versions that shape the export, so a changed
library never reuses an old file.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peers import cache_folder

if TYPE_CHECKING:
    import torch

SEQUENCE = 128
SEED = 20261122


def subject_folder(*key: object) -> Path:
    """A folder of the cache for this subject and these versions."""
    versions = [
        f"{name}={metadata.version(name)}" for name in ("torch", "transformers", "onnx", "onnxruntime")
    ]
    digest = hashlib.sha256("\n".join([*map(str, key), *versions]).encode()).hexdigest()[:12]
    folder = cache_folder() / "benchmarks" / f"{key[0]}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def bert_base() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """BERT-base (768 wide, 12 heads, no pooler) and its inputs by name: batch 1, sequence 128, nothing
    padded."""
    import torch

    from isofold.models import registry

    case = registry.get("bert", "base", seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, 30000, (1, SEQUENCE), generator=generator)
    return case.module, {"input_ids": ids, "attention_mask": torch.ones(1, SEQUENCE, dtype=torch.int64)}


def bert_onnx() -> tuple[Path, Path]:
    """BERT-base as float32 ONNX by torch.onnx alone (nothing of isofold), static shapes, and its inputs
    (.npz)."""
    import onnx
    import torch

    folder = subject_folder("bert-base", SEQUENCE, SEED)
    path, inputs = folder / "float32.onnx", folder / "inputs.npz"
    if path.exists() and inputs.exists():
        return path, inputs
    model, feeds = bert_base()
    arrays: dict[str, Any] = {name: value.numpy() for name, value in feeds.items()}
    np.savez(inputs, **arrays)
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter deprecates parts of itself aloud.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (),
            kwargs=feeds,
            dynamo=True,
            opset_version=20,
            output_names=["hidden"],
            verbose=False,
        )
    assert program is not None
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    # One file: BERT-base stays well below protobuf's 2 GB.
    onnx.save(program.model_proto, str(beside))
    beside.replace(path)
    return path, inputs


def onnxruntime_dynamic_int8(float32: Path) -> Path:
    """What ONNX Runtime's own quantize_dynamic makes of the file, per channel, after its pre-processing."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    target = float32.with_name("onnxruntime-dynamic-int8.onnx")
    if target.exists():
        return target
    ready = float32.with_name("pre-processed.onnx")
    beside = target.with_suffix(".tmp")
    quant_pre_process(str(float32), str(ready), skip_symbolic_shape=True)
    quantize_dynamic(str(ready), str(beside), per_channel=True, weight_type=QuantType.QInt8)
    ready.unlink()
    beside.replace(target)
    return target


def openvino_int8(python: Path, float32: Path, inputs: Path) -> Path:
    """OpenVINO IR quantized after training by NNCF, written by the peer's own interpreter
    (nncf_quantize.py)."""
    import subprocess

    from harness import BenchmarkError

    target = float32.with_name("openvino-nncf-int8.xml")
    if target.exists():
        return target
    script = Path(__file__).resolve().parent / "nncf_quantize.py"
    done = subprocess.run(
        [str(python), str(script), str(float32), str(inputs), str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not target.exists():
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-8:])
        raise BenchmarkError(f"NNCF did not quantize {float32}:\n{tail}")
    return target
