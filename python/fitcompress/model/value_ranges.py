"""Ranges of codes for values, with zero exactly on the grid.

    x̂ = Δ · clip(round(x / Δ), lo, hi),    lo ≤ 0 < hi,    hi − lo < 2^a

for a bits: unsigned (lo = 0) if nothing is negative; affine otherwise, lo = −z and
hi = 2^a − 1 − z with a zero point z that shifts the codes only, never the values; or
symmetric, lo = −hi.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fitcompress.errors import OptionError
from fitcompress.model.value_histogram import not_calibrated

if TYPE_CHECKING:
    from fitcompress.model.value_histogram import ValueHistogram

__all__ = ["Range", "check_bits", "covering_range", "covering_step", "least_error"]

NARROWEST = 1 / 64  # of the covering range, among the candidates
COARSE, FINE = 33, 16  # candidates: over the whole span, and about the best of them


@dataclass(frozen=True)
class Range:
    """Where values may lie: Δ·k for lo ≤ k ≤ hi.

    Attributes:
        scale: Δ > 0, float32, one or one per channel.
        min_code: lo, at most 0.
        max_code: hi, at least 1.
    """

    scale: torch.Tensor
    min_code: int
    max_code: int


def check_bits(bits: int) -> None:
    """Raise unless ``bits`` can be the bits of an activation.

    Raises:
        OptionError: They are not 2 … 16.
    """
    if type(bits) is not int or not 2 <= bits <= 16:
        raise OptionError(
            "activations cannot have these bits", got=repr(bits), wanted="2 … 16"
        )


def covering_step(
    low: torch.Tensor, high: torch.Tensor, bits: int, *, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest Δ of every channel that clips nothing, and the common −lo.

    Args:
        low: The smallest value or 0, [C].
        high: The largest value or 0, [C].
        bits: a.
        symmetric: lo = −hi.

    Returns:
        Δ [C], 0 where all values are 0, and −lo, integral, [].
    """
    if symmetric:
        largest = torch.maximum(high, -low)
        q = 2 ** (bits - 1) - 1
        return largest / q, torch.full_like(largest.amax(), q)
    levels = 2**bits - 1
    below, above = -low.amin(), high.amax()
    whole = below / 2 + above / 2  # halves: the sum may be beyond the type
    share = below / 2 / whole.clamp_min(torch.finfo(low.dtype).tiny)
    zero = (levels * share).round().clamp(1, levels - 1)
    zero = torch.where(below > 0, zero, 0.0)
    return torch.maximum(high / (levels - zero), -low / zero.clamp_min(1)), zero


def covering_range(
    low: torch.Tensor, high: torch.Tensor, bits: int, *, symmetric: bool = False
) -> Range:
    """Return the range that clips none of the values from ``low`` to ``high``.

    Args:
        low: The smallest value, [C].
        high: The largest value, [C].
        bits: 2 … 16.
        symmetric: lo = −hi, whether there are negative values or not.

    Raises:
        OptionError: The bits are others.
    """
    check_bits(bits)
    low, high = low.double().clamp_max(0), high.double().clamp_min(0)
    step, zero = covering_step(low, high, bits, symmetric=symmetric)
    lo = -int(zero)
    return Range(_usable(step), lo, -lo if symmetric else 2**bits - 1 + lo)


def least_error(
    histogram: ValueHistogram, bits: int, *, symmetric: bool = False
) -> tuple[Range, torch.Tensor]:
    """Return the range with the least Σ (x − x̂)², and that sum of every channel.

    Δ is tried at 49 shares of the covering one, 33 of them from 1 to 1/64 and the rest
    about the best; lo at the covering one, its doubles and halves and 0, and from the
    best of these on downhill. All channels have lo and hi in common.

    Args:
        histogram: The values.
        bits: 2 … 16.
        symmetric: lo = −hi, whether there are negative values or not.

    Returns:
        The range, and the errors, float64 [C].

    Raises:
        CalibrationError: The histogram is empty.
        OptionError: The bits are others.
    """
    check_bits(bits)
    if histogram.counts is None:
        raise not_calibrated()
    low = histogram.low.double().clamp_max(0)
    high = histogram.high.double().clamp_min(0)
    covering = -covering_range(low, high, bits, symmetric=symmetric).min_code
    levels = 2 * covering if symmetric else 2**bits - 1
    least = 1 if covering and not bool((high > 0).any()) else 0
    tried: dict[int, tuple[Range, torch.Tensor]] = {}

    def error_at(zero: int) -> float:
        if not least <= zero < levels:
            return math.inf
        if zero not in tried:
            lo, hi = -zero, levels - zero
            widest = torch.maximum(high / hi, low / min(lo, -1))
            scale, error = _least_scale(histogram, widest, lo, hi)
            tried[zero] = Range(scale, lo, hi), error
        return float(tried[zero][1].sum())

    best = covering
    if covering and not symmetric:
        doubles = [covering << n for n in range(bits)]
        halves = [covering >> n for n in range(1, bits + 1)]
        best = min([*doubles, *halves], key=error_at)
        step = max(best // 2, 1)
        while step:
            nearer = min([best, best - step, best + step], key=error_at)
            step, best = step if nearer != best else step // 2, nearer
    error_at(best)
    return tried[best]


def _least_scale(
    histogram: ValueHistogram, widest: torch.Tensor, lo: int, hi: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale of every channel with the least error, and that error."""
    ratio = NARROWEST ** (1 / (COARSE - 1))
    share = torch.ones_like(widest)
    scale = _usable(widest)
    error = histogram.squared_error(scale, lo, hi)

    def try_shares(shares: torch.Tensor) -> None:
        nonlocal share, scale, error
        tried = _usable(widest * shares)
        found = histogram.squared_error(tried, lo, hi)
        better = found < error
        share = torch.where(better, shares, share)
        scale = torch.where(better, tried, scale)
        error = torch.where(better, found, error)

    for n in range(1, COARSE):
        try_shares(torch.full_like(widest, ratio**n))
    middle = share
    for n in range(FINE):
        try_shares(middle * ratio ** (2 * (n + 1) / (FINE + 1) - 1))
    return scale, error


def _usable(step: torch.Tensor) -> torch.Tensor:
    """Return steps as float32 > 0; where there are only zeros, any serves: 1."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(step > 0, step.float().clamp_min(tiny), 1.0)
