"""Scale steps, or else fixed-point scales, until the packed file uses its budget.

The size of the file falls smoothly with the steps. Rounded codes tell the shape of that
curve at next to no cost; each compensated attempt, which is expensive, corrects its
level.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch

from fitcompress.errors import BudgetExceededError
from fitcompress.storage.save_load import packed_bytes

if TYPE_CHECKING:
    from torch import nn

    from fitcompress.compensate.compressor import Compressor
    from fitcompress.search.plan import Plan

__all__ = ["Pace", "entropy_bits", "fit"]

logger = logging.getLogger(__name__)

ATTEMPTS = 6
PILOTS = 3
NEAR = 0.05  # of the limit: close enough for a pilot
TOLERANCE = 0.005  # share of the budget that may stay unused
WIDEST = 64.0  # largest factor on the steps, either way


def entropy_bits(codes: torch.Tensor) -> float:
    """Return n times the order-0 entropy of integer codes, in bits."""
    _, found = torch.unique(codes, return_counts=True)
    counts = found.double()
    return float((counts * (counts.sum() / counts).log2()).sum())


class Pace:
    """Gives each layer the factor on its step, so that the file comes out as planned.

    Codes of a whole network differ by a little from what was expected of them. Like
    the rate control of a video coder, the factor of the next layer makes up for what
    the layers before have spent too much or too little.

    Args:
        label: Names the attempt.
        factor: The factor to start from.
        expected: Bytes of the codes of every layer at this factor; None: all layers get
            ``factor``.
        target: Bytes that all codes together should take.
        slope: −d log bytes / d log factor.

    Attributes:
        label: As above.
        bytes: Layer → bytes of its codes, of the layers done.
        factors: Layer → factor, likewise.
    """

    def __init__(
        self,
        label: str,
        factor: float,
        expected: dict[str, float] | None = None,
        target: float = 0.0,
        slope: float = 0.5,
    ) -> None:
        self.label = label
        self.bytes: dict[str, int] = {}
        self.factors: dict[str, float] = {}
        self._factor, self._expected = factor, expected
        self._target, self._slope = target, max(slope, 0.1)

    @property
    def free(self) -> bool:
        """Whether all layers get the same factor, whatever they take."""
        return self._expected is None

    def factor(self, name: str) -> float:
        """Return the factor of a layer that comes next."""
        factor = self._factor
        if self._expected is not None:
            ahead = sum(b for n, b in self._expected.items() if n not in self.bytes)
            left = self._target - sum(self.bytes.values())
            # No further than a tenth: the allocation among layers should stay.
            ratio = min(max(ahead / max(left, 1.0), 0.5), 2.0) ** (1 / self._slope)
            factor *= min(max(ratio, 1 / 1.1), 1.1)
        self.factors[name] = factor
        return factor

    def spent(self, name: str, size: int) -> None:
        """Learn the bytes of a layer's codes."""
        self.bytes[name] = size

    def mean_factor(self) -> float:
        """Return the geometric mean of the factors, layers weighted by their bytes."""
        total = sum(self.bytes.values())
        logs = (size * math.log(self.factors[n]) for n, size in self.bytes.items())
        return math.exp(sum(logs) / max(total, 1))

    def at(self, factor: float) -> dict[str, float]:
        """Return the bytes of every layer to expect at one factor for all."""
        return {
            name: size * (self.factors[name] / factor) ** self._slope
            for name, size in self.bytes.items()
        }


def fit(compressor: Compressor, plan: Plan) -> nn.Module:
    """Return the compressed model at the factor that uses ``plan.limit_bytes``.

    Raises:
        BudgetExceededError: No factor meets the budget.
    """
    limit = plan.limit_bytes
    scalable = any(level.grid.step is not None for level in plan.levels.values())
    planned = None
    if limit is None or not scalable:
        small = compressor.at(Pace("layers", 1.0))
        if limit is None:
            return small
        planned = len(packed_bytes(small))
        if planned <= limit:
            return small
        if not compressor.options.widen:
            _check_size(planned, limit)
        logger.info("%d of %d bytes: fixed-point scales are widened", planned, limit)
    search = _FactorSearch(compressor, limit)
    if planned is None:
        done = _pilot(compressor, search, limit)
    else:
        done = None
        search.tell(1.0, planned)
    best: tuple[int, nn.Module] | None = None
    size, margin = 0, TOLERANCE / 2
    for attempt in range(ATTEMPTS):
        factor = search.next()
        if search.tried(factor):
            break  # the widest there is, or nothing left between two neighbours
        pace = Pace(f"layers, attempt {attempt + 1}", factor)
        if done is not None:
            slope = search.slope(factor)
            target = (1 - margin) * limit - done[1]
            pace = Pace(pace.label, factor, done[0].at(factor), target, slope)
        small = compressor.at(pace)
        size = len(packed_bytes(small))
        logger.info(
            "attempt %d: factor %.5f, %d of %d bytes", attempt, factor, size, limit
        )
        if size <= limit and (best is None or size > best[0]):
            best = (size, small)
        if (1 - TOLERANCE) * limit <= size <= limit:
            break
        if pace.bytes:
            done = (pace, size - sum(pace.bytes.values()))
            factor = pace.mean_factor()
        search.tell(factor, size)
    if best is None:
        _check_size(size, limit)
    assert best is not None
    return best[1]


