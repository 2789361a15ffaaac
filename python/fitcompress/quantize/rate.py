"""Rate-aware rounding: the level that is cheapest in error and bits together.

    k = argmin_k (w/Δ − k)² + λ · bits(k),   bits(k) = −log₂ p(k)

over the nearest level, the one next to it towards zero, and zero; p are the frequencies
of the codes of the same layer. λ = 0 is rounding to the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Rate", "code_lengths", "rate_aware_codes"]

REACH = 64  # codes beyond ±REACH share one length


@dataclass(frozen=True)
class Rate:
    """What a bit costs a layer.

    Attributes:
        lengths: bits(k) for k = −REACH … REACH, float32.
        weight: λ, in squared steps per bit.
    """

    lengths: torch.Tensor
    weight: float


def code_lengths(codes: torch.Tensor) -> torch.Tensor:
    """Return bits(k) for k = −64 … 64 from the frequencies of ``codes`` plus ½."""
    shifted = codes.flatten().clamp(-REACH, REACH).long() + REACH
    counts = torch.bincount(shifted, minlength=2 * REACH + 1).float() + 0.5
    return -(counts / counts.sum()).log2()


def rate_aware_codes(scaled: torch.Tensor, rate: Rate) -> torch.Tensor:
    """Return the codes of weights in units of their step, as integral floats.

    Args:
        scaled: w / Δ.
        rate: What a bit costs.
    """
    nearest = scaled.round()
    if rate.weight == 0:
        return nearest

    def cost(code: torch.Tensor) -> torch.Tensor:
        index = code.clamp(-REACH, REACH).long() + REACH
        return (scaled - code).square() + rate.weight * rate.lengths[index]

    best, least = nearest, cost(nearest)
    for other in (nearest - nearest.sign(), torch.zeros_like(nearest)):
        candidate = cost(other)
        better = candidate < least
        best = torch.where(better, other, best)
        least = torch.where(better, candidate, least)
    return best
