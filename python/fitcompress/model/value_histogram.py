"""A running histogram of values, the same however the data are cut into batches.

Bin i counts the values with i·w ≤ x < (i + 1)·w, −N ≤ i < N, and w = 2^e with the least
e at which the largest magnitude fits. When a larger value comes, w is doubled and pairs
of bins are added: floor(x / 2w) = floor(floor(x / w) / 2), so the counts are exactly
those that all data at once would have had. Zeros, half of the values behind a ReLU, are
counted apart: every grid holds them.
"""

from __future__ import annotations

import math

import torch

from fitcompress.errors import CalibrationError, NonFiniteError

__all__ = ["ValueHistogram", "channel_rows"]

BINS, CHANNEL_BINS = 2048, 512  # N, for one histogram and for one per channel
LEAST_EXPONENT = -126  # of w: 1/w is a float32
CHUNK = 1 << 22  # values that are binned at a time


def channel_rows(x: torch.Tensor, channel: int | None) -> torch.Tensor:
    """Return ``x`` as [C, n], one row per channel.

    Args:
        x: Any shape.
        channel: The dimension of the channels; None makes one row of everything.
    """
    if channel is None:
        return x.reshape(1, -1)
    rows = x.movedim(channel, 0)
    return rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))


class ValueHistogram:
    """Counts values in 2N bins per channel, in bounded memory.

    Args:
        channel: Dimension with a histogram for each of its entries; None for one.
        bins: N, bins on either side of zero, a power of two.

    Attributes:
        counts: int64 [C, 2N]; column i + N is bin i, zeros excepted. None at first.
        zeros: How many values are zero, int64 [C].
        exponents: e, int64 [C].
        low: The smallest value, float32 [C].
        high: The largest value, float32 [C].
    """

    counts: torch.Tensor | None = None
    zeros: torch.Tensor
    exponents: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, channel: int | None = None, bins: int | None = None) -> None:
        self.channel = channel
        self.bins = bins or (BINS if channel is None else CHANNEL_BINS)
        if self.bins & (self.bins - 1):
            msg = f"bins must be a power of two; got {bins}"
            raise ValueError(msg)

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """Count the values of ``x``.

        Raises:
            NonFiniteError: One is NaN or infinite; nothing of ``x`` is counted.
            CalibrationError: ``x`` has another number of channels than before.
        """
        rows = channel_rows(x.detach(), self.channel).float()
        if not rows.numel():
            return
        low, high = finite_bounds(rows)
        largest = torch.maximum(low.abs(), high.abs())
        exponents = torch.frexp(largest)[1].long() - (self.bins.bit_length() - 1)
        exponents = exponents.clamp_min(LEAST_EXPONENT)
        exponents = torch.where(largest > 0, exponents, LEAST_EXPONENT)
        batch = ValueHistogram(self.channel, self.bins)
        batch.exponents, batch.low, batch.high = exponents, low, high
        if self.counts is not None:
            check_channels(low, self.low)
            batch.exponents = torch.maximum(exponents, self.exponents)
        batch.zeros = (rows == 0).sum(1)
        batch.counts = _counted(rows, batch.exponents, self.bins)
        batch.counts[:, self.bins] -= batch.zeros
        self.merge(batch)

    def merge(self, other: ValueHistogram) -> None:
        """Add the counts of another histogram of the same kind, exactly.

        Raises:
            CalibrationError: It has another number of channels.
        """
        if other.counts is None:
            return
        if self.counts is None:
            self.counts, self.zeros = other.counts.clone(), other.zeros
            self.exponents, self.low, self.high = other.exponents, other.low, other.high
            return
        check_channels(other.low, self.low)
        wider = torch.maximum(self.exponents, other.exponents)
        self.counts = _widened(self.counts, wider - self.exponents)
        self.counts += _widened(other.counts, wider - other.exponents)
        self.zeros, self.exponents = self.zeros + other.zeros, wider
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)

    @property
    def total(self) -> torch.Tensor:
        """How many values were counted, int64 [C]."""
        return self._known().sum(1) + self.zeros

    def quantile(self, share: float) -> torch.Tensor:
        """Return the value that ``share`` of all values do not exceed, float64 [C].

        Linear within a bin, and within the smallest and the largest value.

        Raises:
            CalibrationError: Nothing was counted.
        """
        half = self.bins
        counts = self._known()
        bins = torch.cat([counts[:, :half], self.zeros[:, None], counts[:, half:]], 1)
        starts = torch.arange(-half, half + 1, device=counts.device)
        starts = starts - (starts > 0).long()  # zeros: a bin of no width
        sums = bins.cumsum(1)
        target = share * sums[:, -1:].double()
        at = torch.searchsorted(sums.double(), target).clamp_max(2 * half)
        count = bins.gather(1, at)
        part = (target - (sums.gather(1, at) - count)) / count.clamp_min(1)
        part = torch.where(at == half, 0.0, part.clamp(0, 1))
        value = (starts[at] + part)[:, 0] * self._widths()
        return value.clamp(self.low.double(), self.high.double())

    def squared_error(self, scale: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        """Return Σ (x − Δ·clip(round(x/Δ), lo, hi))² of every channel, float64 [C].

        The values of a bin are taken as spread evenly over it; the square is integrated
        exactly: with t = x/Δ and k = clip(round(t), lo, hi),

            ∫ (t − k)² dt = k/12 + (t − k)³/3.

        Args:
            scale: Δ > 0, [C].
            lo: Least code.
            hi: Largest code.

        Raises:
            CalibrationError: Nothing was counted.
        """
        counts = self._known()
        used = counts.any(0).nonzero()
        if not len(used):
            return torch.zeros(len(counts), dtype=torch.float64, device=counts.device)
        first, last = int(used[0]), int(used[-1]) + 1
        edges = torch.arange(first, last + 1, device=counts.device) - self.bins
        width = (self._widths() / scale.double().to(counts.device))[:, None]
        t = edges * width
        code = t.round().clamp(lo, hi)
        integral = code / 12 + (t - code) ** 3 / 3
        mean = integral.diff(dim=1) / width
        total = (counts[:, first:last] * mean).sum(1)
        return total * scale.double().to(counts.device).square()

    def _known(self) -> torch.Tensor:
        if self.counts is None:
            raise not_calibrated()
        return self.counts

    def _widths(self) -> torch.Tensor:
        return _powers(self.exponents, torch.float64)


def finite_bounds(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and the largest value of every row.

    Raises:
        NonFiniteError: A value is NaN or infinite.
    """
    low, high = rows.aminmax(dim=1)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise NonFiniteError(
            "the input of a layer has values that are NaN or infinite",
            got=f"{int((~rows.isfinite()).sum())} of {rows.numel()}",
            wanted="finite numbers only",
            fix="look for NaN in the calibration data, or calibrate in float32",
        )
    return low, high


def check_channels(new: torch.Tensor, known: torch.Tensor) -> None:
    """Raise unless there are as many channels as before.

    Raises:
        CalibrationError: There are others.
    """
    if len(new) != len(known):
        raise CalibrationError(
            "the number of channels changes from batch to batch",
            got=len(new),
            wanted=len(known),
            fix="observe all values as one, channel=None",
        )


def not_calibrated() -> CalibrationError:
    """Return the error for a range that is asked for before any value was seen."""
    return CalibrationError(
        "no value was seen that a range could be chosen for",
        wanted="calibration data that reach the layer",
        fix="run the model on calibration data while it is observed",
    )


def _counted(rows: torch.Tensor, exponents: torch.Tensor, half: int) -> torch.Tensor:
    """Return the counts of values [C, n] in the bins −half … half − 1."""
    count = len(rows)
    inverse = _powers(-exponents, torch.float32)[:, None]
    offset = torch.arange(count, device=rows.device)[:, None] * 2 * half + half
    counts = torch.zeros(count * 2 * half, dtype=torch.int64, device=rows.device)
    for part in torch.split(rows, max(CHUNK // count, 1), dim=1):
        index = (part * inverse).floor_().long().add_(offset)
        counts += torch.bincount(index.flatten(), minlength=len(counts))
    return counts.view(count, 2 * half)


def _widened(counts: torch.Tensor, doublings: torch.Tensor) -> torch.Tensor:
    """Return the counts in bins that are 2^doublings times as wide."""
    if not bool(doublings.any()):
        return counts
    half = counts.shape[1] // 2
    index = torch.arange(-half, half, device=counts.device)
    index = index >> doublings.clamp_max(62)[:, None]
    return torch.zeros_like(counts).scatter_add_(1, index + half, counts)


def _powers(exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 2^e, exactly."""
    powers = [math.ldexp(1.0, e) for e in exponents.tolist()]
    return torch.tensor(powers, dtype=dtype, device=exponents.device)
