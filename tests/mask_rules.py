"""Rules for masks and plans, for the tests of masks."""

from dataclasses import dataclass

import torch
from torch import nn

import fitcompress as fc
from fitcompress.masks import Fisher, Magnitude, MaskRule, OutputError, Smoothed
from fitcompress.model import Layer, compressible_layers

SPARSITIES = (0.0, 0.1, 0.3, 0.5, 0.52, 0.7, 0.9)
RULES = ["magnitude", "fisher", "smoothed", "output error"]


def make_rule(
    kind: str, net: nn.Module, loader: object, moments: fc.FisherMoments
) -> MaskRule:
    """Return the rule of that name."""
    return {
        "magnitude": lambda: Magnitude(),
        "fisher": lambda: Fisher(moments),
        "smoothed": lambda: Smoothed(moments, 0.5),
        "output error": lambda: OutputError.measure(net, loader, progress=False),
    }[kind]()


@dataclass(frozen=True)
class Given:
    """The importances that a test wants."""

    values: dict[str, torch.Tensor]
    name: str = "given"

    def importance(self, layer: Layer) -> torch.Tensor:
        return self.values[layer.name]

    def digest(self) -> str:
        return self.name


def plan_for(model: nn.Module, grid: fc.Grid, sparsity: float) -> fc.Plan:
    layers = compressible_layers(model)
    return fc.Plan({x.name: fc.Level(grid, sparsity, x.shape) for x in layers})


def by_name(model: nn.Module) -> dict[str, Layer]:
    return {layer.name: layer for layer in compressible_layers(model)}
