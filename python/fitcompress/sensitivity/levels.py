"""The levels that a table covers: grids and sparsities."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from fitcompress.errors import OptionError
from fitcompress.sensitivity.table import Grid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fitcompress.model import Layer

__all__ = [
    "BITS",
    "SPARSITIES",
    "check_levels",
    "default_grids",
    "layer_sparsities",
    "step_ladder",
]

BITS = (8, 7, 6, 5, 4, 3, 2)
SPARSITIES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
STEPS, OCTAVES, COARSEST = 49, 6.0, 4.0


def step_ladder(layers: Sequence[Layer]) -> tuple[float, ...]:
    """Return 49 steps from fine to coarse, a factor 2^(1/8) apart.

    The coarsest is four times the root mean square of all weights: nearly every weight
    rounds to zero. One ladder for all layers, since one step in all of them is close to
    the best for a budget in bytes.
    """
    squares = sum(float(layer.matrix().double().square().sum()) for layer in layers)
    rms = (squares / sum(layer.size for layer in layers)) ** 0.5
    coarsest = COARSEST * (rms or 1.0)
    return tuple(
        float(torch.tensor(coarsest * 2 ** (-OCTAVES * (1 - i / (STEPS - 1)))))
        for i in range(STEPS)
    )


def default_grids(layers: Sequence[Layer]) -> tuple[Grid, ...]:
    """Return 8 … 2 bits, then the step ladder."""
    steps = tuple(Grid(step=s) for s in step_ladder(layers))
    return (*(Grid(bits=b) for b in BITS), *steps)


def check_levels(grids: Sequence[Grid], sparsities: Sequence[float]) -> None:
    """Raise unless grids and sparsities are in the order that tables need.

    Raises:
        OptionError: Grids are not bits, fine to coarse, then steps, fine to coarse; or
            sparsities do not rise from 0 within [0, 1).
    """
    bits = [g.bits for g in grids if g.bits is not None]
    steps = [g.step for g in grids if g.step is not None]
    ordered = [Grid(bits=b) for b in sorted(bits, reverse=True)]
    ordered += [Grid(step=s) for s in sorted(steps)]
    if not grids or list(grids) != ordered:
        raise OptionError(
            "the grids are out of order",
            got=", ".join(str(g) for g in grids) or "none",
            wanted="bits from many to few, then steps from fine to coarse",
        )
    rising = all(a < b for a, b in pairwise(sparsities))
    if not sparsities or sparsities[0] != 0 or not rising or sparsities[-1] >= 1:
        raise OptionError(
            "the sparsities are out of order",
            got=", ".join(str(s) for s in sparsities) or "none",
            wanted="numbers that rise from 0 and stay below 1",
        )


def layer_sparsities(
    layers: Sequence[Layer], sparsities: Sequence[float]
) -> list[list[float]]:
    """Return the share of each layer that one magnitude threshold drops.

    Args:
        layers: L layers.
        sparsities: S shares of all weights of the network, rising, from 0.

    Returns:
        [L][S] shares, rising in S; below 1, one weight of a layer always stays.
    """
    magnitude = torch.cat([layer.matrix().abs().flatten() for layer in layers])
    ordered = magnitude.sort().values
    rows = []
    for layer in layers:
        own = layer.matrix().abs().flatten().sort().values
        shares = []
        for sparsity in sparsities:
            count = min(int(sparsity * len(ordered)), len(ordered) - 1)
            dropped = int(torch.searchsorted(own, ordered[count])) if count else 0
            dropped = min(dropped, layer.size - 1)
            # Half a weight more, so that ⌊share · n⌋ is exact in floating point.
            shares.append((dropped + 0.5) / layer.size if dropped else 0.0)
        rows.append(shares)
    return rows
