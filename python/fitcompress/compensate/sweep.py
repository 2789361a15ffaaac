"""Quantize one layer so that later columns absorb the errors of earlier ones.

After Frantar, Singh, Alistarh 2022 (OBC, arXiv 2208.11580) and Frantar et al. 2022
(GPTQ, arXiv 2210.17323), with unbounded entropy-coded levels as well as fixed-point
ones:

1. target  W* = W (C + δI)(H + δI)⁻¹: what repairs the errors of the layers before;
2. U, the upper Cholesky factor of (H + δI)⁻¹, columns in falling order of H_jj;
3. for each column j: k = round(w_j / Δ); w_{j'} −= (w_j − kΔ) U_jj' / U_jj for j' > j.

δ is ``damping`` times the mean diagonal of H.
"""

from __future__ import annotations

import logging

import torch

from fitcompress import ops
from fitcompress.errors import CalibrationError
from fitcompress.threads import threads

__all__ = ["compensated_codes"]

logger = logging.getLogger(__name__)

DAMPING = 0.01
ATTEMPTS = 6


def compensated_codes(
    matrix: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    scale: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    max_code: int = 0,
    damping: float = DAMPING,
    name: str = "",
) -> torch.Tensor:
    """Return compensated codes of one layer.

    Args:
        matrix: The dense weight, [rows, columns].
        h: E[x̂ x̂ᵀ], float64 [groups, columns, columns].
        c: E[x x̂ᵀ], likewise.
        scale: Δ, [1] or [rows].
        mask: What may be non-zero, bool [rows, columns].
        max_code: Largest |code|, 0 for unbounded.
        damping: δ over the mean diagonal of H.
        name: Of the layer, for messages.

    Returns:
        Codes, int32 [rows, columns].

    Raises:
        CalibrationError: H stays singular with a hundred thousand times the damping.
    """
    groups = len(h)
    weights = matrix.double().reshape(groups, -1, matrix.shape[1])
    scales = scale.double().reshape(-1)
    if len(scales) > 1:
        scales = scales.reshape(groups, -1)
    codes = torch.empty(weights.shape, dtype=torch.int32)
    for g in range(groups):
        own_scale = scales if scales.dim() == 1 else scales[g]
        own_mask = None if mask is None else mask.reshape(weights.shape)[g]
        with threads(1):  # a factor's last bits depend on the number of threads
            target, factor, order = _prepare(weights[g], h[g], c[g], damping, name)
        ordered_mask = None if own_mask is None else own_mask[:, order].contiguous()
        swept = ops.error_feedback_sweep(
            target[:, order].contiguous(),
            factor,
            own_scale.contiguous(),
            ordered_mask,
            max_code,
        )
        codes[g][:, order] = swept
    return codes.reshape(matrix.shape)


def _prepare(
    weight: torch.Tensor, h: torch.Tensor, c: torch.Tensor, damping: float, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the drift-corrected target, the factor U and the order of the columns."""
    mean = float(h.diagonal().mean())
    if mean <= 0:  # the layer's inputs are all zero: nothing to compensate with
        eye = torch.eye(len(h), dtype=torch.float64)
        return weight, eye, torch.arange(len(h))
    for attempt in range(ATTEMPTS):
        ridge = damping * 10**attempt * mean
        ridged_h, ridged_c = h.clone(), c.clone()
        ridged_h.diagonal().add_(ridge)
        ridged_c.diagonal().add_(ridge)
        order = ridged_h.diagonal().argsort(descending=True, stable=True)
        lower, failed = torch.linalg.cholesky_ex(ridged_h[order][:, order])
        if failed:
            logger.warning("layer %s: H is singular, damping raised tenfold", name)
            continue
        upper, failed = torch.linalg.cholesky_ex(
            torch.cholesky_inverse(lower), upper=True
        )
        if failed:
            logger.warning("layer %s: H is near singular, damping raised tenfold", name)
            continue
        right = (weight @ ridged_c).T
        target = torch.empty_like(weight)
        target[:, order] = torch.cholesky_solve(right[order], lower).T
        return target, upper.contiguous(), order
    raise CalibrationError(
        f"the input statistics of layer {name!r} cannot be inverted",
        got=f"no Cholesky factor at {damping * 10 ** (ATTEMPTS - 1):g} damping",
        wanted="calibration inputs that are not degenerate",
        fix="calibrate with more, and more varied, samples",
    )
