"""The networks that Fisher moments are taken of, each with one batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fitcompress.model import compressible_layers
from fitcompress.zoo import BertEncoder, resnet18, resnet20

if TYPE_CHECKING:
    from collections.abc import Callable

    from fitcompress.model import Layer

__all__ = ["NETWORKS", "Case", "build", "tiny"]


@dataclass
class Case:
    """A network in eval mode and one batch.

    Attributes:
        model: The network.
        x: Images or tokens, samples first.
        y: Labels.
    """

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor

    def __post_init__(self) -> None:
        self.model.eval()
        self.layers: list[Layer] = compressible_layers(self.model)

    @property
    def weights(self) -> list[torch.Tensor]:
        """The weights of all layers."""
        return [layer.weight for layer in self.layers]

    def copy(self) -> Case:
        """Return a case with its own network, for what changes it."""
        return Case(copy.deepcopy(self.model), self.x, self.y)

    @staticmethod
    def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy, nats."""
        return F.cross_entropy(output, y)

    def mean_loss(self) -> torch.Tensor:
        """Return the loss of the batch."""
        return self.loss(self.model(self.x), self.y)


class Network(NamedTuple):
    """How a case is built.

    Attributes:
        title: Network, size of a sample and of the batch, for tables.
        make: Batch and whether to be quick → model, inputs, number of classes.
        batch: Samples.
        quick: Samples for trying out.
    """

    title: str
    make: Callable[[int, bool], tuple[nn.Module, torch.Tensor, int]]
    batch: int
    quick: int


def _resnet20(batch: int, _: bool) -> tuple[nn.Module, torch.Tensor, int]:
    return resnet20(), torch.randn(batch, 3, 32, 32), 10


def _resnet18_small(batch: int, _: bool) -> tuple[nn.Module, torch.Tensor, int]:
    return resnet18(10, small=True), torch.randn(batch, 3, 32, 32), 10


def _resnet18(batch: int, _: bool) -> tuple[nn.Module, torch.Tensor, int]:
    return resnet18(1000), torch.randn(batch, 3, 224, 224), 1000


def _bert(batch: int, quick: bool) -> tuple[nn.Module, torch.Tensor, int]:
    tokens = 1000 if quick else 30522
    model = BertEncoder(2, depth=2 if quick else 12, tokens=tokens)
    return model, torch.randint(tokens, (batch, 128)), 2


NETWORKS = {
    "r20": Network("ResNet-20 32²", _resnet20, 32, 4),
    "r18-32": Network("ResNet-18 32²", _resnet18_small, 16, 2),
    "r18-224": Network("ResNet-18 224²", _resnet18, 8, 2),
    "bert": Network("BERT-base T 128", _bert, 8, 2),
}


def build(name: str, *, quick: bool = False) -> Case:
    """Return a network as it was initialised, with random inputs and labels."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    batch = network.quick if quick else network.batch
    model, x, classes = network.make(batch, quick)
    return Case(model, x, torch.randint(classes, (batch,)))


def tiny() -> Case:
    """Return a case of a few thousand weights, to warm a process up."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.Flatten(2),
        nn.Linear(9, 8),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    return Case(model, torch.randn(3, 3, 8, 8), torch.randint(4, (3,)))
