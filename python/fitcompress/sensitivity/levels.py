"""The levels that a table covers: grids and sparsities."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

import torch

from fitcompress import ops
from fitcompress.errors import OptionError
from fitcompress.sensitivity.mask_rules import importance_of
from fitcompress.sensitivity.table import Grid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fitcompress.model import Layer
    from fitcompress.sensitivity.mask_rules import MaskRule

__all__ = [
    "BITS",
    "SPARSITIES",
    "Allocation",
    "allocated",
    "check_allocation",
    "check_levels",
    "default_grids",
    "grids_from",
    "histogram_sparsities",
    "layer_sparsities",
    "step_ladder",
    "steps_from",
    "sum_of_squares",
]

BITS = (8, 7, 6, 5, 4, 3, 2)
SPARSITIES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
STEPS, OCTAVES, COARSEST = 49, 6.0, 4.0
CHUNK = 2**16

Allocation = Literal["magnitude", "importance", "uniform"]
"""How layers share a sparsity of the network."""


def sum_of_squares(weight: torch.Tensor) -> float:
    """Return Σ w² in float64, with little memory besides the weight."""
    flat = weight.detach().reshape(-1)
    parts = torch.split(flat, CHUNK)
    return sum((float(part.double().square().sum()) for part in parts), 0.0)


def step_ladder(layers: Sequence[Layer]) -> tuple[float, ...]:
    """Return `steps_from` the root mean square of all weights of the layers."""
    squares = sum(sum_of_squares(layer.matrix()) for layer in layers)
    return steps_from(squares, sum(layer.size for layer in layers))


def steps_from(squares: float, count: int) -> tuple[float, ...]:
    """Return 49 steps from fine to coarse, a factor 2^(1/8) apart.

    The coarsest is four times the root mean square of all weights: nearly every weight
    rounds to zero. One ladder for all layers, since one step in all of them is close to
    the best for a budget in bytes. All are normal numbers of float32.

    Args:
        squares: Σ w² over all layers.
        count: Their number of weights.
    """
    limits, octaves = torch.finfo(torch.float32), 2**OCTAVES
    coarsest = COARSEST * ((squares / count) ** 0.5 or 1.0)
    coarsest = min(max(coarsest, 2 * octaves * limits.tiny), limits.max)
    return tuple(
        float(torch.tensor(coarsest * 2 ** (-OCTAVES * (1 - i / (STEPS - 1)))))
        for i in range(STEPS)
    )


def default_grids(layers: Sequence[Layer]) -> tuple[Grid, ...]:
    """Return 8 … 2 bits, then the step ladder."""
    return grids_from(step_ladder(layers))


def grids_from(steps: Sequence[float]) -> tuple[Grid, ...]:
    """Return 8 … 2 bits, then the steps."""
    return (*(Grid(bits=b) for b in BITS), *(Grid(step=s) for s in steps))


def check_levels(
    grids: Sequence[Grid],
    sparsities: Sequence[float],
    activation_bits: Sequence[int] = (),
) -> None:
    """Raise unless grids and sparsities are in the order that tables need.

    Raises:
        OptionError: Grids are not bits, fine to coarse, then steps, fine to coarse;
            sparsities do not rise from 0 within [0, 1); or activation bits do not fall
            from at most 16 to at least 2.
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
    whole = all(type(b) is int and 2 <= b <= 16 for b in activation_bits)
    if not whole or any(a <= b for a, b in pairwise(activation_bits)):
        raise OptionError(
            "the activation bits are out of order",
            got=", ".join(str(b) for b in activation_bits),
            wanted="whole numbers that fall from at most 16 to at least 2",
        )


def check_allocation(allocation: str) -> None:
    """Raise unless there is such an allocation.

    Raises:
        OptionError: There is none.
    """
    if allocation not in get_args(Allocation):
        raise OptionError(
            "allocation", got=repr(allocation), wanted=" or ".join(get_args(Allocation))
        )


def allocated(
    layers: Sequence[Layer],
    sparsities: Sequence[float],
    masks: MaskRule,
    allocation: Allocation,
) -> list[list[float]]:
    """Return the share of each layer that masks drop.

    Args:
        layers: L layers.
        sparsities: S shares of all weights of the network, rising, from 0.
        masks: The order within a layer.
        allocation: ``"magnitude"``: what lies below one threshold of |θ|, see
            `layer_sparsities`. ``"importance"``: below one threshold of the rule's
            importance; where it falls into a bin of `histogram_sparsities`, all layers
            lose an equal part of that bin. ``"uniform"``: every layer loses the same
            share.

    Returns:
        [L][S] shares, rising in S.
    """
    if allocation == "uniform":
        return [list(sparsities) for _ in layers]
    if allocation == "magnitude":
        return layer_sparsities(layers, sparsities)
    found = (importance_of(masks, layer) for layer in layers)
    counts = [ops.magnitude_histogram(each).cpu().to_sparse() for each in found]
    return histogram_sparsities(counts, sparsities, split=True)


def layer_sparsities(
    layers: Sequence[Layer], sparsities: Sequence[float]
) -> list[list[float]]:
    """Return the share of each layer that one magnitude threshold drops.

    See `histogram_sparsities`.

    Args:
        layers: L layers.
        sparsities: S shares of all weights of the network, rising, from 0.

    Returns:
        [L][S] shares, rising in S.
    """
    counts = (ops.magnitude_histogram(layer.matrix()) for layer in layers)
    return histogram_sparsities([each.cpu().to_sparse() for each in counts], sparsities)


def histogram_sparsities(
    histograms: Sequence[torch.Tensor],
    sparsities: Sequence[float],
    *,
    split: bool = False,
) -> list[list[float]]:
    """Return the share of each layer below a threshold that all layers have in common.

    The threshold of a share s is the highest edge of a bin below which at most s of all
    weights lie. A bin is 1/128 of an octave wide, so what is really dropped falls short
    of s by less than the share of all weights in the bin above the edge.

    Args:
        histograms: `magnitude_histogram` of each of L layers, sparse.
        sparsities: S shares of all weights of the network, rising, from 0.
        split: Drop of the bin above the edge as much as is missing, the same part in
            every layer, rounded down. Matters where many values are equal.

    Returns:
        [L][S] shares, rising in S; below 1, one weight of a layer always stays.
    """
    total = torch.zeros(ops.MAGNITUDE_BINS, dtype=torch.int64)
    for histogram in histograms:
        total += histogram.to_dense()
    below = _below(total)
    weights = int(below[-1])
    counts = torch.tensor([min(int(s * weights), weights - 1) for s in sparsities])
    edges = torch.searchsorted(below, counts, right=True) - 1
    missing, available = counts - below[edges], total[edges]
    rows = []
    for histogram in histograms:
        bins = histogram.to_dense()
        own = _below(bins)
        size = int(own[-1])
        under = own[edges]
        if split:
            under += missing * bins[edges] // available
        dropped = [min(int(n), size - 1) for n in under]
        # Half a weight more, so that ⌊share · n⌋ is exact in floating point.
        rows.append([(n + 0.5) / size if n else 0.0 for n in dropped])
    return rows


def _below(histogram: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(histogram.cumsum(0), (1, 0))
