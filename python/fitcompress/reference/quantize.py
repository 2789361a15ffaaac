"""Twin of `fitcompress.ops.quantize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def fake_quantize_prune(
    weight: Tensor, scale: Tensor, mask: Tensor | None = None, max_code: int = 0
) -> Tensor:
    """Round the weight to its grid and drop what the mask does not keep."""
    delta = _per_row(scale, weight)
    codes = _codes(weight.float(), delta, max_code)
    kept = torch.where(_keep(mask, weight), codes * delta, 0.0)
    return kept.to(weight.dtype).contiguous()


def fake_quantize_prune_backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    max_code: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute the straight-through and the LSQ gradient of `fake_quantize_prune`."""
    delta = _per_row(scale, weight)
    position = weight.float() / delta
    codes = _codes(weight.float(), delta, max_code)
    inside = position.round() == codes
    kept = torch.where(_keep(mask, weight) & (delta > 0), grad.float(), 0.0)
    grad_weight = torch.where(inside, kept, 0.0).to(weight.dtype).contiguous()
    terms = torch.where(kept == 0, 0.0, torch.where(inside, codes - position, codes))
    terms = (kept * terms).double()
    if scale.numel() == 1:
        terms = terms.sum()
    elif terms.dim() > 1:
        terms = terms.sum(tuple(range(1, terms.dim())))
    return grad_weight, terms.reshape(scale.shape).float()


def _codes(weight: Tensor, delta: Tensor, max_code: int) -> Tensor:
    codes = (weight / delta).round()
    if max_code > 0:
        codes = codes.clamp(-max_code, max_code)
    return torch.where(delta > 0, codes, 0.0) + 0.0  # no −0


def _per_row(scale: Tensor, weight: Tensor) -> Tensor:
    if scale.numel() == 1:
        return scale.reshape([1] * weight.dim())
    return scale.reshape([-1] + [1] * (weight.dim() - 1))


def _keep(mask: Tensor | None, weight: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(weight, dtype=torch.bool)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask[:, None] >> shifts) & 1
    return bits.flatten()[: weight.numel()].bool().reshape(weight.shape)
