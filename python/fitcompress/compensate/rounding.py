"""Weights rounded to the nearest level, each on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fitcompress.compensate.masks import magnitude_mask
from fitcompress.compensate.sweep import Quantized
from fitcompress.quantize import row_scales

if TYPE_CHECKING:
    from fitcompress.model import Layer
    from fitcompress.search.plan import Level

__all__ = ["rounded"]


def rounded(layer: Layer, level: Level) -> Quantized:
    """Return the nearest codes of one layer; its mask keeps the largest weights."""
    matrix = layer.matrix()
    scale, q = row_scales(matrix, level)
    scale = scale.to(matrix.device)
    safe = torch.where(scale > 0, scale, torch.inf).reshape(-1, 1)
    codes = (matrix / safe).round()
    codes = codes.clamp(-q, q) if q else codes
    mask = magnitude_mask(matrix, level.sparsity)
    codes = codes if mask is None else codes * mask
    return Quantized(codes.int(), scale, mask, None, None, 0.0, float("nan"))
