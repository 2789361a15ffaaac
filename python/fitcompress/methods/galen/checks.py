"""What a search is of, and whether it can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fitcompress.data.batches import digest
from fitcompress.errors import DataError, OptionError
from fitcompress.model import (
    check_finite,
    check_untied,
    compressible_layers,
    fingerprint,
)
from fitcompress.quantize import grid_of

if TYPE_CHECKING:
    from torch import nn

    from fitcompress.latency.target import LatencyTarget
    from fitcompress.methods.galen.method import Galen

__all__ = ["check_input", "search_key"]


def search_key(
    method: Galen,
    dense: nn.Module,
    seed: int,
    inputs: list[torch.Tensor],
    target: LatencyTarget,
) -> str:
    """Return what two searches must share for one to go on with the other's file."""
    crc = 0
    for x in inputs:
        crc = digest(x, crc)
    return f"{method}-{seed}-{fingerprint(dense, [])}-{crc:08x}-{target.fingerprint}"


def check_input(model: nn.Module, example: object) -> None:
    """Raise unless a model can be searched with an example.

    Raises:
        DataError: The example is no tensor with a batch.
        OptionError: The model is compressed already, or not in float32.
        NonFiniteError: A weight is NaN or infinite.
        UnsupportedLayerError: Layers share a weight.
    """
    if not torch.is_tensor(example) or not example.dim() or not len(example):
        raise DataError(
            "the example is no input",
            got=type(example).__name__,
            wanted="a tensor with its batch dimension",
        )
    for name, module in model.named_modules():
        if grid_of(module) is not None:
            raise OptionError(
                f"the weight of {name!r} is on a grid already",
                wanted="a dense model",
                fix="pass the network from before compression",
            )
    check_finite(model)
    check_untied(compressible_layers(model))
    for layer in compressible_layers(model):
        if layer.weight.dtype != torch.float32:
            raise OptionError(
                f"the weight of {layer.name!r} cannot be trained",
                got=layer.weight.dtype,
                wanted="float32",
                fix="pass model.float()",
            )
