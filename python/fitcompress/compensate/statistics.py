"""Second moments of a layer's inputs.

    H = E[x̂ x̂ᵀ],  X = E[y x̂ᵀ]

with x̂ the inputs in the network compressed so far, one vector per position (or patch)
of every calibration sample with a 1 appended, and y = W x the dense layer's outputs
without bias. X is W E[x x̂ᵀ], all that is needed of the dense inputs, at the price of
rows × columns products a position. Groups apart; products in float32, sums in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fitcompress import ops
from fitcompress.errors import NonFiniteError
from fitcompress.model.patches import padded_input

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from fitcompress.model import Layer

__all__ = [
    "Moments",
    "as_outputs",
    "gather",
    "gather_outputs",
    "layer_outputs",
    "position_skip",
]

ENOUGH_ROWS = 65_536  # positions after which every other one is left out


@dataclass
class Moments:
    """Sums over positions.

    Attributes:
        second: Σ x̂ x̂ᵀ, float64 [groups, columns + 1, columns + 1]; the last column
            holds Σ x̂ and the number of positions.
        cross: Σ y x̂ᵀ, float64 [groups, rows / groups, columns + 1].
    """

    second: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def zeros(cls, layer: Layer, device: torch.device) -> Moments:
        """Return sums over nothing."""
        g, k = layer.groups, layer.columns + 1
        kind = {"dtype": torch.float64, "device": device}
        return cls(
            torch.zeros(g, k, k, **kind),  # type: ignore[call-overload]
            torch.zeros(g, layer.rows // g, k, **kind),  # type: ignore[call-overload]
        )

    @property
    def count(self) -> float:
        """Number of positions."""
        return float(self.second[0, -1, -1])

    def add_(self, other: Moments) -> Moments:
        """Add other sums, in place."""
        self.second += other.second
        self.cross += other.cross
        return self


@torch.no_grad()
def gather(
    layer: Layer,
    dense: Sequence[torch.Tensor],
    compressed: Sequence[torch.Tensor],
    *,
    skip: int | None = None,
) -> Moments:
    """Return the moments of one layer.

    Args:
        layer: The layer of the dense network.
        dense: Its inputs there, one tensor per batch.
        compressed: Its inputs in the network compressed so far.
        skip: As for `gather_outputs`.

    Raises:
        NonFiniteError: An input of the layer is NaN or infinite.
    """
    outputs = (layer_outputs(layer, x) for x in dense)
    return gather_outputs(layer, outputs, compressed, skip=skip)


@torch.no_grad()
def gather_outputs(
    layer: Layer,
    outputs: Iterable[torch.Tensor],
    compressed: Sequence[torch.Tensor],
    *,
    skip: int | None = None,
) -> Moments:
    """Return the moments of one layer, given what it answers in the dense network.

    Args:
        layer: The layer of the dense network.
        outputs: `layer_outputs` of its inputs there, for every batch.
        compressed: Its inputs in the network compressed so far, one tensor per batch.
        skip: Take every so many-th position per dimension; None: see
            :func:`position_skip`.

    Raises:
        NonFiniteError: An input of the layer is NaN or infinite.
    """
    moments = Moments.zeros(layer, compressed[0].device)
    skip = skip or position_skip(layer, compressed)
    for number, (y, x_now) in enumerate(zip(outputs, compressed, strict=True)):
        windows, kernel, stride, dilation = padded_input(layer.module, x_now)
        if _is_linear(layer.module):
            first = number * skip // len(compressed)  # sequences: all their places
            windows, y = windows[first::skip], y[first::skip]
            start, step = [0, 0, 0], [1, 1, 1]
        else:
            step = [min(skip, size) for size in y.shape[2:]]
            start = [number % own for own in step]
        ops.input_moments_(
            moments.second,
            moments.cross,
            windows,
            y,
            kernel,
            stride,
            dilation,
            start,
            step,
        )
    if not (
        torch.isfinite(moments.second).all() and torch.isfinite(moments.cross).all()
    ):
        raise NonFiniteError(
            f"an input of layer {layer.name!r} is not finite",
            wanted="finite calibration inputs",
            fix="look for NaN in the calibration data",
        )
    return moments


def _is_linear(module: nn.Module) -> bool:
    return not hasattr(module, "kernel_size")


@torch.no_grad()
def layer_outputs(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Return W x as [N, rows, D, H, W], float32: the output without its bias.

    From the weight and the declared padding, whatever a subclass makes of them.
    """
    module: Any = layer.module
    weight = layer.weight.detach()
    if _is_linear(module):
        return as_outputs(layer, F.linear(x, weight))
    dims = len(module.kernel_size)
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    if layer.view.transposed_groups:
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[
            dims - 1
        ]
        own = (module.stride, module.padding, module.output_padding, module.groups)
        y = convolve(x, weight, None, *own, module.dilation)
    else:
        y = module._conv_forward(x, weight, None)
    return as_outputs(layer, y)


def as_outputs(layer: Layer, y: torch.Tensor) -> torch.Tensor:
    """Return [..., rows], of a convolution [N, rows, ...], as `layer_outputs` does.

    Returns:
        float32 [N, rows, D, H, W].
    """
    if _is_linear(layer.module):
        return y.float().reshape(-1, y.shape[-1], 1, 1, 1)
    return y.float().reshape(*y.shape[:2], *[1] * (5 - y.dim()), *y.shape[2:])


def position_skip(layer: Layer, inputs: Sequence[torch.Tensor]) -> int:
    """Return 2, 4, … if every 2nd, 4th, … position per dimension is plenty, else 1.

    For a transposed convolution a number that has no factor in common with its stride:
    its positions see other parts of the kernel in turns.
    """
    enough, module = max(ENOUGH_ROWS, 64 * layer.columns), layer.module
    if _is_linear(module):
        positions, dims, strides = sum(math.prod(x.shape[:-1]) for x in inputs), 1, 1
    else:
        dims = len(module.kernel_size)  # type: ignore[arg-type]
        strides = math.prod(module.stride)  # type: ignore[arg-type]
        positions = sum(math.prod(x.shape) // x.shape[-dims - 1] for x in inputs)
    transposed = layer.view.transposed_groups > 0
    positions = positions * strides if transposed else positions // strides
    skip = 1
    while positions // (2 * skip) ** dims >= enough:
        skip *= 2
    while transposed and math.gcd(skip, strides) > 1:
        skip -= 1
    return skip
