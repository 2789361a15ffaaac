"""Fused quantize-prune for training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fitcompress.ops.library import register_fake

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fake_quantize_prune"]


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
    """Round a weight to its grid and drop what the mask does not keep.

    ŵ = mask · Δ · clip(round(w/Δ), lo, hi), half to even, with hi = `max_code` and
    lo = `min_code`, −hi if that is None; where Δ ≤ 0, ŵ is 0, and a Δ that is not a
    number gives ŵ that are none. Gradients, with k = round(w/Δ) and the mask 1:

    - weight: the incoming gradient if lo ≤ k ≤ hi, else 0 (straight-through);
    - scale: Σ grad · (k − w/Δ if lo ≤ k ≤ hi, else the bound) (LSQ).

    Where the mask is 0 both are 0; with `regrow` the weight gets the incoming gradient
    there as if it were kept, so that it can come back. The sums are float64 over
    partial sums of at most 32 float32 terms. There are no second derivatives.

    Args:
        weight: Any shape, float32, bfloat16 or float16; the first dimension are rows.
        scale: Δ, float32: one element, one a row, or ⌈columns/group⌉ a row, where
            columns are all elements of a row.
        mask: Bits of `pack_mask`, uint8 [⌈n/8⌉]; None keeps all.
        max_code: hi; unbounded on both sides if not positive.
        min_code: lo, at most 0.
        group: Consecutive columns that share a scale, 0 for the whole row.
        regrow: Let masked weights receive gradients.

    Returns:
        ŵ, contiguous, with the shape and type of the weight.

    Raises:
        ValueError: If shapes, types or devices do not fit.
        RuntimeError: From a second derivative.

    Source: Learned step size quantization (Esser et al., 2020, arXiv 1902.08153).
    """
    result: Tensor = torch.ops.fitcompress.fake_quantize_prune(
        weight, scale, mask, max_code, min_code, group, regrow
    )
    return result


def _fake_fake_quantize_prune(
    weight: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    max_code: int,
    min_code: int | None = None,
    group: int = 0,
    regrow: bool = False,
) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _fake_fake_quantize_prune_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        torch.empty_like(scale, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, scale, mask, *ctx.options = inputs
    ctx.save_for_backward(weight, scale, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, mask = ctx.saved_tensors
    grad_weight, grad_scale = torch.ops.fitcompress.fake_quantize_prune_backward(
        grad, weight, scale, mask, *ctx.options
    )
    return grad_weight, grad_scale, None, None, None, None, None


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep nothing."""


def _second_backward(ctx: Any, *grads: Tensor) -> None:
    message = "fake_quantize_prune: there are no second derivatives"
    raise RuntimeError(message)


register_fake("fake_quantize_prune", _fake_fake_quantize_prune)
register_fake("fake_quantize_prune_backward", _fake_fake_quantize_prune_backward)
torch.library.register_autograd(
    "fitcompress::fake_quantize_prune", _backward, setup_context=_setup_context
)
torch.library.register_autograd(
    "fitcompress::fake_quantize_prune_backward",
    _second_backward,
    setup_context=_setup_backward_context,
)
