"""A running histogram of values, the same however the data are cut into batches.

Bin i counts the values with i·w ≤ x < (i + 1)·w, −N ≤ i < N, and w = 2^e with the least
e at which the largest magnitude fits. When a larger value comes, w is doubled and pairs
of bins are added: floor(x / 2w) = floor(floor(x / w) / 2), so the counts are exactly
those that all data at once would have had; only of negative values so small that x/w
underflows the sign may be lost. Zeros, half of the values behind a ReLU, are counted
apart: every grid holds them.

With outliers nearly all values lie in a few bins, far from evenly. So a bin also sums
the distances r of its values from its edge nearer to zero, in widths w, and their
squares: float64, the same for any cut but for rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fitcompress.errors import CalibrationError, NonFiniteError

__all__ = ["ValueHistogram", "channel_rows"]

BINS, CHANNEL_BINS = 2048, 512  # N, for one histogram and for one per channel
LEAST_EXPONENT = -126  # of w: 1/w is a float32
TINY = 1e-300  # of a length, to divide by
CHUNK = 1 << 20  # values that are binned at a time


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


@dataclass(frozen=True)
class _Spread:
    """Where the values of K bins lie, as |x|/w.

    Attributes:
        negative: Whether x is, [K].
        first: Begin of the even distribution with their mean and variance, [C, K].
        last: Its end.
        counts: How many there are, float64.
    """

    negative: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    counts: torch.Tensor


class ValueHistogram:
    """Counts values in 2N bins per channel, in bounded memory.

    Args:
        channel: Dimension with a histogram for each of its entries; None for one.
        bins: N, bins on either side of zero, a power of two.

    Attributes:
        counts: int64 [C, 2N]; column i + N is bin i, zeros excepted. None at first.
        distances: Σ r of the values of a bin, float64 [C, 2N].
        squares: Σ r².
        zeros: How many values are zero, int64 [C].
        exponents: e, int64 [C].
        low: The smallest value, float32 [C].
        high: The largest value, float32 [C].
    """

    counts: torch.Tensor | None = None
    distances: torch.Tensor
    squares: torch.Tensor
    zeros: torch.Tensor
    exponents: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    _spread: _Spread | None = None

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
        batch._count(rows)
        self.merge(batch)

    def merge(self, other: ValueHistogram) -> None:
        """Add the counts of another histogram of the same kind, exactly.

        Raises:
            CalibrationError: It has another number of channels.
        """
        if other.counts is None:
            return
        self._spread = None
        if self.counts is None:
            self.counts, self.zeros = other.counts.clone(), other.zeros
            self.distances, self.squares = other.distances, other.squares
            self.exponents, self.low, self.high = other.exponents, other.low, other.high
            return
        check_channels(other.low, self.low)
        wider = torch.maximum(self.exponents, other.exponents)
        mine, new = self._widened(wider), other._widened(wider)
        self.counts, self.distances, self.squares = (
            a + b for a, b in zip(mine, new, strict=True)
        )
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

        The values of a bin are taken as spread evenly about their mean, as widely as
        their variance says: exact wherever these fall on one code. With t = |x|/Δ and
        k = clip(round(t), hi), or −lo if x is negative,

            ∫ (t − k)² dt = k/12 + (t − k)³/3,

        whose mean over [t, t'] is S + (k' − k)/(t' − t) · (1/12 − S) with
        3 S = (t − k)² + (t − k)(t' − k') + (t' − k')².

        The result is rounded to 24 bits, so that it is the same for any cut.

        Args:
            scale: Δ > 0, [C].
            lo: Least code.
            hi: Largest code.

        Raises:
            CalibrationError: Nothing was counted.
        """
        spread = self._spread or self._find_spread()
        scale = scale.double().to(spread.counts.device)
        width = (self._widths() / scale)[:, None]
        cap = torch.where(spread.negative, -lo, hi).double()
        a, b = spread.first * width, spread.last * width
        low, high = a.round().clamp_(-cap, cap), b.round().clamp_(-cap, cap)
        across = (high - low).div_((b - a).clamp_min_(TINY))  # codes per length
        a, b = a.sub_(low), b.sub_(high)
        third = (a + b).mul_(a).addcmul_(b, b).div_(3)
        error = across.mul_(1 / 12 - third).add_(third)
        total = error.mul_(spread.counts).sum(1) * scale.square()
        upper = total * (2**29 + 1)
        return upper - (upper - total)

    def _find_spread(self) -> _Spread:
        """Return, and keep, where the values of bins that are not empty lie."""
        counts = self._known()
        used = counts.any(0).nonzero()[:, 0]
        index = used - self.bins
        negative = index < 0
        inner = torch.where(negative, ~index, index)
        counts = counts[:, used].double()
        count = counts.clamp_min(1)
        mean = self.distances[:, used] / count
        variance = (self.squares[:, used] / count - mean.square()).clamp_min(0)
        half = torch.maximum((3 * variance).sqrt(), 1e-6 * mean)
        mean += inner
        self._spread = _Spread(negative, mean - half, mean + half, counts)
        return self._spread

    def _count(self, rows: torch.Tensor) -> None:
        """Fill the bins with values [C, n], zeros excepted; exponents are known."""
        channels, size = len(rows), len(rows) * 2 * self.bins
        inverse = _powers(-self.exponents, torch.float32)[:, None]
        offset = torch.arange(channels, device=rows.device)[:, None] * 2 * self.bins
        counts = torch.zeros(size, dtype=torch.int64, device=rows.device)
        distances, squares = torch.zeros(2, size, dtype=torch.float64).to(rows.device)
        for part in torch.split(rows, max(CHUNK // channels, 1), dim=1):
            scaled = part * inverse
            index = scaled.floor().long()
            inner = torch.where(index < 0, ~index, index)
            distance = (scaled.double().abs_() - inner).flatten()
            index = (index + (offset + self.bins)).flatten()
            counts += torch.bincount(index, minlength=size)
            distances.scatter_add_(0, index, distance)
            squares.scatter_add_(0, index, distance.square_())
        shape = channels, 2 * self.bins
        self.counts = counts.view(shape)
        self.counts[:, self.bins] -= self.zeros
        self.distances, self.squares = distances.view(shape), squares.view(shape)

    def _widened(
        self, exponents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return counts and sums in bins of width 2^exponents, no less than now."""
        known = self._known(), self.distances, self.squares
        doublings = exponents - self.exponents
        if not bool(doublings.any()):
            return known
        counts, distances, squares = known
        index = torch.arange(-self.bins, self.bins, device=counts.device)
        wide = index >> doublings.clamp_max(62)[:, None]
        inner, outer = (torch.where(i < 0, ~i, i) for i in (index, wide))
        part = _powers(-doublings, torch.float64)[:, None]
        before = inner * part - outer  # the old edge, from the new one
        squares = squares * part**2 + before * (2 * part * distances + before * counts)
        distances = distances * part + before * counts
        to = wide + self.bins
        return (
            torch.zeros_like(counts).scatter_add_(1, to, counts),
            torch.zeros_like(distances).scatter_add_(1, to, distances),
            torch.zeros_like(squares).scatter_add_(1, to, squares),
        )

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


def _powers(exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 2^e, exactly."""
    powers = [math.ldexp(1.0, e) for e in exponents.tolist()]
    return torch.tensor(powers, dtype=dtype, device=exponents.device)
