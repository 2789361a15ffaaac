"""Lower convex hulls of the layers and the front of plans that they span.

For a multiplier μ ≥ 0 every layer minimises D + μ·c on its own. The minimisers are the
corners of the layer's lower convex hull; lowering μ from ∞ walks all hulls at once,
from the cheapest plan to the best one, along corners sorted by slope. Between two
neighbouring plans of that walk lies the optimum of the linear relaxation: a proven
lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fitcompress import _core

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Front", "front"]


@dataclass(frozen=True)
class Front:
    """Every plan on the convex front, from the cheapest to the best.

    Attributes:
        start: Index of each layer's cheapest corner, [L].
        layer: Layer that changes in step t, [T].
        index: Its new cell, [T].
        cost: Total cost before any step and after each, [T+1].
        value: Total value likewise, [T+1].
    """

    start: NDArray[np.int64]
    layer: NDArray[np.int64]
    index: NDArray[np.int64]
    cost: NDArray[np.int64]
    value: NDArray[np.float64]

    def choice(self, step: int) -> NDArray[np.int64]:
        """Return the cell of every layer after ``step`` steps, [L]."""
        chosen: NDArray[np.int64] = self.start.copy()
        for layer, index in zip(self.layer[:step], self.index[:step], strict=True):
            chosen[layer] = index
        return chosen

    def bound(self, limit: int) -> float:
        """Return a lower bound of the value of plans that cost at most ``limit``."""
        if limit >= self.cost[-1]:
            return float(self.value[-1])
        t = int(np.searchsorted(self.cost, limit, side="right")) - 1
        width = float(self.cost[t + 1] - self.cost[t])
        share = float(limit - self.cost[t]) / width
        return float(self.value[t] + share * (self.value[t + 1] - self.value[t]))


def front(cost: NDArray[np.int64], value: NDArray[np.float64]) -> Front:
    """Return the convex front of L layers with K cells each.

    Args:
        cost: [L, K], integer.
        value: [L, K], to be small.
    """
    start, layer, index = _core.convex_front(
        np.ascontiguousarray(cost), np.ascontiguousarray(value)
    )
    rows = np.arange(len(cost))
    before = _level_before(start, layer, index)
    rises = cost[layer, index] - cost[layer, before]
    # The values fall by orders of magnitude: sums in float64 would leave the last ones,
    # and the lower bounds they give, with the rounding errors of the first.
    falls = (value[layer, index] - value[layer, before]).astype(np.longdouble)
    first = value[rows, start].sum(dtype=np.longdouble)
    return Front(
        start=start,
        layer=layer,
        index=index,
        cost=np.cumsum([int(cost[rows, start].sum()), *rises]).astype(np.int64),
        value=np.cumsum([first, *falls]).astype(np.float64),
    )


def _level_before(
    start: NDArray[np.int64], layer: NDArray[np.int64], index: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the cell that every step of a front leaves."""
    order = np.argsort(layer, kind="stable")
    before = np.empty_like(index)
    before[order[1:]] = index[order[:-1]]
    first = np.ones(len(layer), dtype=np.bool_)
    first[1:] = layer[order[1:]] != layer[order[:-1]]
    before[order[first]] = start[layer[order[first]]]
    return before
