"""ResNets for 32×32 images (He et al. 2015): shortcuts without parameters, or 1×1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["CifarResNet", "resnet20", "resnet56"]


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut that subsamples and pads channels.

    With ``projection``, a 1×1 convolution where shapes change (option B).
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, projection: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs
        self.downsample: nn.Sequential | None = None
        if projection and (stride != 1 or self.extra):
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output [B, outputs, H/stride, W/stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.stride != 1 or self.extra:
            x = x[:, :, :: self.stride, :: self.stride]
            half = self.extra // 2
            x = F.pad(x, (0, 0, 0, 0, half, self.extra - half))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """A ResNet of 6n + 2 layers, 16, 32 and 64 channels wide.

    Args:
        blocks: n, blocks per stage: 3 for ResNet-20, 9 for ResNet-56.
        classes: Number of classes.
        projection: 1×1 convolutions as shortcuts where shapes change; else these
            subsample and pad.
    """

    def __init__(
        self, blocks: int, classes: int = 10, *, projection: bool = False
    ) -> None:
        super().__init__()
        self._projection = projection
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    def _stage(
        self, inputs: int, outputs: int, blocks: int, stride: int
    ) -> nn.Sequential:
        first = Block(inputs, outputs, stride, projection=self._projection)
        return nn.Sequential(
            first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [B, classes] of images [B, 3, H, W]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


def resnet20() -> CifarResNet:
    """Return an untrained ResNet-20 for CIFAR-10, 269 722 parameters."""
    return CifarResNet(3)


def resnet56() -> CifarResNet:
    """Return an untrained ResNet-56 for CIFAR-10, 853 018 parameters."""
    return CifarResNet(9)
