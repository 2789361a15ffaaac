"""Twin of `fitcompress.ops.distortion`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fitcompress.ops.distortion import DistortionTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fitcompress.ops.distortion import Granularity


def distortion_table(
    weight: Tensor,
    fisher: Tensor | float | None = None,
    bits: Sequence[int] = (),
    steps: Sequence[float] = (),
    sparsities: Sequence[float] = (0.0,),
    *,
    importance: Tensor | None = None,
    smoothing: float = math.inf,
    granularity: Granularity = "channel",
    clips: Sequence[float] = (1.0,),
    dead_zone: float = 0.5,
) -> DistortionTable:
    """Tabulate distortion and storage of every grid at every sparsity, one by one."""
    theta = weight.float()
    count = theta.numel()
    offset = torch.tensor(math.inf)
    rule = theta.abs()
    if isinstance(fisher, torch.Tensor):
        f = choice = fisher.double()
        if count and smoothing < math.inf:
            offset = (smoothing * f.mean()).float()
            if offset < math.inf:
                rule = (fisher + offset) * (theta * theta)
    else:
        share = 1.0 if fisher is None else fisher / max(count, 1)
        f = torch.full_like(theta, share, dtype=torch.float64)
        choice = torch.ones_like(f)
    importance = rule if importance is None else importance
    order = importance.flatten().argsort(stable=True)
    masks, threshold, position = [], theta.new_zeros(len(sparsities)), []
    for s, sparsity in enumerate(sparsities):
        dropped = math.floor(sparsity * count)
        keep = theta.new_ones(count, dtype=torch.bool)
        keep[order[:dropped]] = False
        masks.append(keep.view_as(theta))
        position.append(int(order[dropped]) if count else 0)
        if count:
            threshold[s] = importance.flatten()[order[dropped]] + 0.0

    unit = _units(theta, granularity)
    units = int(unit.max()) + 1 if count else _empty_units(theta, granularity)
    reach = theta.new_zeros(units)
    reach.scatter_reduce_(0, unit.flatten(), theta.abs().flatten(), "amax")
    scaled = torch.where(reach[unit] > 0, theta / reach[unit], 0.0)
    clip = theta.new_ones(len(bits), units)
    codes, values = [], []
    for i, b in enumerate(bits):
        q = 2 ** (b - 1) - 1
        least = torch.full_like(reach, math.inf, dtype=torch.float64)
        for c in torch.tensor(clips, dtype=torch.float32).to(theta):
            gain = (q / c.double()).float()
            value = (scaled * gain).round().clamp(-q, q).double() * (c.double() / q)
            error = choice * (theta - value * reach[unit]).square()
            total = torch.zeros_like(least)
            total.index_add_(0, unit.flatten(), error.flatten())
            clip[i] = torch.where(total < least, c, clip[i])
            least = torch.minimum(least, total)
        gain = (q / clip[i].double()).float()
        codes.append((scaled * gain[unit]).round().clamp(-q, q) + 0.0)
        values.append(codes[-1] * (clip[i].double() * reach.double() / q)[unit])
    for step in steps:
        delta = torch.tensor(step, dtype=torch.float32, device=theta.device)
        zone = torch.tensor(dead_zone, dtype=torch.float32, device=theta.device) * delta
        code = torch.where(theta.abs() < zone, 0.0, (theta / delta).round()) + 0.0
        codes.append(code)
        values.append(code.double() * delta)

    def squared(difference: Tensor, where: Tensor) -> Tensor:
        return (f * difference.double().square() * where).sum()

    cells = (len(codes), len(masks))
    real = [theta.new_zeros(cells, dtype=torch.float64) for _ in range(5)]
    table = DistortionTable(
        distortion=real[0],
        nnz=theta.new_zeros(cells, dtype=torch.int64),
        entropy_bits=real[1],
        grid_length=real[2],
        prune_length=real[3],
        norm=real[4],
        threshold=threshold,
        position=torch.tensor(position, dtype=torch.int64, device=theta.device),
        offset=offset.to(theta.device),
        clip=clip,
        range=reach,
    )
    everywhere = torch.ones_like(theta, dtype=torch.bool)
    for g, value in enumerate(values):
        for s, keep in enumerate(masks):
            kept_codes = codes[g] * keep
            table.distortion[g, s] = 0.5 * squared(theta - value * keep, everywhere)
            table.norm[g, s] = squared(value, keep)
            table.nnz[g, s] = kept_codes.count_nonzero()
            table.entropy_bits[g, s] = _entropy_bits(kept_codes)
            if g + 1 < len(values) and g + 1 != len(bits):
                table.grid_length[g, s] = squared(value - values[g + 1], keep)
            if s + 1 < len(masks):
                table.prune_length[g, s] = squared(value, keep & ~masks[s + 1])
    return table


def magnitude_histogram(weight: Tensor) -> Tensor:
    """Count weights by the leading 16 bits of |w| as float32."""
    keys = weight.flatten().float().abs().view(torch.int32) >> 16
    return torch.bincount(keys, minlength=2**15)


def _units(theta: Tensor, granularity: Granularity) -> Tensor:
    """Return the scale unit of every weight."""
    rows, columns = theta.shape
    width = granularity if isinstance(granularity, int) else columns
    per_row = -(-columns // max(width, 1))
    column = torch.arange(columns, device=theta.device) // max(width, 1)
    row = torch.arange(rows, device=theta.device)
    if granularity == "tensor":
        return torch.zeros_like(theta, dtype=torch.int64)
    return row[:, None] * per_row + column


def _empty_units(theta: Tensor, granularity: Granularity) -> int:
    rows, columns = theta.shape
    if isinstance(granularity, int):
        return rows * -(-columns // granularity)
    return rows if granularity == "channel" else 1


def _entropy_bits(codes: Tensor) -> float:
    if codes.numel() == 0:
        return 0.0
    _, counts = torch.unique(codes, return_counts=True)
    share = counts.double() / codes.numel()
    return max(0.0, -float((counts * share.log2()).sum()))
