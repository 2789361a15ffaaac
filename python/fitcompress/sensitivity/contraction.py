"""Calls and the gradients of their results, as tensors for the native ops."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fitcompress.errors import UnsupportedLayerError

if TYPE_CHECKING:
    from fitcompress.sensitivity.calls import Call
    from fitcompress.sensitivity.layout import Layout

__all__ = ["Contraction", "Entries", "contraction", "entries", "joined"]

ONES = (1, 1, 1)


@dataclass(frozen=True)
class Contraction:
    """The gradient of some rows of a weight: what :func:`ops.square_accumulate_` takes.

    Attributes:
        rows: [N, groups·O, D', H', W'], what multiplies the rows of the weight: the
            gradient of the result, or the input where the weight is transposed.
        columns: [N, groups·C, D, H, W], what is read in windows, padded.
        kernel: Size of the windows.
        stride: Their stride.
        dilation: Their dilation.
        groups: Of a convolution.
        images: Rows of both tensors that make up one sample.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    kernel: tuple[int, ...] = ONES
    stride: tuple[int, ...] = ONES
    dilation: tuple[int, ...] = ONES
    groups: int = 1
    images: int = 1

    @property
    def positions(self) -> int:
        """P, of a sample."""
        return self.images * math.prod(self.rows.shape[2:])

    @property
    def outputs(self) -> int:
        """O, of a group."""
        return self.rows.shape[1] // self.groups

    @property
    def channels(self) -> int:
        """C, of a group."""
        return self.columns.shape[1] // self.groups

    @property
    def inputs(self) -> int:
        """I = C · kernel volume."""
        return self.channels * math.prod(self.kernel)

    def widened(self, first: int, rows: int) -> Contraction:
        """Return the gradient of all ``rows`` of a weight, these from ``first`` on.

        Raises:
            UnsupportedLayerError: Rows of a convolution with groups.
        """
        own = self.rows.shape[1]
        if own == rows:
            return self
        if self.groups > 1:
            raise UnsupportedLayerError(
                "a convolution with groups uses some rows of a weight, and others are "
                "used elsewhere",
                wanted="all of its rows, or rows that nothing else uses",
            )
        sides = (0, 0, 0, 0, 0, 0, first, rows - first - own)
        return dataclasses.replace(self, rows=F.pad(self.rows, sides))

    def dense(self) -> Contraction:
        """Return the same gradient with every window copied out: a kernel of 1."""
        windows = self.columns
        for dim, (k, s, d) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True)
        ):
            windows = windows.unfold(2 + dim, d * (k - 1) + 1, s)[..., ::d]
            windows = windows.narrow(2 + dim, 0, self.rows.shape[2 + dim])
        windows = windows.permute(0, 1, 5, 6, 7, 2, 3, 4)
        batch = len(self.rows) // self.images
        columns, rows = (
            t.reshape(batch, self.images, features, -1).transpose(1, 2).flatten(2)
            for t, features in (
                (windows, self.groups * self.inputs),
                (self.rows, self.groups * self.outputs),
            )
        )
        return Contraction(rows[:, :, None, None], columns[:, :, None, None],
                           groups=self.groups)  # fmt: skip


@dataclass(frozen=True)
class Entries:
    """The gradient of an embedding: values are added to the rows that indices name.

    Attributes:
        indices: [B, P].
        values: [B, P, columns].
    """

    indices: torch.Tensor
    values: torch.Tensor

    def widened(self, first: int, rows: int) -> Entries:
        """Return the gradient of all rows of a weight, these from ``first`` on."""
        return Entries(self.indices + first, self.values)

    def dense(self, rows: int) -> Contraction:
        """Return the same gradient as a product with one-hot rows."""
        hot = F.one_hot(self.indices, rows).to(self.values.dtype)
        return Contraction(hot.mT[:, :, None, None], self.values.mT[:, :, None, None])


def entries(call: Call, grad: torch.Tensor, layout: Layout, batch: int) -> Entries:
    """Return the gradient of an embedding's weight."""
    assert call.input is not None
    indices = layout.by_sample(call.input, batch).reshape(batch, -1)
    values = layout.by_sample(grad, batch).reshape(batch, -1, grad.shape[-1])
    return Entries(indices, values)


def contraction(
    call: Call, grad: torch.Tensor, layout: Layout, batch: int
) -> Contraction:
    """Return the gradient of a linear map's or a convolution's weight.

    Args:
        call: The call; its input is taken.
        grad: Gradient of the call's result.
        layout: Where the samples are in both.
        batch: B.
    """
    x = call.input
    assert x is not None
    grad = grad.detach()
    if x.dtype != grad.dtype or x.dtype == torch.float64:
        x, grad = x.float(), grad.float()
    if call.kind in ("linear", "matrix"):
        flat = [
            layout.by_sample(t, batch)
            .reshape(batch, -1, t.shape[-1])
            .mT[:, :, None, None]
            for t in (x, grad)
        ]
        columns, rows = flat if call.kind == "linear" else flat[::-1]
        return Contraction(rows, columns)
    dims = len(call.stride)
    x, grad = (
        _images(t if t.dim() == dims + 2 else t[None], layout, batch) for t in (x, grad)
    )
    wide, narrow = (x, grad) if call.kind == "window" else (grad, x)
    sides = [side for pair in reversed(call.padding) for side in pair]
    if any(sides):
        wide = F.pad(wide, sides)
    for _ in range(3 - dims):
        wide, narrow = wide.unsqueeze(2), narrow.unsqueeze(2)
    ones = (1,) * (3 - dims)
    return Contraction(
        narrow,
        wide,
        ones + call.kernel,
        ones + call.stride,
        ones + call.dilation,
        call.groups,
        len(narrow) // batch,
    )


def _images(t: torch.Tensor, layout: Layout, batch: int) -> torch.Tensor:
    """Return the input or output of a convolution with a sample's images in a row."""
    return layout.by_sample(t, batch).flatten(0, 1) if len(t) != batch else t


def joined(parts: list[Contraction]) -> Contraction:
    """Return the sum of gradients as one: positions of all side by side."""
    parts = [part.dense() for part in parts]
    dtype = parts[0].rows.dtype
    if any(part.rows.dtype != dtype for part in parts):
        dtype = torch.float32
    return Contraction(
        torch.cat([part.rows.to(dtype) for part in parts], -1),
        torch.cat([part.columns.to(dtype) for part in parts], -1),
        groups=parts[0].groups,
    )
