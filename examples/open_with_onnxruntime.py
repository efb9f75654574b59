"""Open an artefact with onnxruntime alone: no torch, no isofold.

    python examples/open_with_onnxruntime.py ARTEFACT

The lines that matter are the first three of `main`. Without the second the same file runs on stock ONNX Runtime,
through the function bodies in it, at the speed and size of float32.
"""

from __future__ import annotations

import sys

import numpy
import onnxruntime


def main(folder: str) -> None:
    """Run the example inputs that the artefact was compiled with."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(f"{folder}/libisofold_ops.so")
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options)

    with numpy.load(f"{folder}/examples.npz") as inputs:
        results = session.run(None, dict(inputs))
    for port, result in zip(session.get_outputs(), results, strict=True):
        print(f"{port.name}: {result.dtype} {list(result.shape)}, mean {result.mean():.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
