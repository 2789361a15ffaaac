"""Cholesky factors and inverses of triangles in the memory of the matrix itself.

By blocks, so that nearly all the work is in matrix products; several times as fast in
float64 as LAPACK's own, which also needs copies in another order.
"""

from __future__ import annotations

import torch

__all__ = ["cholesky_", "inverse_factor", "invert_triangle_", "solved"]

PANEL = 256  # columns at a time


def cholesky_(matrix: torch.Tensor) -> bool:
    """Replace a symmetric matrix by its lower Cholesky factor, in place.

    Args:
        matrix: [n, n]; only the lower triangle is read. Zeros above it in the end.

    Returns:
        Whether it is positive definite. If not, the matrix is as it was.
    """
    count = len(matrix)
    kept = []
    for start in range(0, count, PANEL):
        end = min(start + PANEL, count)
        block = matrix[start:end, start:end]
        kept.append(block.clone())
        if start:
            done = matrix[start:, :start]
            matrix[start:, start:end].addmm_(done, done[: end - start].mT, alpha=-1)
        lower, failed = torch.linalg.cholesky_ex(block)
        if failed:
            _restore(matrix, kept)
            return False
        block.copy_(lower)
        if end < count:
            below = matrix[end:, start:end]
            below.copy_(
                torch.linalg.solve_triangular(lower.mT, below, upper=True, left=False)
            )
    matrix.tril_()
    return True


def invert_triangle_(lower: torch.Tensor) -> None:
    """Replace a lower triangle, zeros above it, by its inverse, in place."""
    count = len(lower)
    if count <= PANEL:
        eye = torch.eye(count, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = (count + 2 * PANEL - 1) // (2 * PANEL) * PANEL
    first, second, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    invert_triangle_(first)
    invert_triangle_(second)
    below.copy_((second @ below) @ first).neg_()


def solved(lower: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return (L Lᵀ)⁻¹ times the columns of ``right``."""
    half = torch.linalg.solve_triangular(lower, right, upper=False)
    found: torch.Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return found


def inverse_factor(lower: torch.Tensor) -> torch.Tensor:
    """Return U, upper with UᵀU = H⁻¹, where J H J = L Lᵀ and J reverses the order.

    H = (J L J)(J L J)ᵀ, so U = (J L J)⁻¹ = J L⁻¹ J: no inverse of H is needed.

    Args:
        lower: L; used up.
    """
    invert_triangle_(lower)
    return lower.flip(0, 1)


def _restore(matrix: torch.Tensor, kept: list[torch.Tensor]) -> None:
    """Put the lower triangle back, from what is above the diagonal."""
    count = len(matrix)
    for number, block in enumerate(kept):
        start = number * PANEL
        end = min(start + PANEL, count)
        matrix[start:end, start:end].copy_(block)
        matrix[end:, start:end].copy_(matrix[start:end, end:].mT.clone())
