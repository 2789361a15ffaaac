"""The inputs of a layer as the columns that its weight matrix multiplies."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fitcompress.errors import UnsupportedLayerError

__all__ = ["layer_input", "output_columns", "padded_input", "patches"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layer_input(args: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    """Return the input that a Linear or a convolution was called with."""
    x = args[0] if args else named["input"]
    assert isinstance(x, torch.Tensor)
    return x


def patches(
    module: nn.Module, x: torch.Tensor, *, skip: int = 1, offset: int = 0
) -> torch.Tensor:
    """Return the input of ``module`` unfolded, one row per position.

    Args:
        module: A Linear or a convolution.
        x: Its input: [B, …, I] for Linear, [B, C, …] for a convolution.
        skip: Of a convolution's positions take every ``skip``-th in each dimension.
        offset: The first one taken.

    Returns:
        [groups, B, P, I] with P positions (1 for a Linear without sequence) and I
        inputs of one output, ordered as ``weight.flatten(1)``.

    Raises:
        UnsupportedLayerError: The module is of another kind.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(1, x.shape[0], -1, x.shape[-1])
    if isinstance(module, CONVOLUTIONS):
        return _convolution_patches(module, x, skip, offset)
    raise _unsupported(module)


def padded_input(
    module: nn.Module, x: torch.Tensor
) -> tuple[torch.Tensor, list[int], list[int], list[int]]:
    """Return the input of ``module`` padded, and the windows that its weight sees.

    Layers of one and two dimensions get leading dimensions of size 1. The windows of
    ``kernel`` places, ``dilation`` apart, every ``stride`` places, are the rows of
    :func:`patches`, which are never built here.

    Args:
        module: A Linear or a convolution.
        x: Its input: [B, …, I] for Linear, [B, C, …] or [C, …] for a convolution.

    Returns:
        The padded input, float32 [N, C, D, H, W], for a Linear [B·P, I, 1, 1, 1];
        kernel, stride and dilation in depth, height and width. Channels of a group,
        then places in the kernel are ordered as ``weight.flatten(1)``.

    Raises:
        UnsupportedLayerError: The module is of another kind.
    """
    if isinstance(module, nn.Linear):
        ones = [1, 1, 1]
        return x.reshape(-1, x.shape[-1], *ones).float(), ones, ones[:], ones[:]
    if isinstance(module, CONVOLUTIONS):
        return _padded(module, x.float())
    raise _unsupported(module)


def _padded(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: torch.Tensor
) -> tuple[torch.Tensor, list[int], list[int], list[int]]:
    dims = len(module.kernel_size)
    if x.dim() == dims + 1:  # a single sample without batch dimension
        x = x.unsqueeze(0)
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, padding, mode=mode) if any(padding) else x
    ones = [1] * (3 - dims)
    for _ in ones:
        x = x.unsqueeze(2)
    kernel, stride, dilation = (
        [*ones, *part] for part in (module.kernel_size, module.stride, module.dilation)
    )
    return x, kernel, stride, dilation


def _convolution_patches(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: torch.Tensor, skip: int, offset: int
) -> torch.Tensor:
    x, kernel, stride, dilation = _padded(module, x)
    batch, channels = x.shape[:2]
    spatial = x.stride()[2:]
    out = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    groups = module.groups
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


def _unsupported(module: nn.Module) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        "inputs of this layer cannot be unfolded",
        got=type(module).__name__,
        wanted="Linear, Conv1d, Conv2d or Conv3d",
    )
