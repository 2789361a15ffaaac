"""Scale the steps of a plan until the packed file uses its budget.

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

__all__ = ["entropy_bits", "fit"]

logger = logging.getLogger(__name__)

ATTEMPTS = 6
TOLERANCE = 0.004  # share of the budget that may stay unused
WIDEST = 64.0  # largest factor on the steps, either way


def entropy_bits(codes: torch.Tensor) -> float:
    """Return n times the order-0 entropy of integer codes, in bits."""
    _, found = torch.unique(codes, return_counts=True)
    counts = found.double()
    return float((counts * (counts.sum() / counts).log2()).sum())


def fit(compressor: Compressor, plan: Plan) -> nn.Module:
    """Return the compressed model at the factor that uses ``plan.limit_bytes``.

    Raises:
        BudgetExceededError: No factor meets the budget, or no step can be scaled.
    """
    limit = plan.limit_bytes
    if limit is None:
        return compressor.at(1.0)
    scalable = any(level.grid.step is not None for level in plan.levels.values())
    search = _FactorSearch(compressor, limit)
    best: tuple[int, nn.Module] | None = None
    size = 0
    for attempt in range(ATTEMPTS):
        factor = search.next() if scalable else 1.0
        if search.tried(factor):
            break  # the widest there is, or nothing left between two neighbours
        small = compressor.at(factor)
        size = len(packed_bytes(small))
        logger.info(
            "attempt %d: factor %.5f, %d of %d bytes", attempt, factor, size, limit
        )
        if size <= limit and (best is None or size > best[0]):
            best = (size, small)
        if (1 - TOLERANCE) * limit <= size <= limit or not scalable:
            break
        search.tell(factor, size)
    if best is None:
        raise BudgetExceededError(
            "the packed file cannot meet the plan's budget",
            size_bytes=size,
            got=f"{size} bytes",
            wanted=f"at most {limit} bytes",
            fix="search again with a smaller budget or with entropy-coded steps",
        )
    return best[1]


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
