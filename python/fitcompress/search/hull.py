"""Lower convex hulls of the layers and the front of plans that they span.

For a multiplier μ ≥ 0 every layer minimises D + μ·c on its own. The minimisers are the
corners of the layer's lower convex hull; lowering μ from ∞ walks all hulls at once,
from the cheapest plan to the best one, along corners sorted by slope. Between two
neighbouring plans of that walk lies the optimum of the linear relaxation: a proven
lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Front", "front", "lower_hull"]


def lower_hull(
    cost: NDArray[np.int64], value: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return indices of the corners of the lower convex hull, by rising cost.

    From the cheapest point (the best of those) to the best value, slopes strictly
    rising.
    """
    order = np.lexsort((np.arange(len(cost)), value, cost))
    corners: list[int] = []
    for i in order:
        if corners and (cost[i] == cost[corners[-1]] or value[i] >= value[corners[-1]]):
            continue
        while len(corners) >= 2:
            a, b = corners[-2], corners[-1]
            left = (value[b] - value[a]) * float(cost[i] - cost[a])
            right = (value[i] - value[a]) * float(cost[b] - cost[a])
            if left < right:
                break
            corners.pop()
        corners.append(int(i))
    return np.array(corners, dtype=np.int64)


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
    start, moves = [], []
    for layer, (c, v) in enumerate(zip(cost, value, strict=True)):
        corners = lower_hull(c, v)
        start.append(corners[0])
        for a, b in pairwise(corners):
            slope = (v[b] - v[a]) / float(c[b] - c[a])
            moves.append((slope, layer, int(b), int(c[b] - c[a]), v[b] - v[a]))
    moves.sort(key=lambda m: m[:3])
    first = np.array(start, dtype=np.int64)
    rows = np.arange(len(cost))
    costs = np.cumsum([int(cost[rows, first].sum()), *(m[3] for m in moves)])
    # The values fall by orders of magnitude: sums in float64 would leave the last ones,
    # and the lower bounds they give, with the rounding errors of the first.
    falls = np.array([m[4] for m in moves], dtype=np.longdouble)
    values = np.cumsum([value[rows, first].sum(dtype=np.longdouble), *falls])
    return Front(
        start=first,
        layer=np.array([m[1] for m in moves], dtype=np.int64),
        index=np.array([m[2] for m in moves], dtype=np.int64),
        cost=costs.astype(np.int64),
        value=values.astype(np.float64),
    )
