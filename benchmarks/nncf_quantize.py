"""Quantize an ONNX encoder with NNCF for OpenVINO; runs in the peer's environment (see peers.py).

    python nncf_quantize.py MODEL.onnx INPUTS.npz OUT.xml

Post-training quantization with NNCF's preset for transformers, calibrated on token ids drawn uniformly (the
weights are random: only speed is compared).
"""

from __future__ import annotations

import sys
from pathlib import Path

import nncf
import numpy as np
import openvino

CALIBRATION_SAMPLES = 8


def main() -> None:
    """Read, quantize, write; the .xml appears last, so a cut-off run leaves nothing that looks finished."""
    source, inputs, target = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    with np.load(inputs) as arrays:
        feeds = {name: arrays[name] for name in arrays.files}
    model = openvino.Core().read_model(source)
    names = [port.any_name for port in model.inputs]
    model.reshape({name: openvino.PartialShape(list(feeds[name].shape)) for name in names})
    generator = np.random.default_rng(0)
    samples = []
    for _ in range(CALIBRATION_SAMPLES):
        sample = dict(feeds)
        sample["input_ids"] = generator.integers(0, 30000, feeds["input_ids"].shape)
        samples.append({name: sample[name] for name in names})
    quantized = nncf.quantize(
        model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION_SAMPLES
    )
    beside = target.with_name("beside-" + target.name)
    openvino.save_model(quantized, beside)
    beside.with_suffix(".bin").replace(target.with_suffix(".bin"))
    beside.replace(target)


if __name__ == "__main__":
    main()
