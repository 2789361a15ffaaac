"""Ternary weights: latent numbers, a mask, and one fixed scale per output filter.

With w a latent weight as a matrix [rows, columns] (see ``model.matrix_view``), a row
for each output filter:

    u = w / ‖w‖₂,   mask = 1[|u| > δ],   t = sign(u) · mask ∈ {−1, 0, 1},
    ŵ = s · t / ‖t‖₂                     ‖t‖₂ = √nnz

Gradients pass straight from t/‖t‖₂ to u, those of masked weights as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from fitcompress.model import MatrixView

__all__ = [
    "TernaryWeight",
    "alignment",
    "ternary_codes",
    "unit_codes",
    "unit_rows",
]


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return u = w / ‖w‖₂ of every row; a row of zeros stays, and gets no gradient.

    Args:
        rows: Latent weights, [rows, columns].
    """
    norm = torch.linalg.vector_norm(rows.detach(), dim=1, keepdim=True)
    alive = norm > 0
    # Not 0/0, whose gradient is NaN even where it is not selected.
    safe = torch.where(alive, rows, torch.ones_like(rows))
    safe = safe / torch.linalg.vector_norm(safe, dim=1, keepdim=True)
    return torch.where(alive, safe, torch.zeros_like(rows))


def ternary_codes(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return t = sign(w) · mask as floats, [rows, columns]."""
    return rows.detach().sign() * mask


def unit_codes(codes: torch.Tensor) -> torch.Tensor:
    """Return t / ‖t‖₂ of every row; a row of zeros stays one."""
    nonzeros = codes.count_nonzero(1).clamp_min(1).to(codes.dtype)
    return codes / nonzeros.sqrt().unsqueeze(1)


def alignment(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the cosine of the angle between latent and ternary filters, [rows].

        cos(u, t/‖t‖₂) = ‖u_kept‖₁ / √nnz

    1 where all kept weights have the same magnitude and the others are zero; a filter
    without weights has none, 0 is returned.

    Args:
        rows: Latent weights, [rows, columns].
        mask: What is kept, bool [rows, columns].
    """
    rows = rows.detach()
    kept = (unit_rows(rows).abs() * mask).sum(1)
    nonzeros = ternary_codes(rows, mask).count_nonzero(1)
    return kept / nonzeros.clamp_min(1).to(kept.dtype).sqrt()


class TernaryWeight(nn.Module):
    """Parametrization that makes a latent weight ternary during training.

    Args:
        scale: s ≥ 0, the fixed length of every filter, float32 [rows].
        mask: What is kept, bool [rows, columns].
        view: How the weight is a matrix.

    Attributes:
        frozen: Codes stay as they are: the latent weight gets no gradient.
    """

    scale: torch.Tensor
    mask: torch.Tensor

    def __init__(
        self, scale: torch.Tensor, mask: torch.Tensor, view: MatrixView
    ) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().float().clone())
        self.register_buffer("mask", mask.clone())
        self.view, self.frozen = view, False

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return ŵ = s · t / ‖t‖₂ of a latent weight, in its shape."""
        rows = self.view.matrix_of(weight)
        values = unit_codes(ternary_codes(rows, self.mask))
        if not self.frozen:
            units = unit_rows(rows)
            # (v + u) − u would miss v in its last bits.
            values = values + (units - units.detach())
        values = values * self.scale.unsqueeze(1)
        return self.view.weight_of(values, weight.shape)

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        zeros = 1 - float(self.mask.float().mean())
        frozen = ", frozen" if self.frozen else ""
        return f"filters={len(self.scale)}, zeros={zeros:.3f}{frozen}"
