"""Weights as an ONNX graph holds them: codes in the graph's layout, and scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fitcompress.storage.coded_weight import CodedWeight

__all__ = ["GraphWeight"]


@dataclass
class GraphWeight:
    """A weight on its way into a graph: Δ · codes, with Δ along one axis or of all.

    Attributes:
        name: Qualified name of the module.
        codes: int32, in the layout in which the graph uses them.
        scale: Δ > 0, float32, one number or one per row (output channel).
        row_axis: The axis of ``codes`` that counts the rows; None where no axis does:
            outputs of a transposed convolution with groups.
        dtype: Name of the weight's dtype.
        groups: Of a transposed convolution, else 1.
    """

    name: str
    codes: NDArray[np.int32]
    scale: NDArray[np.float32]
    row_axis: int | None
    dtype: str
    groups: int = 1

    @classmethod
    def of(cls, weight: CodedWeight) -> GraphWeight:
        """Take codes and scales of a compressed layer."""
        codes = weight.view.weight_of(weight.codes, weight.level.shape)
        groups = weight.view.transposed_groups
        axis = {0: 0, 1: 1}.get(groups)
        made = cls(
            weight.name,
            np.ascontiguousarray(codes.cpu().numpy(), np.int32),
            weight.scale.detach().cpu().numpy().astype(np.float32),
            axis,
            weight.dtype,
            max(groups, 1),
        )
        made.check_scales()
        return made

    @property
    def rows(self) -> int:
        """Output channels."""
        if self.row_axis is None:
            return int(self.codes.shape[1]) * self.groups
        return int(self.codes.shape[self.row_axis])

    @property
    def row_scale(self) -> NDArray[np.float32]:
        """Δ of every row, float32 [rows]."""
        scale: NDArray[np.float32] = np.broadcast_to(self.scale, (self.rows,)).copy()
        return scale

    @property
    def by_rows(self) -> NDArray[np.int32]:
        """Codes with the rows first; not of a transposed convolution with groups."""
        assert self.row_axis is not None
        return np.moveaxis(self.codes, self.row_axis, 0)

    def transpose(self) -> None:
        """Swap the two axes of a matrix."""
        assert self.codes.ndim == 2 and self.row_axis is not None
        self.codes, self.row_axis = self.codes.T.copy(), 1 - self.row_axis

    def regrouped(self) -> NDArray[np.int32]:
        """Return the codes of a transposed convolution with groups, rows first.

        [inputs, outputs / groups, kernel…] becomes [outputs, inputs / groups, kernel…].
        """
        inputs, outputs, *kernel = self.codes.shape
        each = inputs // self.groups
        grouped = self.codes.reshape(self.groups, each, outputs, *kernel)
        rows = self.groups * outputs
        swapped = grouped.swapaxes(1, 2)
        codes: NDArray[np.int32] = swapped.reshape(rows, each, *kernel).copy()
        return codes

    def values(self) -> NDArray[np.float32]:
        """Return the weight as float32 numbers in the graph's layout."""
        if self.scale.size == 1:
            return self.codes.astype(np.float32) * self.scale.reshape(())
        if self.row_axis is not None:
            rows = self.by_rows.astype(np.float32)
            scale = self.scale.reshape(-1, *[1] * (rows.ndim - 1))
            return np.ascontiguousarray(np.moveaxis(rows * scale, 0, self.row_axis))
        _, outputs, *kernel = self.codes.shape
        scale = self.scale.reshape(self.groups, 1, outputs, *[1] * len(kernel))
        grouped = self.codes.reshape(self.groups, -1, outputs, *kernel)
        return (grouped.astype(np.float32) * scale).reshape(self.codes.shape)

    def multiply_rows(self, factor: NDArray[np.float64]) -> bool:
        """Multiply every row by a number, in Δ and for its sign in the codes.

        Args:
            factor: float64 [rows].

        Returns:
            Whether it was done; not if a Δ is too large for float32 afterwards.
        """
        assert self.row_axis is not None
        with np.errstate(over="ignore", under="ignore"):
            scale = (self.row_scale * np.abs(factor)).astype(np.float32)
        if not np.isfinite(scale).all():
            return False
        sign = np.where(scale > 0, np.sign(factor), 0).astype(np.int32)
        shape = [1] * self.codes.ndim
        shape[self.row_axis] = -1
        self.codes = self.codes * sign.reshape(shape)
        self.scale = scale
        self.check_scales()
        return True

    def check_scales(self) -> None:
        """Give rows of zeros a Δ > 0: the least one of the others, or 1.

        Integer kernels divide a bias by Δ, and a large Δ would round it coarsely.
        """
        positive = self.scale[self.scale > 0]
        usual = positive.min() if len(positive) else np.float32(1)
        self.scale = np.where(self.scale > 0, self.scale, usual).astype(np.float32)

    def keep(self, axis: int, kept: NDArray[np.intp]) -> None:
        """Drop everything along an axis but the entries ``kept``."""
        self.codes = np.take(self.codes, kept, axis)
        if axis == self.row_axis and self.scale.size > 1:
            self.scale = self.scale[kept]
