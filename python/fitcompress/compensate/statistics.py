"""Second moments of a layer's inputs.

    H = E[x̂ x̂ᵀ],  C = E[x x̂ᵀ]

with x the inputs of the dense network and x̂ those of the network compressed so far, one
vector per position (or patch) of every calibration sample, groups apart. Products in
float32, sums in float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.errors import CalibrationError, NonFiniteError
from fitcompress.model.patches import patches

if TYPE_CHECKING:
    from torch import nn

    from fitcompress.model import Layer

__all__ = ["check_reached", "second_moments"]

ENOUGH_ROWS = 131_072  # positions after which every other one is left out
CHUNK_ROWS = 65_536  # rows of patches that exist at a time


def check_reached(model: nn.Module, layers: list[Layer], x: torch.Tensor) -> None:
    """Raise unless a forward pass of ``x`` uses every layer.

    Raises:
        CalibrationError: Names the first layer that is not reached.
    """
    reached: set[str] = set()
    handles = []
    for layer in layers:

        def note(_: Any, __: Any, name: str = layer.name) -> None:
            reached.add(name)

        handles.append(layer.module.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    missing = [layer.name for layer in layers if layer.name not in reached]
    if missing:
        raise CalibrationError(
            f"the calibration data never reach layer {missing[0]!r}",
            got=f"{len(missing)} of {len(layers)} layers not reached",
            wanted="a forward pass that uses every compressible layer",
            fix="calibrate with inputs that exercise it, or remove the layer",
        )


def second_moments(
    layer: Layer, dense: list[torch.Tensor], compressed: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return H and C of one layer.

    Args:
        layer: The layer.
        dense: Its inputs in the dense network, one tensor per batch.
        compressed: Its inputs in the network compressed so far.

    Returns:
        H and C, float64 [groups, columns, columns].

    Raises:
        NonFiniteError: An input of the layer is NaN or infinite.
    """
    shape = (layer.groups, layer.columns, layer.columns)
    h, c = (
        torch.zeros(shape, dtype=torch.float64),
        torch.zeros(shape, dtype=torch.float64),
    )
    rows, skip = 0, _skip(layer, dense)
    for number, (x_dense, x_now) in enumerate(zip(dense, compressed, strict=True)):
        offset = number % skip
        for part in _parts(layer, x_dense):
            a = patches(layer.module, x_dense[part].float(), skip=skip, offset=offset)
            b = patches(layer.module, x_now[part].float(), skip=skip, offset=offset)
            a, b = a.flatten(1, 2), b.flatten(1, 2)
            h += (b.transpose(1, 2) @ b).double()
            c += (a.transpose(1, 2) @ b).double()
            rows += a.shape[1]
    if not (torch.isfinite(h).all() and torch.isfinite(c).all()):
        raise NonFiniteError(
            f"an input of layer {layer.name!r} is not finite",
            wanted="finite calibration inputs",
            fix="look for NaN in the calibration data",
        )
    return h / rows, c / rows


def _skip(layer: Layer, inputs: list[torch.Tensor]) -> int:
    """Return 2, 4, … if every 2nd, 4th, … position per dimension is plenty, else 1."""
    stride = getattr(layer.module, "stride", None)
    if stride is None:  # not a convolution
        return 1
    strides = math.prod(stride)
    positions = sum(len(x) * math.prod(x.shape[2:]) for x in inputs) // strides
    dims, skip = inputs[0].dim() - 2, 1
    while positions // (2 * skip) ** dims >= max(ENOUGH_ROWS, 64 * layer.columns):
        skip *= 2
    return skip


def _parts(layer: Layer, x: torch.Tensor) -> list[slice]:
    """Cut a batch so that the patches of one part stay small."""
    channels = x.shape[1] if hasattr(layer.module, "kernel_size") else x.shape[-1]
    positions = max(x[0].numel() // max(channels, 1), 1)
    step = max(1, CHUNK_ROWS // positions)
    return [slice(i, i + step) for i in range(0, len(x), step)]
