"""Fused quantize-prune for training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fitcompress.ops.library import register_fake

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fake_quantize_prune"]


def fake_quantize_prune(
    weight: Tensor, scale: Tensor, mask: Tensor | None = None, max_code: int = 0
) -> Tensor:
    """Round a weight to its grid and drop what the mask does not keep.

    ŵ = mask · Δ · clip(round(w/Δ), −q, q), half to even; rows with Δ ≤ 0 become 0.
    Gradients, where k = round(w/Δ) and mask is 1:

    - weight: the incoming gradient if |k| ≤ q, else 0 (straight-through);
    - scale: Σ grad · (k − w/Δ if |k| ≤ q, else ±q) (LSQ).

    Args:
        weight: Any shape, float32, bfloat16 or float16; the first dimension are rows.
        scale: Δ, float32, one element or one a row.
        mask: Bits of `pack_mask`, uint8 [⌈n/8⌉]; None keeps all.
        max_code: q; unbounded if not positive.

    Returns:
        ŵ, contiguous, with the shape and type of the weight.

    Raises:
        ValueError: If shapes, types or devices do not fit.

    Source: Learned step size quantization (Esser et al., 2020, arXiv 1902.08153).
    """
    result: Tensor = torch.ops.fitcompress.fake_quantize_prune(
        weight, scale, mask, max_code
    )
    return result


def _fake_fake_quantize_prune(
    weight: Tensor, scale: Tensor, mask: Tensor | None, max_code: int
) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _fake_fake_quantize_prune_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, mask: Tensor | None, max_code: int
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        torch.empty_like(scale, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, scale, mask, ctx.max_code = inputs
    ctx.save_for_backward(weight, scale, mask)


def _backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, None, None]:
    weight, scale, mask = ctx.saved_tensors
    grad_weight, grad_scale = torch.ops.fitcompress.fake_quantize_prune_backward(
        grad, weight, scale, mask, ctx.max_code
    )
    return grad_weight, grad_scale, None, None


register_fake("fake_quantize_prune", _fake_fake_quantize_prune)
register_fake("fake_quantize_prune_backward", _fake_fake_quantize_prune_backward)
torch.library.register_autograd(
    "fitcompress::fake_quantize_prune", _backward, setup_context=_setup_context
)