def _pilot(
    compressor: Compressor, search: _FactorSearch, limit: int
) -> tuple[Pace, int] | None:
    """Look for the factor on a few samples.

    Returns:
        The last attempt, and the bytes of the file besides its codes; None without
        calibration data, or with few.
    """
    if compressor.calibration is None or compressor.calibration.pilot() is None:
        return None
    done = None
    for attempt in range(PILOTS):
        factor = search.next()
        if search.tried(factor):
            break
        pace = Pace(f"size, attempt {attempt + 1}", factor)
        size = len(packed_bytes(compressor.at(pace, pilot=True)))
        done = (pace, size - sum(pace.bytes.values()))
        search.tell(factor, size)
        if abs(size / limit - 1) < NEAR:
            break
    search.forget()
    return done


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise BudgetExceededError(
            "the packed file cannot meet the plan's budget",
            size_bytes=size,
            got=f"{size} bytes",
            wanted=f"at most {limit} bytes",
            fix="search again with a smaller budget or with entropy-coded steps",
        )


class _FactorSearch:
    """Proposes factors: first by the curve of rounded codes, then by those tried."""

    def __init__(self, compressor: Compressor, limit: int) -> None:
        self._compressor, self._limit = compressor, limit
        self._overhead = compressor.overhead_bytes()
        self._known: dict[float, float] = {}
        self._tried: list[tuple[float, int]] = []
        # What the coder makes of rounded codes, relative to their order-0 entropy.
        self._ratio = compressor.coded_bits(1.0) / max(8 * self._bytes(1.0), 1.0)

    def next(self) -> float:
        """Return the factor to try next, within 1/64 … 64."""
        return min(max(self._propose(), 1 / WIDEST), WIDEST)

    def tried(self, factor: float) -> bool:
        """Whether the file at ``factor`` is known."""
        return any(factor == known for known, _ in self._tried)

    def _propose(self) -> float:
        if not self._tried:
            return self._solve((self._limit - self._overhead) / self._ratio)
        aim = self._limit * (1 - TOLERANCE / 2)
        if len(self._tried) == 1:
            return self._solve((aim - self._overhead) / self._ratio)
        # log size falls about linearly with log factor: through the two files nearest
        # to the limit, one on each side of it if there are such.
        nearest = sorted(self._tried, key=lambda t: abs(math.log(t[1] / self._limit)))
        first = nearest[0]
        over = first[1] > self._limit
        other = next((t for t in nearest if (t[1] > self._limit) != over), nearest[1])
        (low, large), (high, small) = sorted([first, other])
        if large <= small:  # noise: the files are as good as equal
            return max(low, high) * 1.01
        slope = math.log(high / low) / math.log(large / small)
        step = slope * math.log(large / aim)
        width = math.log(high / low)
        bracketed = large > self._limit >= small
        step = min(max(step, 0.05 * width), 0.95 * width) if bracketed else step
        return low * math.exp(
            min(max(step, -2 * math.log(WIDEST)), 2 * math.log(WIDEST))
        )

    def forget(self) -> None:
        """Forget the files tried, but not what they told of the curve."""
        self._tried.clear()

    def slope(self, factor: float) -> float:
        """Return −d log bytes / d log factor of the rounded codes."""
        here, there = self._bytes(factor), self._bytes(1.05 * factor)
        return math.log(max(here, 1.0) / max(there, 1.0)) / math.log(1.05)

    def tell(self, factor: float, size: int) -> None:
        """Learn the size of the file at ``factor``."""
        self._tried.append((factor, size))
        # What compensated, really coded codes take relative to the curve.
        self._ratio = max(size - self._overhead, 1) / max(self._bytes(factor), 1e-9)

    def _bytes(self, factor: float) -> float:
        if factor not in self._known:
            self._known[factor] = self._compressor.rounded_bits(factor) / 8
        return self._known[factor]

    def _solve(self, target: float) -> float:
        """Return the factor at which rounded codes take about ``target`` bytes."""
        low, high = -math.log(WIDEST), math.log(WIDEST)
        if self._bytes(1.0) > target:
            low = 0.0
        else:
            high = 0.0
        for _ in range(14):
            middle = (low + high) / 2
            if self._bytes(math.exp(middle)) > target:
                low = middle
            else:
                high = middle
        return math.exp(high)
