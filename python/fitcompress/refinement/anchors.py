"""Which levels are measured, and how all others follow from them.

With D the table before and D̂ what was measured, at grids g with masks that keep
everything and, on the finest grid f of a family, at sparsities s:

    D'(g, s) = r_g D(g, 0) + q_s (D(g, s) − D(g, 0)),
    r_g = D̂(g, 0) / D(g, 0),   q_s = (D̂(f, s) − D̂(f, 0)) / (D(f, s) − D(f, 0)),

r and q interpolated between what was measured linearly in their logarithm over the
index of the grid or the sparsity, and constant beyond.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fitcompress.refinement.random_plans import families, sensible_grids

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from fitcompress.sensitivity.table import Sensitivity

__all__ = ["Cell", "anchors", "corrected"]

Cell = tuple[int, int]  # indices of a grid and a sparsity
LEAST, MOST = 1e-3, 1e3  # of a ratio; what is beyond is noise about a zero


def anchors(table: Sensitivity, grids: int, sparsities: int) -> list[Cell]:
    """Return the cells to measure, evenly spaced, the coarsest grid included.

    Of steps, those which make sense for a whole network (``random_plans``).

    Args:
        table: Has one or two families of grids.
        grids: How many of each family, without masks.
        sparsities: How many besides 0, on the finest grid of the first family.
    """
    cells = []
    for family in families(table):
        whole = [g for g, one in enumerate(table.grids) if one.family == family]
        few = [int(g) for g in sensible_grids(table, family)]
        cells += [(g, 0) for g in _spread(few if family == "step" else whole, grids)]
    first = _families(table)[0][0]
    masks = range(1, table.distortion.shape[2])
    return cells + [(first, s) for s in _spread(masks, sparsities)]


def corrected(
    table: Sensitivity, measured: Mapping[Cell, NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Return D' of all cells, [L, G, S].

    Args:
        table: Holds D.
        measured: D̂ of cells that `anchors` returned, [L] each.
    """
    plain = table.distortion[:, :, :1]
    ratio = np.ones(plain.shape)
    for family in _families(table):
        known = [g for g in family if (g, 0) in measured]
        found = [_ratio(measured[g, 0], plain[:, g, 0]) for g in known]
        ratio[:, family, 0] = _between(known, found, family)
    masked = table.distortion - plain
    weight = np.ones((len(plain), 1, masked.shape[2]))
    known = [s for _, s in measured if s]
    if known:
        finest = next(g for g, s in measured if s)
        found = [
            _ratio(measured[finest, s] - measured[finest, 0], masked[:, finest, s])
            for s in known
        ]
        places = range(1, masked.shape[2])
        weight[:, 0, 1:] = _between(known, found, places)
    return np.maximum(ratio * plain + weight * masked, 0.0)


def _families(table: Sensitivity) -> list[list[int]]:
    """Return the indices of the grids of each family that the table has."""
    kinds = [grid.family for grid in table.grids]
    found = dict.fromkeys(kinds)
    return [[g for g, kind in enumerate(kinds) if kind == one] for one in found]


def _spread(places: Sequence[int], count: int) -> list[int]:
    if not len(places) or not count:
        return []
    at = np.linspace(0, len(places) - 1, min(count, len(places)))
    return [places[int(i)] for i in at.round()]


def _ratio(
    found: NDArray[np.float64], expected: NDArray[np.float64]
) -> NDArray[np.float64]:
    safe = np.where(expected > 0, expected, 1.0)
    ratio = np.where(expected > 0, found / safe, 1.0)
    return np.asarray(np.clip(ratio, LEAST, MOST))


def _between(
    known: Sequence[int],
    ratios: Sequence[NDArray[np.float64]],
    wanted: Sequence[int],
) -> NDArray[np.float64]:
    """Interpolate ratios [L] at known places to wanted ones, [L, len(wanted)]."""
    logs = np.log(np.stack(ratios, 1))
    return np.asarray(np.exp([np.interp(wanted, known, row) for row in logs]))
