"""Random plans that tell the layers apart.

Fixed-point grids: every layer draws its bits on its own, and in every other plan a
sparsity. Entropy-coded steps: a plan draws a step for the whole network, and every
layer one within half an octave of it. A layer's draws are spread evenly: over all
plans, each of its levels occurs as often as any other, give or take one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fitcompress.sensitivity.table import Sensitivity

    Cells = tuple[NDArray[np.int64], NDArray[np.int64]]

__all__ = ["draw_inputs", "draw_plans", "families", "sensible_grids"]

MOST_BITS = 6  # more hardly raise the loss, and tell nothing
MOST_SPARSITY = 0.75
LEAST_INPUT_BITS, MOST_INPUT_BITS = 3, 8  # with two, inputs drown all else
LEAST_RATE, MOST_RATE = 0.8, 4.0  # bits per weight of the whole network's step
SPREAD = 0.5  # octaves


def families(table: Sensitivity) -> list[str]:
    """Return the families of grids that a table has, in its order."""
    return list(dict.fromkeys(grid.family for grid in table.grids))


def draw_plans(table: Sensitivity, family: str, count: int, seed: int) -> Cells:
    """Return the grid and the sparsity of every layer, indices [count, L] each."""
    random = np.random.default_rng([seed, family == "step"])
    layers = len(table.names)
    grids = sensible_grids(table, family)
    masks = np.zeros((count, layers), dtype=np.int64)
    if family == "step":
        return _steps(table, grids, count, random), masks
    shares = (table.sparsity * table.sizes[:, None]).sum(0) / max(table.sizes.sum(), 1)
    allowed = np.flatnonzero(shares <= MOST_SPARSITY)
    if len(allowed) > 1:
        masks[1::2] = allowed[_even(len(allowed), count // 2, layers, random)]
    return grids[_even(len(grids), count, layers, random)], masks


def draw_inputs(
    table: Sensitivity, family: str, count: int, seed: int
) -> NDArray[np.int64] | None:
    """Return the activation bits of every layer, indices [count, L].

    None where the table has none, or grids are entropy-coded steps: no runtime executes
    those with quantized inputs.
    """
    bits = np.array([width or 0 for width in table.activation_bits])
    if family == "step" or not bits.any():
        return None
    tell = np.flatnonzero((bits >= LEAST_INPUT_BITS) & (bits <= MOST_INPUT_BITS))
    levels = tell if len(tell) else np.flatnonzero(bits)
    random = np.random.default_rng([seed, 2])
    return np.asarray(levels[_even(len(levels), count, len(table.names), random)])


def sensible_grids(table: Sensitivity, family: str) -> NDArray[np.int64]:
    """Return the grids of a family that tell anything, indices, from fine to coarse.

    At most 6 bits; steps at which the whole network takes .8 to 4 bits per weight. All
    grids of the family if none is such.
    """
    grids = [g for g, one in enumerate(table.grids) if one.family == family]
    rate = table.size_bits[:, :, 0].sum(0) / max(table.sizes.sum(), 1)
    if family == "step":
        few = [g for g in grids if LEAST_RATE <= rate[g] <= MOST_RATE]
    else:
        few = [g for g in grids if (table.grids[g].bits or 0) <= MOST_BITS]
    return np.array(few or grids, dtype=np.int64)


def _even(
    levels: int, count: int, layers: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Return numbers below ``levels``, [count, layers], evenly in every column."""
    columns = [random.permutation(np.arange(count) % levels) for _ in range(layers)]
    # The first levels come once more than the last: not in all layers the same.
    shifts = random.integers(0, levels, layers)
    return (np.stack(columns, 1) + shifts) % levels


def _steps(
    table: Sensitivity,
    grids: NDArray[np.int64],
    count: int,
    random: np.random.Generator,
) -> NDArray[np.int64]:
    """Return the grid of every plan and layer, [count, L]."""
    low, high = np.log2([table.grids[g].step or 1.0 for g in grids[[0, -1]]])
    grids = np.array([g for g, one in enumerate(table.grids) if one.step is not None])
    logs = np.log2([table.grids[g].step or 1.0 for g in grids])
    middle = low + (high - low) * (random.permutation(count) + 0.5) / count
    parts = (
        np.stack([random.permutation(count) + 0.5 for _ in table.names], 1) / count
    )  # Latin hypercube
    wanted = middle[:, None] + SPREAD * (2 * parts - 1)
    nearest = np.abs(wanted[:, :, None] - logs).argmin(-1)
    return np.asarray(grids[nearest])
