"""Which layers should be integer, under a latency that neighbours share.

    minimise Σ_l v_l z_l  subject to  t_0 + Σ_l s_l z_l + Σ_l p_l z_l z_{l+1} ≤ T,

z ∈ {0, 1}^L, times in whole nanoseconds, rounded up. Along the layers, only the last z
matters for what comes: of all beginnings that end alike, those are kept that no other
beats in both time and value. That is exact. If more than ``MOST`` are left, as many of
them, evenly spaced, go on, and nothing is proven.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["IntegerLayers", "choose_integer_layers"]

MOST = 50_000


@dataclass(frozen=True)
class IntegerLayers:
    """The answer.

    Attributes:
        integer: z, [L]; empty if no z meets the bound.
        nanoseconds: Time of z, or else the least time that was found.
        proven: Whether z is the best, or no z meets the bound.
    """

    integer: NDArray[np.bool_]
    nanoseconds: int
    proven: bool


@dataclass(frozen=True)
class _Front:
    """Beginnings that end alike, by rising time and falling value."""

    time: NDArray[np.int64]
    value: NDArray[np.float64]
    before: NDArray[np.int64]  # index into the beginnings one layer shorter
    ended: NDArray[np.int64]  # and the z of their last layer


def choose_integer_layers(
    start: int,
    single: NDArray[np.int64],
    pair: NDArray[np.int64],
    value: NDArray[np.float64],
    limit: int,
) -> IntegerLayers:
    """Solve for z.

    Args:
        start: t_0, nanoseconds.
        single: s, [L].
        pair: p, [L−1].
        value: v of float and integer, [L, 2]; infinite where a choice is forbidden.
        limit: T.
    """
    nothing = np.zeros(1, dtype=np.int64)
    empty = _Front(nothing[:0], np.zeros(0), nothing[:0], nothing[:0])
    fronts = [_Front(nothing + start, np.zeros(1), nothing, nothing), empty]
    steps, proven = [], True
    for i in range(len(single)):
        between = int(pair[i - 1]) if i else 0
        grown = []
        for z in (0, 1):
            time = [
                f.time + z * (single[i] + e * between) for e, f in enumerate(fronts)
            ]
            sums = [f.value + value[i, z] for f in fronts]
            before = [np.arange(len(f.time)) for f in fronts]
            ended = [np.full(len(f.time), e) for e, f in enumerate(fronts)]
            front, whole = _best(*map(np.concatenate, (time, sums, before, ended)))
            grown.append(front)
            proven &= whole
        fronts = grown
        steps.append(fronts)
    ends = [(f, z) for z, f in enumerate(fronts) if len(f.time)]
    if not ends:
        return IntegerLayers(np.zeros(0, np.bool_), 2**62, proven)
    least = min(int(front.time[0]) for front, _ in ends)
    best: tuple[float, int, int, int] | None = None
    for front, z in ends:
        within = int(np.searchsorted(front.time, limit, side="right")) - 1
        if within >= 0:
            found = (float(front.value[within]), int(front.time[within]), z, within)
            best = found if best is None else min(best, found)
    if best is None:
        return IntegerLayers(np.zeros(0, np.bool_), least, proven)
    _, spent, z, index = best
    integer = np.zeros(len(single), dtype=np.bool_)
    for i in reversed(range(len(single))):
        integer[i] = bool(z)
        front = steps[i][z]
        z, index = int(front.ended[index]), int(front.before[index])
    return IntegerLayers(integer, spent, proven)


def _best(
    time: NDArray[np.int64],
    value: NDArray[np.float64],
    before: NDArray[np.int64],
    ended: NDArray[np.int64],
) -> tuple[_Front, bool]:
    """Return the beginnings that no other beats, and whether these are all."""
    order = np.lexsort((ended, value, time))
    order = order[np.isfinite(value[order])]
    lowest = np.minimum.accumulate(value[order])
    better = np.ones(len(order), dtype=np.bool_)
    better[1:] = lowest[1:] < lowest[:-1]
    order = order[better]
    whole = len(order) <= MOST
    if not whole:
        order = order[np.linspace(0, len(order) - 1, MOST).astype(np.int64)]
    return _Front(time[order], value[order], before[order], ended[order]), whole
