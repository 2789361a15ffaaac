"""Scale the steps of a plan until the packed file uses its budget.

The size of the file falls smoothly with the steps. Rounded codes tell the shape of that
curve at next to no cost; each compensated attempt, which is expensive, corrects its level.
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
    counts = codes.flatten().unique(return_counts=True)[1].double()
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
        small = compressor.at(factor)
        size = len(packed_bytes(small))
        logger.info("attempt %d: factor %.5f, %d of %d bytes", attempt, factor, size, limit)
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
    """Proposes factors: first by the curve of rounded codes, then between brackets."""

    def __init__(self, compressor: Compressor, limit: int) -> None:
        self._compressor, self._limit = compressor, limit
        self._overhead = compressor.overhead_bytes()
        self._known: dict[float, float] = {}
        self._over: tuple[float, int] | None = None  # smallest file above the limit
        self._under: tuple[float, int] | None = None  # largest file within it
        # What the coder makes of rounded codes, relative to their order-0 entropy.
        self._ratio = compressor.coded_bits(1.0) / max(8 * self._bytes(1.0), 1.0)

    def next(self) -> float:
        """Return the factor to try next."""
        aim = self._limit * (1 - TOLERANCE / 2)
        if self._over is None or self._under is None:
            aim = aim if self._over or self._under else self._limit
            return self._solve((aim - self._overhead) / self._ratio)
        (low, large), (high, small) = self._over, self._under
        share = (math.log(large) - math.log(aim)) / (math.log(large) - math.log(small))
        share = min(max(share, 0.05), 0.95)
        return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))

    def tell(self, factor: float, size: int) -> None:
        """Learn the size of the file at ``factor``."""
        if size > self._limit:
            if self._over is None or size < self._over[1]:
                self._over = (factor, size)
        elif self._under is None or size > self._under[1]:
            self._under = (factor, size)
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
