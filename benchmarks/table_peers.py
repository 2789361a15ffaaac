"""Distortion tables in plain torch: one cell at a time, sorted, by classes, compiled.

All of them take a weight [R, N], bits and sparsities and return D = ½ Σ F (θ − θ̂)² and
the non-zero codes, [G, S], for one scale a row and masks by magnitude. None computes
entropies, step lengths or thresholds, as ours does besides.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["PEERS", "compiled"]

Table = tuple[torch.Tensor, torch.Tensor]
BLOCK = 1 << 16  # weights whose temporaries stay in the cache


def naive(
    weight: torch.Tensor,
    fisher: torch.Tensor | None,
    bits: Sequence[int],
    sparsities: Sequence[float],
) -> Table:
    """One sort, then every cell on its own."""
    f = torch.ones(()) if fisher is None else fisher
    order = weight.abs().flatten().argsort(stable=True)
    largest = weight.abs().amax(1, keepdim=True)
    cells = (len(bits), len(sparsities))
    distortion = torch.zeros(cells, dtype=torch.float64)
    nonzero = torch.zeros(cells, dtype=torch.int64)
    for s, sparsity in enumerate(sparsities):
        keep = torch.ones(weight.numel(), dtype=torch.bool)
        keep[order[: math.floor(sparsity * weight.numel())]] = False
        keep = keep.view_as(weight)
        for g, b in enumerate(bits):
            q = 2 ** (b - 1) - 1
            codes = (weight / largest * q).round_() * keep
            error = (weight - codes * (largest / q)).square_()
            distortion[g, s] = 0.5 * (f * error).sum(dtype=torch.float64)
            nonzero[g, s] = codes.count_nonzero()
    return distortion, nonzero


def _cells(
    pruned: torch.Tensor, error: list[torch.Tensor], codes: list[torch.Tensor]
) -> Table:
    """Return the cells from sums over classes, [S + 1] each."""

    def kept(sums: torch.Tensor) -> torch.Tensor:
        return sums.flip(0).cumsum(0).flip(0)[1:]

    lost = pruned.cumsum(0)[:-1]
    distortion = torch.stack([0.5 * (lost + kept(e)) for e in error])
    return distortion, torch.stack([kept(c) for c in codes]).round().long()


def by_sorting(
    weight: torch.Tensor,
    fisher: torch.Tensor | None,
    bits: Sequence[int],
    sparsities: Sequence[float],
) -> Table:
    """Sort everything by magnitude once; one pass and one running sum a grid."""
    count = weight.numel()
    cuts = [math.floor(s * count) for s in sparsities]
    order = weight.abs().flatten().argsort(stable=True)
    w = weight.flatten()[order]
    f = None if fisher is None else fisher.flatten()[order]
    largest = weight.abs().amax(1)[order // weight.shape[1]]
    sizes = torch.tensor([0, *cuts, count]).diff().tolist()

    def sums(values: torch.Tensor) -> torch.Tensor:
        parts = (values if f is None else values * f).split(sizes)
        return torch.stack([part.sum(dtype=torch.float64) for part in parts])

    unit = w / largest
    errors, codes = [], []
    for b in bits:
        q = 2 ** (b - 1) - 1
        code = (unit * q).round_()
        parts = (code != 0).split(sizes)
        codes.append(torch.stack([part.sum() for part in parts]).double())
        errors.append(sums((w - code * (largest / q)).square_()))
    return _cells(sums(w.square()), errors, codes)


def _block_sums(
    w: torch.Tensor,
    largest: torch.Tensor,
    f: torch.Tensor | None,
    thresholds: torch.Tensor,
    limits: tuple[int, ...],
) -> torch.Tensor:
    """Return Σ F θ², then Σ F (θ − θ̂)² and codes of each grid, by class [·, S + 1]."""
    classes = torch.bucketize(w.abs(), thresholds, right=True).flatten()
    square = w.square() if f is None else f * w.square()
    rows = [square.flatten()]
    unit = w / largest
    for q in limits:
        code = (unit * q).round()
        error = (w - code * (largest / q)).square()
        rows.append((error if f is None else f * error).flatten())
        rows.append((code != 0).to(w.dtype).flatten())
    stacked = torch.stack(rows)
    sums = stacked.new_zeros(len(rows), len(thresholds) + 1)
    return sums.index_add_(1, classes, stacked)


def _by_classes(
    block_sums: Callable[..., torch.Tensor],
) -> Callable[..., Table]:
    def by_classes(
        weight: torch.Tensor,
        fisher: torch.Tensor | None,
        bits: Sequence[int],
        sparsities: Sequence[float],
    ) -> Table:
        """Sort magnitudes, then add up by class in blocks that stay in the cache."""
        count = weight.numel()
        ordered = weight.abs().flatten().sort().values
        cuts = [math.floor(s * count) for s in sparsities]
        thresholds = ordered[torch.tensor(cuts)]
        largest = weight.abs().amax(1, keepdim=True)
        limits = tuple(2 ** (b - 1) - 1 for b in bits)
        rows = max(1, BLOCK // weight.shape[1])
        total = torch.zeros(1 + 2 * len(bits), len(cuts) + 1, dtype=torch.float64)
        for first in range(0, len(weight), rows):
            part = slice(first, first + rows)
            f = None if fisher is None else fisher[part]
            total += block_sums(weight[part], largest[part], f, thresholds, limits)
        return _cells(total[0], list(total[1::2]), list(total[2::2]))

    return by_classes


def compiled() -> Callable[..., Table]:
    """Return the version by classes with its block compiled for every shape."""
    torch._dynamo.config.recompile_limit = 64
    return _by_classes(torch.compile(_block_sums, dynamic=False))


PEERS: dict[str, Callable[..., Table]] = {
    "naive": naive,
    "sorted": by_sorting,
    "classes": _by_classes(_block_sums),
}
