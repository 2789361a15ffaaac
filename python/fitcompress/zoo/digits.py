"""The demo's network."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["DigitsNet"]


class DigitsNet(nn.Module):
    """A small convolutional network for 8×8 digits, 66 000 parameters.

    Four 3×3 convolutions with batch norm, mean pooling, one linear layer.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 24, 48, 48, 72)
        strides = (1, 2, 1, 2)
        blocks: list[nn.Module] = []
        for i, o, s in zip(widths[:-1], widths[1:], strides, strict=True):
            blocks += [
                nn.Conv2d(i, o, 3, s, 1, bias=False),
                nn.BatchNorm2d(o),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [B, 10] of images [B, 1, 8, 8]."""
        features: torch.Tensor = self.features(x)
        logits: torch.Tensor = self.classifier(features.mean((2, 3)))
        return logits
