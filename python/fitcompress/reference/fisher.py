"""Twins of `fitcompress.ops.fisher`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def square_accumulate_(
    moment: Tensor | None,
    norms: Tensor | None,
    output_grad: Tensor,
    input: Tensor,
    kernel: Sequence[int] = (1, 1, 1),
    stride: Sequence[int] = (1, 1, 1),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    images: int = 1,
    scale: float = 1.0,
) -> None:
    """Form the weight gradient of every sample, square and add, all in float64."""
    windows = _windows(input.double(), kernel, stride, dilation, output_grad.shape[2:])
    grads = _by_sample(output_grad.double(), images, groups)
    windows = _by_sample(windows, images, groups)
    per_sample = torch.einsum("bngop,bngip->bgoi", grads, windows)
    squares = scale * per_sample.square().flatten(1, 2)
    if moment is not None:
        moment.copy_(moment.double() + squares.sum(0))
    if norms is not None:
        norms += squares.sum((1, 2))


def ghost_norms_(
    norms: Tensor,
    output_grad: Tensor,
    input: Tensor,
    kernel: Sequence[int] = (1, 1, 1),
    stride: Sequence[int] = (1, 1, 1),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    images: int = 1,
    scale: float = 1.0,
) -> None:
    """Multiply the Gram matrices of both tensors' positions, in float64."""
    windows = _windows(input.double(), kernel, stride, dilation, output_grad.shape[2:])
    windows, grads = (
        _by_sample(t, images, groups).permute(0, 2, 3, 1, 4).flatten(3)
        for t in (windows, output_grad.double())
    )
    products = (grads.mT @ grads) * (windows.mT @ windows)
    norms += scale * products.sum((1, 2, 3))


def winograd_norms_(
    norms: Tensor,
    output_grad: Tensor,
    input: Tensor,
    kernel: Sequence[int] = (1, 3, 3),
    stride: Sequence[int] = (1, 1, 1),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    images: int = 1,
    scale: float = 1.0,
) -> None:
    """The norms of `ghost_norms_`: the forms differ in their cost only."""
    shape = (kernel, stride, dilation, groups, images, scale)
    ghost_norms_(norms, output_grad, input, *shape)


def _windows(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    places: Sequence[int],
) -> Tensor:
    """Unfold [N, C, D, H, W] to [N, C · kernel, D', H', W']."""
    for dim in range(3):
        index = torch.arange(kernel[dim])[:, None] * dilation[dim]
        index = index + torch.arange(places[dim]) * stride[dim]
        # The kernel's dimensions come before the places: [N, C, k…, rest]
        at = 2 + 2 * dim
        input = input.index_select(at, index.flatten().to(input.device))
        sizes = (*input.shape[:at], kernel[dim], places[dim], *input.shape[at + 1 :])
        input = input.reshape(sizes)
    return input.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(1, 4)


def _by_sample(tensor: Tensor, images: int, groups: int) -> Tensor:
    """Return [N, G · F, …] as [B, images, G, F, P]."""
    samples, features = len(tensor) // images, tensor.shape[1] // groups
    places = math.prod(tensor.shape[2:])
    return tensor.reshape(samples, images, groups, features, places)
