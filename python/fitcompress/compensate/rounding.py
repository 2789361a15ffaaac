"""Weights rounded to the nearest level, each on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fitcompress.compensate.masks import importance_mask
from fitcompress.compensate.sweep import Quantized
from fitcompress.quantize import half_up, row_scales

if TYPE_CHECKING:
    from fitcompress.model import Layer
    from fitcompress.search.plan import Level

__all__ = ["rounded", "rounded_matrix"]


def rounded(
    layer: Layer,
    level: Level,
    importance: torch.Tensor | None = None,
    widen: float = 1.0,
) -> Quantized:
    """Return the nearest codes of one layer.

    Args:
        layer: Of the dense network.
        level: Where its weights are to lie.
        importance: What the mask keeps the largest of, [rows, columns]; None: |w|.
        widen: Factor on the scales of fixed-point levels, for fewer bytes.
    """
    return rounded_matrix(layer.matrix(), level, importance, widen)


def rounded_matrix(
    matrix: torch.Tensor,
    level: Level,
    importance: torch.Tensor | None = None,
    widen: float = 1.0,
) -> Quantized:
    """Return the nearest codes of a float32 matrix [rows, columns]."""
    scale, q = row_scales(matrix, level)
    scale = scale.to(matrix.device)
    if q and widen != 1:
        scale = half_up(scale * widen)
    safe = torch.where(scale > 0, scale, torch.inf).reshape(-1, 1)
    codes = (matrix / safe).round()
    codes = codes.clamp(-q, q) if q else codes
    order = matrix.abs() if importance is None else importance
    mask = importance_mask(order, level.sparsity)
    codes = codes if mask is None else codes * mask
    return Quantized(codes.int(), scale, mask, None, None, 0.0, float("nan"))
