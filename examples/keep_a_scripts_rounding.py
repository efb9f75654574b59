"""Make a quantization script real: what it only simulates becomes packed integers, with the same results.

The script below stands for any other: it replaces linears by ones that round weights to 4 bits in groups and
activations to 8 bits with a calibrated range, in float. Nothing in it knows of isofold. `recipe="prequantized"` finds
codes, scales and ranges in the graph.

python examples/keep_a_scripts_rounding.py [artefact folder]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

import isofold

GROUP = 64


class SimulatedLinear(nn.Module):
    """What research code puts in the place of `nn.Linear`: it rounds, and computes in float."""

    def __init__(self, source: nn.Linear, low: float, high: float) -> None:
        super().__init__()
        groups = source.weight.detach().unflatten(1, (-1, GROUP))
        step = groups.abs().amax(-1, keepdim=True) / 7
        self.register_buffer("weight", ((groups / step).round().clamp(-8, 7) * step).flatten(1))
        self.bias = source.bias
        self.scale = (high - low) / 255
        self.zero = round(-low / self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Rounded weights on rounded inputs."""
        codes = (torch.round(x / self.scale) + self.zero).clamp(0, 255)
        assert isinstance(self.weight, Tensor)
        return F.linear((codes - self.zero) * self.scale, self.weight, self.bias)


def simulate(model: nn.Module, ids: Tensor) -> None:
    """Replace every linear of a model, with the range of inputs that it has on `ids`."""
    ranges: dict[str, tuple[float, float]] = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: ranges.update({name: (float(args[0].min()), float(args[0].max()))})
        )
        for name, module in linears.items()
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    for name, module in linears.items():
        if name in ranges:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SimulatedLinear(module, *ranges[name]))


def main(folder: str = "scripted-int4") -> None:
    """Simulate, compile, and compare both."""
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024)
    model = BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(0, config.vocab_size, (1, 64))
    simulate(model, ids)
    compiled = isofold.compile(
        model, kwargs={"input_ids": ids}, recipe="prequantized", output=folder, overwrite=True
    )
    with torch.no_grad():
        wanted = model(input_ids=ids).last_hidden_state
    got = torch.as_tensor(compiled(input_ids=ids)["last_hidden_state"])
    print(f"{len(compiled.report['layers'])} layers packed, all of", end=" ")
    print(sorted({f"int{row['bits']}" for row in compiled.report["layers"]}))
    print(f"against the simulation: relative difference {float((got - wanted).norm() / wanted.norm()):.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
