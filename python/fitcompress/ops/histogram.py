"""Counts of weights by magnitude."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fitcompress.ops.library import register_fake

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAGNITUDE_BINS", "magnitude_histogram"]

MAGNITUDE_BINS = 2**15
INFINITE = 0x7F80


def magnitude_histogram(weight: Tensor) -> Tensor:
    """Count weights by the leading 16 bits of |w| as float32.

    Bin k holds the weights whose float32 magnitude has the bits k·2¹⁶ to
    k·2¹⁶ + 2¹⁶ − 1: 8 bits of exponent and 7 of mantissa, 128 bins an octave. Bins rise
    with |w|.

    Args:
        weight: Any shape, float32, bfloat16 or float16.

    Returns:
        int64 [32768]; the sum is the number of weights.

    Raises:
        ValueError: If the type is another, or a weight is not finite.

    Example:
        >>> counts = magnitude_histogram(torch.tensor([1.0, -1.0, 0.0]))
        >>> counts.nonzero().flatten().tolist(), int(counts[0x3F80])
        ([0, 16256], 2)
    """
    counts: Tensor = torch.ops.fitcompress.magnitude_histogram(weight.detach())
    if counts.is_meta:
        return counts
    bad = int(counts[INFINITE:].sum())
    if bad:
        message = f"magnitude_histogram: weight has {bad} values that are not finite"
        raise ValueError(message)
    return counts


def _fake_magnitude_histogram(weight: Tensor) -> Tensor:
    return weight.new_empty(MAGNITUDE_BINS, dtype=torch.int64)


register_fake("magnitude_histogram", _fake_magnitude_histogram)
