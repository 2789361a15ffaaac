"""Which weights a sparsity drops."""

from __future__ import annotations

import torch

__all__ = ["magnitude_mask"]


def magnitude_mask(matrix: torch.Tensor, sparsity: float) -> torch.Tensor | None:
    """Return what stays when the smallest |w| are dropped, or None if all does.

    Args:
        matrix: The weight, [rows, columns].
        sparsity: Share to drop; ⌊sparsity · n⌋ weights go, ties by position.

    Returns:
        Bool [rows, columns] or None.
    """
    count = int(sparsity * matrix.numel())
    if not count:
        return None
    order = matrix.abs().flatten().argsort(stable=True)
    mask = torch.ones(matrix.numel(), dtype=torch.bool)
    mask[order[:count]] = False
    return mask.reshape(matrix.shape)
