"""The inputs of a layer as the columns that its weight matrix multiplies."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fitcompress.errors import UnsupportedLayerError

__all__ = ["layer_input", "output_columns", "patches"]


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
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _convolution_patches(module, x, skip, offset)
    raise UnsupportedLayerError(
        "inputs of this layer cannot be unfolded",
        got=type(module).__name__,
        wanted="Linear, Conv1d, Conv2d or Conv3d",
    )


def _convolution_patches(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: torch.Tensor, skip: int, offset: int
) -> torch.Tensor:
    dims = len(module.kernel_size)
    if x.dim() == dims + 1:  # a single sample without batch dimension
        x = x.unsqueeze(0)
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, padding, mode=mode) if any(padding) else x
    batch, channels = x.shape[:2]
    spatial_stride = x.stride()[2:]
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    out = [
        (x.shape[2 + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d in range(dims)
    ]
    groups = module.groups
    windows = x.as_strided(
        (batch, groups, channels // groups, *out, *kernel),
        (
            x.stride(0),
            x.stride(1) * (channels // groups),
            x.stride(1),
            *(s * t for s, t in zip(spatial_stride, stride, strict=True)),
            *(s * t for s, t in zip(spatial_stride, dilation, strict=True)),
        ),
        x.storage_offset(),
    )
    if skip > 1:
        every = [slice(offset if offset < n else 0, None, skip) for n in out]
        index = (slice(None), slice(None), slice(None), *every)
        windows = windows[index]
    positions = range(3, 3 + dims)
    offsets = range(3 + dims, 3 + 2 * dims)
    order = (1, 0, *positions, 2, *offsets)
    width = (channels // groups) * module.weight[0, 0].numel()
    return windows.permute(order).reshape(groups, batch, -1, width)


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
