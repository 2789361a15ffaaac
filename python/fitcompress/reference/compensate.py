"""Twins of `fitcompress.ops.compensate`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


def error_feedback_sweep(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    max_code: int = 0,
    beam: int = 1,
    bits: Tensor | None = None,
    rate: float = 0.0,
) -> Tensor:
    """Quantize column by column and spread each error over the later columns."""
    rows, columns = weight.shape
    delta = scale.reshape(-1, 1, 1).expand(rows, 1, 1)
    limit = math.inf if max_code <= 0 else max_code
    if bits is not None:
        limit = min(limit, len(bits) // 2)
    # [rows, paths, …], paths in order of cost; those that a row lacks cost infinity
    work = weight[:, None].clone()
    cost = weight.new_zeros(rows, 1)
    codes = weight.new_zeros((rows, 1, columns), dtype=torch.int32)
    for j in range(columns):
        value = work[:, :, j, None]
        position = value / delta
        nearest = position.round().clamp(-limit, limit)
        proposals = [nearest]
        if beam > 1 or rate > 0:
            proposals.append(nearest + torch.where(position > nearest, 1.0, -1.0))
        if rate > 0:
            proposals += [nearest - nearest.sign(), torch.zeros_like(nearest)]
        code = torch.cat(proposals, 2)
        free = delta > 0
        if mask is not None:
            free = free & mask[:, j, None, None].bool()
        code = torch.where(free, code, 0.0)
        left_out = code.abs() > limit
        for second in range(len(proposals)):
            for first in range(second):
                left_out[..., second] |= code[..., first] == code[..., second]

        error = (value - code * delta) / factor[j, j]
        added = error * error
        if bits is not None and rate > 0:
            table = bits[code.clamp(-limit, limit).long() + len(bits) // 2]
            added = added + rate * delta * delta * table
        total = torch.where(left_out, math.inf, cost[..., None] + added).flatten(1)
        cost, order = (part[:, :beam] for part in total.sort(dim=1, stable=True))

        error = error.flatten(1).gather(1, order)[..., None]
        parent = (order // len(proposals))[..., None].expand(-1, -1, columns)
        codes = codes.gather(1, parent)
        codes[:, :, j] = code.flatten(1).gather(1, order).int()
        work = work.gather(1, parent)
        work[:, :, j + 1 :] -= error * factor[j, j + 1 :]
    return codes[:, 0]


def input_moments_(
    second: Tensor,
    cross: Tensor | None,
    input: Tensor,
    output: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    start: Sequence[int],
    step: Sequence[int],
) -> None:
    """Add products of unfolded inputs, at most 64 MiB of them at a time."""
    groups, width = second.shape[:2]
    channels = input.shape[1] // groups
    windows = input.view(input.shape[0], groups, channels, *input.shape[2:])
    for dim, (size, by, apart) in enumerate(zip(kernel, stride, dilation, strict=True)):
        windows = windows.unfold(3 + dim, apart * (size - 1) + 1, by)[..., ::apart]
    places = [slice(a, None, b) for a, b in zip(start, step, strict=True)]
    taken = (slice(None), *places)
    # [N, D', H', W', G, C, kd, kh, kw] and [N, D', H', W', G, O]
    windows = windows.permute(0, 3, 4, 5, 1, 2, 6, 7, 8)[taken]
    if output is not None:
        outputs = output.shape[1] // groups
        output = output.view(output.shape[0], groups, outputs, *output.shape[2:])
        output = output.permute(0, 3, 4, 5, 1, 2)[taken]
    for tile in _tiles(windows.shape[:4], 2**24 // (groups * width)):
        part = windows[tile]
        rows = input.new_ones((*part.shape[:5], width))
        rows[..., :-1].view(part.shape).copy_(part)
        rows = rows.flatten(0, 3).transpose(0, 1)
        upper = (rows.mT @ rows).triu_()
        second += upper + upper.triu(1).mT
        if cross is not None and output is not None:
            cross += output[tile].flatten(0, 3).permute(1, 2, 0) @ rows


def _tiles(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Cut an index space into boxes of at most `limit` elements, but at least one."""
    if math.prod(shape) == 0:
        return
    inner = math.prod(shape[1:])
    here = max(1, limit // inner)
    for first in range(0, shape[0], here):
        mine = slice(first, first + here)
        if inner <= limit or len(shape) == 1:
            yield (mine, *[slice(None)] * (len(shape) - 1))
        else:
            for rest in _tiles(shape[1:], limit):
                yield (mine, *rest)
