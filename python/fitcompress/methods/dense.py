"""What a method that trains needs of a network: dense, finite, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fitcompress.errors import OptionError
from fitcompress.model import check_finite, check_untied, compressible_layers
from fitcompress.quantize import grid_of

if TYPE_CHECKING:
    from torch import nn

    from fitcompress.model import Layer

__all__ = ["dense_layers"]


def dense_layers(model: nn.Module) -> list[Layer]:
    """Return the layers that can be compressed, if none is yet and all can be trained.

    Raises:
        NoCompressibleLayerError: There is none.
        NonFiniteError: A weight is NaN or infinite.
        OptionError: The model is compressed already, or not in float32.
        UnsupportedLayerError: Layers share a weight.
    """
    layers = compressible_layers(model)
    check_finite(model)
    check_untied(layers)
    for layer in layers:
        if grid_of(layer.module) is not None:
            raise OptionError(
                f"the weight of {layer.name!r} is on a grid already",
                wanted="a dense model",
                fix="pass the network from before compression",
            )
        if layer.weight.dtype != torch.float32:
            raise OptionError(
                f"the weight of {layer.name!r} cannot be trained",
                got=layer.weight.dtype,
                wanted="float32",
                fix="pass model.float()",
            )
    return layers
