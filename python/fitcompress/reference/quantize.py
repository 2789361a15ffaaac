"""Twin of `fitcompress.ops.quantize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def fake_quantize_prune(
    weight: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    max_code: int = 0,
    *,
    min_code: int | None = None,
    group: int = 0,
    regrow: bool = False,
) -> Tensor:
    """Round the weight to its grid and drop what the mask does not keep."""
    delta = _per_weight(scale, weight, group)
    codes = _codes(weight.float(), delta, max_code, min_code)
    kept = torch.where(_keep(mask, weight), codes * delta, 0.0)
    return kept.to(weight.dtype).contiguous()


def fake_quantize_prune_backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    max_code: int = 0,
    *,
    min_code: int | None = None,
    group: int = 0,
    regrow: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the straight-through and the LSQ gradient of `fake_quantize_prune`."""
    delta = _per_weight(scale, weight, group)
    position = weight.float() / delta
    codes = _codes(weight.float(), delta, max_code, min_code)
    inside = position.round() == codes
    free = ~(delta <= 0)
    kept = _keep(mask, weight) & free
    passes = inside & (free if regrow else kept)
    grad_weight = torch.where(passes, grad.float(), 0.0)
    terms = grad.float() * torch.where(inside, codes - position, codes)
    terms = torch.where(kept, terms, 0.0)
    sums = torch.zeros(scale.numel(), dtype=torch.float64, device=scale.device)
    unit = _units(scale, weight, group).flatten()
    sums.index_add_(0, unit, terms.double().flatten())
    return grad_weight.to(weight.dtype).contiguous(), sums.view(scale.shape).float()


def _codes(
    weight: Tensor, delta: Tensor, max_code: int, min_code: int | None
) -> Tensor:
    codes = (weight / delta).round()
    if max_code > 0:
        codes = codes.clamp(-max_code if min_code is None else min_code, max_code)
    return torch.where(delta <= 0, 0.0, codes) + 0.0  # no −0


def _per_weight(scale: Tensor, weight: Tensor, group: int) -> Tensor:
    return scale.flatten()[_units(scale, weight, group)]


def _units(scale: Tensor, weight: Tensor, group: int) -> Tensor:
    """Return the index of the scale of every weight."""
    if scale.numel() == 1:
        return torch.zeros_like(weight, dtype=torch.int64)
    rows = weight.shape[0]
    columns = weight.numel() // max(rows, 1)
    per_row = -(-columns // group) if group else 1
    row = torch.arange(rows, device=weight.device)[:, None] * per_row
    column = torch.arange(columns, device=weight.device) // (group or max(columns, 1))
    return (row + column).view(weight.shape)


def _keep(mask: Tensor | None, weight: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(weight, dtype=torch.bool)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask[:, None] >> shifts) & 1
    return bits.flatten()[: weight.numel()].bool().reshape(weight.shape)
