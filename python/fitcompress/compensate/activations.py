"""Quantizers for the inputs of a compressed network's layers, calibrated on data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fitcompress.errors import CalibrationError
from fitcompress.model.forward import call_model
from fitcompress.quantize import (
    ActivationQuantizer,
    MSEObserver,
    attach_activation,
    channel_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from fitcompress.search.plan import Plan

__all__ = ["check_activations", "input_bits", "quantize_activations"]


def check_activations(
    model: nn.Module, bits: dict[str, int], *, calibrated: bool
) -> None:
    """Raise unless the inputs of these layers can be quantized.

    Raises:
        CalibrationError: There are no data to choose their ranges from.
        UnsupportedLayerError: A layer's input cannot be quantized.
    """
    for name in bits:
        channel_of(model.get_submodule(name))
    if bits and not calibrated:
        raise CalibrationError(
            "the plan quantizes activations, and there are no data to choose their "
            "ranges from",
            got=f"activation bits for {len(bits)} layers, the first {next(iter(bits))}",
            wanted="calibration inputs",
            fix="pass calibrate= to apply",
        )


def input_bits(plan: Plan) -> dict[str, int]:
    """Return layer name → activation bits, where a plan has any."""
    bits = {name: level.activation_bits for name, level in plan.levels.items()}
    return {name: number for name, number in bits.items() if number is not None}


@torch.no_grad()
def quantize_activations(
    small: nn.Module, bits: dict[str, int], batches: Iterable[Any]
) -> None:
    """Quantize the inputs of layers, in place, with ranges of least squared error.

    One pass of the compressed network, in float activations, over the data; memory for
    one histogram a layer.

    Args:
        small: In eval mode, its weights on their grids.
        bits: Layer name → activation bits.
        batches: Inputs.

    Raises:
        NonFiniteError: An activation is NaN or infinite.
        CalibrationError: The data never reach one of the layers.
    """
    if not bits:
        return
    quantizers = {}
    for name, number in bits.items():
        quantizers[name] = ActivationQuantizer(number, MSEObserver())
        attach_activation(small.get_submodule(name), quantizers[name])
    for x in batches:
        call_model(small, x)
    for quantizer in quantizers.values():
        quantizer.freeze()
