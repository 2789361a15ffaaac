"""ResNet-18 for images of 32×32 or 224×224 (He et al. 2015, arXiv 1512.03385)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["ResNet18", "resnet18"]


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut, a 1×1 convolution where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output [B, outputs, H/stride, W/stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """Eighteen layers, 64 to 512 channels wide; parameters named as in torchvision.

    Args:
        classes: Number of classes.
        small: For images of 32×32: a 3×3 stem without stride and pooling instead of
            7×7 with stride 2 and pooling.
    """

    def __init__(self, classes: int = 1000, *, small: bool = False) -> None:
        super().__init__()
        self.conv1 = (
            nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            if small
            else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        widths = (64, 64, 128, 256, 512)
        for stage in range(1, 5):
            inputs, outputs = widths[stage - 1 : stage + 1]
            first = Block(inputs, outputs, 1 if stage == 1 else 2)
            second = Block(outputs, outputs, 1)
            setattr(self, f"layer{stage}", nn.Sequential(first, second))
        self.fc = nn.Linear(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [B, classes] of images [B, 3, H, W]."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def resnet18(classes: int = 1000, *, small: bool = False) -> ResNet18:
    """Return an untrained ResNet-18, 11.7 M parameters with 1000 classes."""
    return ResNet18(classes, small=small)
