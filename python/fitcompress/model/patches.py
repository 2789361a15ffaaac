"""The inputs of a layer as the columns that its weight matrix multiplies."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from fitcompress.errors import UnsupportedLayerError
from fitcompress.model.matrix_view import TRANSPOSED

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["layer_input", "output_columns", "padded_input", "patches"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Windows = tuple[torch.Tensor, list[int], list[int], list[int]]


def layer_input(args: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    """Return the input that a Linear or a convolution was called with."""
    x = args[0] if args else named["input"]
    assert isinstance(x, torch.Tensor)
    return x


def patches(
    module: nn.Module,
    x: torch.Tensor,
    *,
    skip: int = 1,
    offset: int = 0,
    output_shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the input of ``module`` unfolded, one row per position.

    Args:
        module: A Linear or a convolution.
        x: Its input: [B, …, I] for Linear, [B, C, …] for a convolution.
        skip: Of a convolution's positions take every ``skip``-th in each dimension.
        offset: The first one taken.
        output_shape: See :func:`padded_input`.

    Returns:
        [groups, B, P, I] with P positions (1 for a Linear without sequence) and I
        inputs of one output, ordered as the columns of ``Layer.matrix()``.

    Raises:
        UnsupportedLayerError: The module is of another kind.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(1, x.shape[0], -1, x.shape[-1])
    groups = getattr(module, "groups", 1)
    return _window_patches(_windows(module, x, output_shape), groups, skip, offset)


def padded_input(
    module: nn.Module, x: torch.Tensor, *, output_shape: Sequence[int] | None = None
) -> Windows:
    """Return the input of ``module`` padded, and the windows that its weight sees.

    Layers of one and two dimensions get leading dimensions of size 1. The windows of
    ``kernel`` places, ``dilation`` apart, every ``stride`` places, are the rows of
    :func:`patches`, which are never built here. A transposed convolution of stride s
    reads windows of stride 1 from its input with s − 1 zeros between the places.

    Args:
        module: A Linear or a convolution.
        x: Its input: [B, …, I] for Linear, [B, C, …] or [C, …] for a convolution.
        output_shape: Shape of the output, needed only if a transposed convolution was
            called with an ``output_size``.

    Returns:
        The padded input, float32 [N, C, D, H, W], for a Linear [B·P, I, 1, 1, 1];
        kernel, stride and dilation of the windows in depth, height and width. Channels
        of a group, then places in the kernel are ordered as the columns of
        ``Layer.matrix()``.

    Raises:
        UnsupportedLayerError: The module is of another kind.
    """
    if isinstance(module, nn.Linear):
        ones = [1, 1, 1]
        return x.reshape(-1, x.shape[-1], *ones).float(), ones, ones[:], ones[:]
    return _windows(module, x.float(), output_shape)


def _windows(
    module: nn.Module, x: torch.Tensor, output_shape: Sequence[int] | None
) -> Windows:
    if not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        raise UnsupportedLayerError(
            "inputs of this layer cannot be unfolded",
            got=type(module).__name__,
            wanted="a Linear or a convolution",
        )
    dims = len(module.kernel_size)
    if x.dim() == dims + 1:  # a single sample without batch dimension
        x = x.unsqueeze(0)
    stride = [1] * dims
    if isinstance(module, TRANSPOSED):
        x = _stuffed(module, x, output_shape)
    else:
        padding = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, padding, mode=mode) if any(padding) else x
        stride = [*module.stride]
    ones = [1] * (3 - dims)
    for _ in ones:
        x = x.unsqueeze(2)
    kernel, dilation = [*ones, *module.kernel_size], [*ones, *module.dilation]
    return x, kernel, [*ones, *stride], dilation


def _stuffed(
    module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
    x: torch.Tensor,
    output_shape: Sequence[int] | None,
) -> torch.Tensor:
    """Return ``x`` with zeros between its places, and padded or cropped at the ends."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *sizes)
    every = [slice(None, None, s) for s in module.stride]
    index = (slice(None), slice(None), *every)
    stuffed[index] = x
    padding: list[int] = []
    for d in reversed(range(len(sizes))):
        reach = module.dilation[d] * (module.kernel_size[d] - 1)
        before = reach - int(module.padding[d])  # negative: cropped
        after = before + module.output_padding[d]
        if output_shape is not None:
            after = output_shape[d - len(sizes)] + reach - sizes[d] - before
        padding += [before, after]
    return F.pad(stuffed, padding)


def _window_patches(
    windowed: Windows, groups: int, skip: int, offset: int
) -> torch.Tensor:
    x, kernel, stride, dilation = windowed
    batch, channels = x.shape[:2]
    spatial = x.stride()[2:]
    out = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    windows = x.as_strided(
        (batch, groups, channels // groups, *out, *kernel),
        (
            x.stride(0),
            x.stride(1) * (channels // groups),
            x.stride(1),
            *(n * s for n, s in zip(spatial, stride, strict=True)),
            *(n * d for n, d in zip(spatial, dilation, strict=True)),
        ),
        x.storage_offset(),
    )
    if skip > 1:
        every = [slice(offset if offset < n else 0, None, skip) for n in out]
        index = (slice(None), slice(None), slice(None), *every)
        windows = windows[index]
    width = (channels // groups) * math.prod(kernel)
    return windows.permute(1, 0, 3, 4, 5, 2, 6, 7, 8).reshape(groups, batch, -1, width)


def output_columns(module: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """Return an output (or its gradient) of ``module`` as [groups, B, P, O/groups]."""
    if isinstance(module, nn.Linear):
        return y.reshape(1, y.shape[0], -1, y.shape[-1])
    groups = getattr(module, "groups", 1)
    if isinstance(module, nn.Module) and y.dim() == len(module.kernel_size) + 1:  # type: ignore[arg-type]
        y = y.unsqueeze(0)
    batch, channels = y.shape[:2]
    grouped = y.reshape(batch, groups, channels // groups, -1)
    return grouped.permute(1, 0, 3, 2)
