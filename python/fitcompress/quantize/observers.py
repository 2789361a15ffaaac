"""Observers see the inputs of a layer batch by batch, then say what range they need.

All keep bounded memory, and their answer does not depend on how data are cut into
batches. With a ``channel`` there is one Δ for every entry of that dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from fitcompress.errors import OptionError
from fitcompress.model.value_histogram import (
    ValueHistogram,
    channel_rows,
    check_channels,
    finite_bounds,
    not_calibrated,
)
from fitcompress.model.value_ranges import Range, covering_range, least_error

__all__ = ["MSEObserver", "MinMaxObserver", "Observer", "PercentileObserver"]


class Observer(ABC):
    """Chooses the range of values that it has seen.

    Args:
        channel: Dimension that has a Δ for each of its entries; None for one in all.
    """

    def __init__(self, channel: int | None = None) -> None:
        self.channel = channel

    @abstractmethod
    def observe(self, x: torch.Tensor) -> None:
        """Take the values of ``x`` into account.

        Raises:
            NonFiniteError: One is NaN or infinite.
            CalibrationError: ``x`` has another number of channels than before.
        """

    @abstractmethod
    def range(self, bits: int, *, symmetric: bool = False) -> Range:
        """Return Δ and the bounds of the codes.

        Args:
            bits: 2 … 16.
            symmetric: lo = −hi, whether there were negative values or not.

        Raises:
            CalibrationError: No value was seen.
            OptionError: The bits are others.
        """


class MinMaxObserver(Observer):
    """Covers every value: from the smallest to the largest one."""

    _seen: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        """Widen the range to the values of ``x``."""
        rows = channel_rows(x.detach(), self.channel).float()
        if not rows.numel():
            return
        low, high = finite_bounds(rows)
        if self._seen is not None:
            check_channels(low, self._seen[0])
            low = torch.minimum(low, self._seen[0])
            high = torch.maximum(high, self._seen[1])
        self._seen = low, high

    def range(self, bits: int, *, symmetric: bool = False) -> Range:
        """Return the range that clips nothing."""
        if self._seen is None:
            raise not_calibrated()
        return covering_range(*self._seen, bits, symmetric=symmetric)


class _HistogramObserver(Observer):
    def __init__(self, channel: int | None = None, *, bins: int | None = None) -> None:
        super().__init__(channel)
        self.histogram = ValueHistogram(channel, bins)

    def observe(self, x: torch.Tensor) -> None:
        """Count the values of ``x``."""
        self.histogram.add(x)


class PercentileObserver(_HistogramObserver):
    """Covers a share of the values, and clips as many on either side.

    Args:
        share: Between the bounds; 1 is min-max.
        channel: Dimension that has a Δ for each of its entries; None for one in all.
        bins: Of the histogram, on either side of zero: a power of two.
    """

    def __init__(
        self,
        share: float = 0.9999,
        channel: int | None = None,
        *,
        bins: int | None = None,
    ) -> None:
        super().__init__(channel, bins=bins)
        if not 0 < share <= 1:
            raise OptionError("no share of the values", got=share, wanted="(0, 1]")
        self.share = share

    def range(self, bits: int, *, symmetric: bool = False) -> Range:
        """Return the range between the two percentiles."""
        tail = (1 - self.share) / 2
        low, high = self.histogram.quantile(tail), self.histogram.quantile(1 - tail)
        return covering_range(low, high, bits, symmetric=symmetric)


class MSEObserver(_HistogramObserver):
    """Minimises Σ (x − x̂)²: trades clipping against rounding.

    Args:
        channel: Dimension that has a Δ for each of its entries; None for one in all.
        bins: Of the histogram, on either side of zero: a power of two.
    """

    def range(self, bits: int, *, symmetric: bool = False) -> Range:
        """Return the best of the candidates of ``least_error``."""
        return least_error(self.histogram, bits, symmetric=symmetric)[0]
