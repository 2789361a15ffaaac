"""What calibration without training is compared with: peers, one function each.

Each takes the trained network, calibration inputs and what it may spend, a size in
bytes or a number of bits, and returns a plain network with the bytes of its file:

| function | stores | spends |
|---|---|---|
| `rounded_to_size` | every weight rounded to one global step | bytes |
| `rounded_to_bits` | fixed point per channel, rounded | bits per weight |
| `gptq` | fixed point per channel, error feedback as published | bits per weight |
| `nncodec` | NNCodec 2.x (ISO/IEC 15938-17), whole bitstream | bytes |

The first three are stored in the file that `fitcompress.save` writes, so that bytes can
be compared: entropy-coded codes, two numbers per channel of a batch norm. They share no
arithmetic with the package: codes are found here, in plain torch.

`inputs` are batches without labels, drawn as in training; `norms=True` re-estimates
the means and variances of the batch norms on them, after rounding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from fitcompress.model import compressible_layers
from peer_files import (
    Coded,
    Compressed,
    bits_of,
    nearest,
    reestimate_norms_,
    scales,
    store,
)
from peer_gptq import error_feedback, gptq
from peer_nncodec import import_nncodec, nncodec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "Compressed",
    "bits_with_edges",
    "error_feedback",
    "gptq",
    "import_nncodec",
    "nncodec",
    "reestimate_norms_",
    "rounded_to_bits",
    "rounded_to_size",
]


def rounded_to_size(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    size: int,
    *,
    norms: bool = False,
) -> Compressed:
    """Round all weights to multiples of the one step whose file is just within `size`.

    Args:
        model: The trained network; unchanged.
        inputs: Calibration batches; only used with `norms`.
        size: Bytes that the file may take.
        norms: Re-estimate the batch norms.

    Raises:
        ValueError: Not even a network of zeros fits.
    """

    def stored(step: float, norms: bool) -> Compressed:
        return store(model, _on_step(model, step), inputs if norms else None)

    step = _smallest_step(model, size, lambda step: stored(step, False).bytes)
    found = stored(step, norms)
    while found.bytes > size:  # other statistics, some bytes more
        step *= 1.002
        found = stored(step, norms)
    return found


def rounded_to_bits(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    bits: int | Mapping[str, int],
    *,
    clip: bool = False,
    norms: bool = False,
) -> Compressed:
    """Round to fixed point: a scale per channel, codes ±q with q = 2^(b−1) − 1.

    Args:
        model: The trained network; unchanged.
        inputs: Calibration batches; only used with `norms`.
        bits: b, for all layers or by the layer's name.
        clip: Take the scale of least squared error instead of max|w| / q.
        norms: Re-estimate the batch norms.
    """
    layers = {}
    for layer in compressible_layers(model):
        matrix, b = layer.matrix().double(), bits_of(bits, layer.name)
        scale = scales(matrix, b, clip)
        layers[layer.name] = Coded(nearest(matrix, scale, b), scale, b)
    return store(model, layers, inputs if norms else None)


def bits_with_edges(model: nn.Module, inner: int, edges: int) -> dict[str, int]:
    """Return bits by layer: `edges` for the first and the last one, else `inner`."""
    names = [layer.name for layer in compressible_layers(model)]
    return dict.fromkeys(names, inner) | {names[0]: edges, names[-1]: edges}


def _on_step(model: nn.Module, step: float) -> dict[str, Coded]:
    scale = torch.tensor([step], dtype=torch.float32)
    return {
        layer.name: Coded((layer.matrix() / scale).round(), scale, None)
        for layer in compressible_layers(model)
    }


def _smallest_step(
    model: nn.Module, size: int, bytes_of: Callable[[float], int]
) -> float:
    """Return the step, to 0.1 %, at which the file just fits."""
    largest = max(float(x.matrix().abs().max()) for x in compressible_layers(model))
    fine, coarse = largest / 2**12, 4 * largest
    if bytes_of(coarse) > size:
        message = f"nothing fits into {size} bytes; the least is {bytes_of(coarse)}"
        raise ValueError(message)
    while coarse / fine > 1.001:
        middle = math.sqrt(fine * coarse)
        fine, coarse = (fine, middle) if bytes_of(middle) <= size else (middle, coarse)
    return coarse
