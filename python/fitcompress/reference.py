"""Plain-torch twins of the native tensor ops: short, slow, and the oracle of the tests.

Every function has the name, arguments and results of its twin in `fitcompress.ops`,
where formulas, shapes and units are documented. None of them checks its arguments.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fitcompress.ops import DistortionTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


def square_accumulate_(
    moment: Tensor | None,
    norms: Tensor | None,
    output_grad: Tensor,
    input: Tensor,
    kernel: Sequence[int] = (1, 1, 1),
    stride: Sequence[int] = (1, 1, 1),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    images: int = 1,
    scale: float = 1.0,
) -> None:
    """Form the weight gradient of every sample, square and add, all in float64."""
    windows = _windows(input.double(), kernel, stride, dilation, output_grad.shape[2:])
    grads = _by_sample(output_grad.double(), images, groups)
    windows = _by_sample(windows, images, groups)
    per_sample = torch.einsum("bngop,bngip->bgoi", grads, windows)
    squares = scale * per_sample.square().flatten(1, 2)
    if moment is not None:
        moment.copy_(moment.double() + squares.sum(0))
    if norms is not None:
        norms += squares.sum((1, 2))


def ghost_norms_(
    norms: Tensor,
    output_grad: Tensor,
    input: Tensor,
    kernel: Sequence[int] = (1, 1, 1),
    stride: Sequence[int] = (1, 1, 1),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    images: int = 1,
    scale: float = 1.0,
) -> None:
    """Multiply the Gram matrices of both tensors' positions, in float64."""
    windows = _windows(input.double(), kernel, stride, dilation, output_grad.shape[2:])
    windows, grads = (
        _by_sample(t, images, groups).permute(0, 2, 3, 1, 4).flatten(3)
        for t in (windows, output_grad.double())
    )
    products = (grads.mT @ grads) * (windows.mT @ windows)
    norms += scale * products.sum((1, 2, 3))


def winograd_norms_(
    norms: Tensor,
    output_grad: Tensor,
    input: Tensor,
    kernel: Sequence[int] = (1, 3, 3),
    stride: Sequence[int] = (1, 1, 1),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    images: int = 1,
    scale: float = 1.0,
) -> None:
    """The norms of `ghost_norms_`: the forms differ in their cost only."""
    shape = (kernel, stride, dilation, groups, images, scale)
    ghost_norms_(norms, output_grad, input, *shape)


def _windows(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    places: Sequence[int],
) -> Tensor:
    """Unfold [N, C, D, H, W] to [N, C · kernel, D', H', W']."""
    for dim in range(3):
        index = torch.arange(kernel[dim])[:, None] * dilation[dim]
        index = index + torch.arange(places[dim]) * stride[dim]
        # The kernel's dimensions come before the places: [N, C, k…, rest]
        at = 2 + 2 * dim
        input = input.index_select(at, index.flatten().to(input.device))
        sizes = (*input.shape[:at], kernel[dim], places[dim], *input.shape[at + 1 :])
        input = input.reshape(sizes)
    return input.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(1, 4)


def _by_sample(tensor: Tensor, images: int, groups: int) -> Tensor:
    """Return [N, G · F, …] as [B, images, G, F, P]."""
    samples, features = len(tensor) // images, tensor.shape[1] // groups
    places = math.prod(tensor.shape[2:])
    return tensor.reshape(samples, images, groups, features, places)


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


def fake_quantize_prune(
    weight: Tensor, scale: Tensor, mask: Tensor | None = None, max_code: int = 0
) -> Tensor:
    """Round the weight to its grid and drop what the mask does not keep."""
    delta = _per_row(scale, weight)
    codes = _codes(weight.float(), delta, max_code)
    kept = torch.where(_keep(mask, weight), codes * delta, 0.0)
    return kept.to(weight.dtype).contiguous()


def fake_quantize_prune_backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    max_code: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute the straight-through and the LSQ gradient of `fake_quantize_prune`."""
    delta = _per_row(scale, weight)
    position = weight.float() / delta
    codes = _codes(weight.float(), delta, max_code)
    inside = position.round() == codes
    kept = torch.where(_keep(mask, weight) & (delta > 0), grad.float(), 0.0)
    grad_weight = torch.where(inside, kept, 0.0).to(weight.dtype).contiguous()
    terms = torch.where(kept == 0, 0.0, torch.where(inside, codes - position, codes))
    terms = (kept * terms).double()
    if scale.numel() == 1:
        terms = terms.sum()
    elif terms.dim() > 1:
        terms = terms.sum(tuple(range(1, terms.dim())))
    return grad_weight, terms.reshape(scale.shape).float()


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


def _codes(weight: Tensor, delta: Tensor, max_code: int) -> Tensor:
    codes = (weight / delta).round()
    if max_code > 0:
        codes = codes.clamp(-max_code, max_code)
    return torch.where(delta > 0, codes, 0.0) + 0.0  # no −0


def _per_row(scale: Tensor, weight: Tensor) -> Tensor:
    if scale.numel() == 1:
        return scale.reshape([1] * weight.dim())
    return scale.reshape([-1] + [1] * (weight.dim() - 1))


def _keep(mask: Tensor | None, weight: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(weight, dtype=torch.bool)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask[:, None] >> shifts) & 1
    return bits.flatten()[: weight.numel()].bool().reshape(weight.shape)


def _entropy_bits(codes: Tensor) -> float:
    if codes.numel() == 0:
        return 0.0
    _, counts = torch.unique(codes, return_counts=True)
    share = counts.double() / codes.numel()
    return max(0.0, -float((counts * share.log2()).sum()))
