"""Copies of a model that do not copy its large weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from fitcompress.model.layers import compressible_layers

if TYPE_CHECKING:
    from torch import nn

__all__ = ["copy_of"]


def copy_of(model: nn.Module) -> nn.Module:
    """Copy a model that shares the weights of the layers, which nobody changes."""
    weights: dict[int, nn.Parameter] = {}
    for layer in compressible_layers(model):
        weight = layer.module._parameters.get("weight")
        if weight is not None:  # not one on a grid
            weights[id(weight)] = weight
    return copy.deepcopy(model, dict(weights))
