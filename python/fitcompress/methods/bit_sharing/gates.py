"""Gates that are 0 or 1 and have the gradient of a sigmoid.

    g = 1[A > τ],    ∂g/∂A = σ′(A − τ),    ∂g/∂τ = −σ′(A − τ)

with A what a rung of bits would mend, or the norm of a group of filters, and τ learnt.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["filter_gate", "group_norms", "highest_threshold", "indicator"]


class _Indicator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, measure: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(measure, threshold)
        return (measure > threshold).to(measure.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        measure, threshold = ctx.saved_tensors
        s = torch.sigmoid(measure - threshold)
        slope = grads[0] * s * (1 - s)
        return slope.sum_to_size(measure.shape), (-slope).sum_to_size(threshold.shape)


def indicator(measure: Tensor, threshold: Tensor) -> Tensor:
    """Return 1 where A > τ, else 0, with the gradients of σ(A − τ).

    Args:
        measure: A, any shape.
        threshold: τ, broadcast to it.
    """
    gate: Tensor = _Indicator.apply(measure, threshold)  # type: ignore[no-untyped-call]
    return gate


def group_norms(matrix: Tensor, size: int) -> Tensor:
    """Return ‖w_c‖₁ of every group of filters, divided by the layer's largest.

    Args:
        matrix: The weight, [rows, columns], a filter a row.
        size: B, consecutive filters of a group; the last group may have fewer.

    Returns:
        [⌈rows / B⌉], detached, in [0, 1]. A smaller last group counts as if it had B
        filters of its mean norm.
    """
    sums = matrix.detach().abs().sum(1)
    norms = torch.stack([part.mean() for part in torch.split(sums, size)])
    largest = norms.max()
    return norms / largest if float(largest) > 0 else norms


def filter_gate(matrix: Tensor, size: int, threshold: Tensor) -> Tensor:
    """Return the gates of all filters, [rows]: one decision for a group of B.

    Args:
        matrix: The weight, [rows, columns].
        size: B.
        threshold: τ_p, a scalar.
    """
    gates = indicator(group_norms(matrix, size), threshold)
    return gates.repeat_interleave(size)[: len(matrix)]


def highest_threshold(norms: Tensor, share: float) -> float:
    """Return the largest τ_p that closes at most a share of the groups.

    Args:
        norms: Of all groups, [G].
        share: In [0, 1).
    """
    least = norms.sort().values
    first_kept = least[int(share * len(least))]
    below = torch.nextafter(first_kept, torch.full_like(first_kept, -math.inf))
    return float(below)
