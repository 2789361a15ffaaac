"""Twin of the hulls in ``_core``, for tests: one layer, plain Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
