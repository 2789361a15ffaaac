"""The columns of a ``Sensitivity`` that come from the weights, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fitcompress import ops

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from fitcompress.sensitivity.table import Grid

__all__ = ["TableColumns"]

CELLS = ("distortion", "grid_length", "prune_length", "norm")


class TableColumns:
    """Collects one row of every column a layer.

    Args:
        grids: Fixed-point grids, then steps.
    """

    def __init__(self, grids: Sequence[Grid]) -> None:
        self._bits = [g.bits for g in grids if g.bits is not None]
        self._steps = [g.step for g in grids if g.step is not None]
        self._rows: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        weight: torch.Tensor,
        fisher: torch.Tensor | float | None,
        shares: Sequence[float],
        importance: torch.Tensor | None = None,
    ) -> None:
        """Tabulate one layer.

        Args:
            weight: Its matrix, rows are output channels.
            fisher: Diagonal, trace, or None for 1 everywhere.
            shares: Shares of its weights that the masks drop.
            importance: What they drop the lowest of, float32 [rows, columns], ≥ 0;
                None: |θ|.
        """
        bits, steps = self._bits, self._steps
        cells = ops.distortion_table(
            weight, fisher, bits, steps, shares, importance=importance
        )
        scales = [16 * weight.shape[0]] * len(bits) + [32] * len(steps)
        entropy = np.ceil(cells.entropy_bits.numpy()).astype(np.int64)
        largest = float(cells.range.max())
        codes = [round(largest / s) for s in steps]
        widths = [*bits, *(max(1, (2 * k).bit_length()) for k in codes)]
        self._rows.append(
            {name: getattr(cells, name).numpy() for name in CELLS}
            | {
                "nonzeros": cells.nnz.numpy(),
                "size_bits": entropy + np.array(scales)[:, None],
                "weight_bits": np.array(widths, dtype=np.int64),
                "sparsity": np.array(shares),
            }
        )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was tabulated, one entry a layer."""
        return self._rows

    def take_up(self, rows: Iterable[dict[str, Any]]) -> None:
        """Take ``rows`` that were tabulated elsewhere instead of what there is."""
        self._rows = list(rows)

    def stack(self) -> dict[str, Any]:
        """Return the columns, the layers along their first dimension."""
        return {k: np.stack([row[k] for row in self._rows]) for k in self._rows[0]}

    def restore(self, columns: Mapping[str, Any]) -> None:
        """Take up rows that `stack` returned."""
        layers = len(columns["norm"])
        self._rows = [{k: v[i] for k, v in columns.items()} for i in range(layers)]
