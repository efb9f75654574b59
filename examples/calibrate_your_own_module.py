"""Compile your own nn.Module with activation ranges measured on your own data, and a recipe of your own.

python examples/calibrate_your_own_module.py [artefact folder]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.export import Dim

import isofold

RECIPE = {
    "name": "static-int8",
    "weights": {"bits": 8},
    "activations": {"mode": "static", "percentile": 99.99},
    # The last layer keeps its float weights: globs over module paths, later rules win.
    "layers": [{"match": "head", "weights": None}],
}


class Classifier(nn.Module):
    """Features float32 `[batch, 128]` → logits `[batch, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU())
        self.head = nn.Linear(512, 10)

    def forward(self, features: Tensor) -> Tensor:
        """One batch."""
        logits: Tensor = self.head(self.body(features))
        return logits


def batches(count: int) -> Iterator[Tensor]:
    """What your data loader would give."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(32, 128, generator=generator)


def main(folder: str = "classifier-int8") -> None:
    """Compile with calibration, then see what was done to each layer and what was left alone."""
    torch.manual_seed(0)
    model = Classifier().eval()
    example = next(batches(1))
    compiled = isofold.compile(
        model,
        (example,),
        recipe=RECIPE,
        calibration=batches(16),
        dynamic_shapes=({0: Dim("batch", min=1, max=4096)},),
        output=folder,
        overwrite=True,
    )
    for row in compiled.report["layers"]:
        print(
            f"{row['module']}: {row['bytes_before']:,} -> {row['bytes_after']:,} bytes, error {row['error']:.4f}"
        )
    for group in compiled.report["refused"]:
        print(f"left alone in {len(group['places'])} places: {group['reason']}")
    agree = compiled(example).argmax(1) == model(example).argmax(1)
    print(f"same class for {int(agree.sum())} of {len(agree)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
