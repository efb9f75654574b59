"""What the image models share."""

from __future__ import annotations

from torch import Tensor, nn


class HiddenOfPixels(nn.Module):
    """Pixels to the last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).last_hidden_state
