"""Reference models: the digits, ResNets for small and large images, BERT's shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fitcompress.zoo.bert import BertEncoder
from fitcompress.zoo.digits import DigitsNet
from fitcompress.zoo.resnet_cifar import CifarResNet, resnet20, resnet56
from fitcompress.zoo.resnet_imagenet import ResNet18, resnet18

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = [
    "BUILT_IN",
    "BertEncoder",
    "CifarResNet",
    "DigitsNet",
    "ResNet18",
    "resnet18",
    "resnet20",
    "resnet56",
]

BUILT_IN: dict[str, Callable[[], nn.Module]] = {
    "digits": DigitsNet,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet56": resnet56,
}
