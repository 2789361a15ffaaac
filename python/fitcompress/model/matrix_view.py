"""A weight as a matrix of rows by columns, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TRANSPOSED", "MatrixView"]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class MatrixView:
    """How a weight is read as a matrix [rows, columns].

    Rows are output channels, those of all groups one after another; columns the inputs
    of one output: input channels of its group × places in the kernel. For most weights
    that is ``weight.flatten(1)``.

    The weight of a transposed convolution is [inputs, outputs / groups, kernel…]. Each
    of its outputs is a window of the input with zeros between its places, times the
    kernel back to front; the columns are ordered like these windows, so the kernel is
    reversed here.

    Attributes:
        transposed_groups: Groups of a transposed convolution; 0 for all other layers.
    """

    transposed_groups: int = 0

    @classmethod
    def of(cls, module: nn.Module) -> MatrixView:
        """Return the view of a module's weight."""
        return cls(module.groups if isinstance(module, TRANSPOSED) else 0)

    def shape(self, weight: Sequence[int]) -> tuple[int, int]:
        """Return rows and columns of a weight of that shape."""
        size = 1
        for count in weight:
            size *= count
        groups = self.transposed_groups
        rows = weight[1] * groups if groups else weight[0]
        return rows, size // max(rows, 1)

    def matrix_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight as its matrix; a view of it where possible."""
        groups = self.transposed_groups
        if not groups:
            return weight.flatten(1)
        inputs, outputs, *kernel = weight.shape
        grouped = weight.reshape(groups, inputs // groups, outputs, *kernel)
        flipped = grouped.transpose(1, 2).flip(_kernel(grouped))
        return flipped.reshape(self.shape(weight.shape))

    def weight_of(self, matrix: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Return a matrix as the weight of that shape: undoes :meth:`matrix_of`."""
        groups = self.transposed_groups
        if not groups:
            return matrix.reshape(tuple(shape))
        inputs, outputs, *kernel = shape
        grouped = matrix.reshape(groups, outputs, inputs // groups, *kernel)
        return grouped.flip(_kernel(grouped)).transpose(1, 2).reshape(tuple(shape))


def _kernel(grouped: torch.Tensor) -> list[int]:
    """Return the dimensions of the kernel in [groups, outputs, inputs, kernel…]."""
    return list(range(3, grouped.dim()))
