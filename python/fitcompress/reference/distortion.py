"""Twin of `fitcompress.ops.distortion`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fitcompress.ops.distortion import DistortionTable
from fitcompress.reference.quantize import _codes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def distortion_table(
    weight: Tensor,
    fisher: Tensor | None,
    importance: Tensor,
    bits: Sequence[int],
    steps: Sequence[float],
    sparsities: Sequence[float],
) -> DistortionTable:
    """Tabulate distortion and storage of every grid at every sparsity, one by one."""
    theta = weight.float()
    count = theta.numel()
    sensitivity = (torch.ones_like(theta) if fisher is None else fisher).double()
    order = importance.flatten().argsort(stable=True)
    masks = []
    for sparsity in sparsities:
        keep = theta.new_ones(count, dtype=torch.bool)
        keep[order[: math.floor(sparsity * count)]] = False
        masks.append(keep.view_as(theta))

    codes, values = [], []
    row_max = theta.abs().amax(1, keepdim=True) if count else theta[:, :0]
    for b in bits:
        limit = 2 ** (b - 1) - 1
        delta = row_max / limit
        codes.append(_codes(theta, delta, limit))
        values.append(codes[-1] * delta)
    for step in steps:
        delta = torch.tensor(step, dtype=torch.float32, device=theta.device)
        codes.append(_codes(theta, delta, 0))
        values.append(codes[-1] * delta)

    def squared(difference: Tensor, where: Tensor) -> Tensor:
        return (sensitivity * difference.double().square() * where).sum()

    cells = (len(codes), len(masks))
    table = DistortionTable(
        distortion=theta.new_zeros(cells, dtype=torch.float64),
        nnz=theta.new_zeros(cells, dtype=torch.int64),
        entropy_bits=theta.new_zeros(cells, dtype=torch.float64),
        grid_length=theta.new_zeros(cells, dtype=torch.float64),
        prune_length=theta.new_zeros(cells, dtype=torch.float64),
        norm=theta.new_zeros(cells, dtype=torch.float64),
    )
    everywhere = torch.ones_like(theta, dtype=torch.bool)
    for g, value in enumerate(values):
        for s, keep in enumerate(masks):
            kept_codes = codes[g] * keep
            table.distortion[g, s] = 0.5 * squared(theta - value * keep, everywhere)
            table.norm[g, s] = squared(value, keep)
            table.nnz[g, s] = kept_codes.count_nonzero()
            table.entropy_bits[g, s] = _entropy_bits(kept_codes)
            if g + 1 < len(values):
                table.grid_length[g, s] = squared(value - values[g + 1], keep)
            if s + 1 < len(masks):
                table.prune_length[g, s] = squared(value, keep & ~masks[s + 1])
    return table


def _entropy_bits(codes: Tensor) -> float:
    if codes.numel() == 0:
        return 0.0
    _, counts = torch.unique(codes, return_counts=True)
    share = counts.double() / codes.numel()
    return max(0.0, -float((counts * share.log2()).sum()))
