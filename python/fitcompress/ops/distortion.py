"""What every level of a layer costs, and the mask of any of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from fitcompress.ops.library import register_fake

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "CLIPS",
    "DistortionTable",
    "Granularity",
    "distortion_table",
    "level_mask",
]

Granularity = Literal["channel", "tensor"] | int

CLIPS = tuple(2 ** (-i / 10) for i in range(32))
"""Shares of max|w| to try as the range of a fixed-point grid: 1 down to 0.117."""


class DistortionTable(NamedTuple):
    """What each of G grids costs at each of S sparsities; tables are [G, S].

    θ̂ is the weight after prune-then-quantize, F the Fisher diagonal.
    """

    distortion: Tensor
    """D = ½ Σ F (θ − θ̂)², float64; in nats if F is in nats²."""
    nnz: Tensor
    """Number of non-zero codes, int64."""
    entropy_bits: Tensor
    """Number of weights × order-0 entropy of the codes, float64, in bits."""
    grid_length: Tensor
    """Σ F (θ̂_g − θ̂_{g+1})² at the same mask; 0 for the last grid of each family."""
    prune_length: Tensor
    """Σ F θ̂² over weights that leave at the next sparsity; 0 for the last one."""
    norm: Tensor
    """Σ F θ̂², float64."""
    threshold: Tensor
    """Importance of the first weight that stays at each sparsity, float32 [S]."""
    position: Tensor
    """Its flat index, int64 [S]: of equally important ones, those before it leave."""
    offset: Tensor
    """κ · mean F, which the importance adds to F, float32, one number; infinity if the
    importance is the magnitude, and without weights."""
    clip: Tensor
    """Range of each fixed-point grid over max|w| of each of U scale units, float32
    [B, U]."""
    range: Tensor
    """max|w| of each scale unit, float32 [U]; Δ = clip · range / (2^(b−1) − 1)."""


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
    """Tabulate what every weight grid costs at every sparsity.

    The mask at sparsity s drops the ⌊s·n⌋ weights of lowest importance (ties: the lower
    flat index first). The importance of weight j is |θ_j| by default, or, with a
    Fisher diagonal and a finite κ = `smoothing`, (F_j + κ·mean F)·θ_j².

    Grids, in this order:

    - b bits, q = 2^(b−1) − 1: over all weights of a scale unit R = max|w|, then
      Δ = c·R/q and codes clip(round(w/R · q/c), ±q), where c is the entry of `clips`
      with the least Σ F (θ − θ̂)² in that unit (of equals, up to rounding, the first;
      a trace, whatever it is, counts as 1 here);
    - step Δ: codes round(w/Δ) without bounds, 0 where |w| < `dead_zone`·Δ.

    Rounding is half to even; w/R, q/c, their product, w/Δ and importances are float32,
    θ̂ exact, sums float64. With up to hundreds of sparsities, takes a few reads of the
    weight and, beyond a million weights, less than a tenth of its memory besides.

    Args:
        weight: [R, N], float32, bfloat16 or float16; rows are output channels.
        fisher: Diagonal F ≥ 0 in nats², float32 [R, N]; or the trace T ≥ 0, for
            F = T/(R·N) everywhere; None for 1 everywhere.
        bits: Bits of the fixed-point grids, 2 to 16.
        steps: Steps Δ > 0 of the entropy-coded grids.
        sparsities: Shares of weights to drop, ascending, in [0, 1).
        importance: Used instead of the rule, float32 [R, N], ≥ 0.
        smoothing: κ ≥ 0; infinity, and always without a diagonal: magnitude.
        granularity: What shares a scale: the row (`"channel"`), the `"tensor"`, or so
            many consecutive columns of a row, the last group perhaps shorter.
        clips: Candidates for c in [1e-30, 1]; `CLIPS` has 32 of them.
        dead_zone: Half the width of the zero bin of entropy-coded grids in steps, at
            least ½.

    Returns:
        Tables of shape [len(bits) + len(steps), len(sparsities)]; thresholds for
        `level_mask`; scales.

    Raises:
        ValueError: If shapes, types, devices or values do not fit, a weight is not
            finite, a step gives codes beyond 2²⁰, or an importance by the rule may be
            beyond float32.

    Source: section "Distortion" of FITCompress (Zandonati et al., 2023,
    arXiv 2302.07612), computed for all levels at once.
    """
    if granularity in ("channel", "tensor"):
        group = 0 if granularity == "channel" else -1
    elif (
        isinstance(granularity, int)
        and not isinstance(granularity, bool)
        and granularity > 0
    ):
        group = granularity
    else:
        message = (
            "distortion_table: granularity must be 'channel', 'tensor' or a number of "
            f"columns, got {granularity!r}"
        )
        raise ValueError(message)
    factor = 1.0
    diagonal = None
    if isinstance(fisher, torch.Tensor):
        diagonal = fisher.detach()
    elif fisher is not None:
        if not 0 <= fisher < math.inf:
            message = f"distortion_table: fisher must be finite and ≥ 0, got {fisher}"
            raise ValueError(message)
        factor = fisher / max(weight.numel(), 1)
    tables = DistortionTable(
        *torch.ops.fitcompress.distortion_table(
            weight.detach(),
            diagonal,
            None if importance is None else importance.detach(),
            list(bits),
            list(steps),
            list(sparsities),
            list(clips),
            smoothing,
            group,
            dead_zone,
        )
    )
    if factor == 1.0:
        return tables
    return tables._replace(
        distortion=factor * tables.distortion,
        grid_length=factor * tables.grid_length,
        prune_length=factor * tables.prune_length,
        norm=factor * tables.norm,
    )


def level_mask(
    table: DistortionTable,
    sparsity: int,
    weight: Tensor,
    fisher: Tensor | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """Return the mask that a table was made with, at one of its sparsities.

    Args:
        table: Of this weight.
        sparsity: Index of the sparsity.
        weight: As for `distortion_table`, as are the other tensors.
        fisher: The diagonal, if the importance came from it.
        importance: The importance, if it was given.

    Returns:
        bool, in the shape of the weight; True stays.
    """
    if importance is None:
        importance = weight.detach().float()
        offset = float(table.offset)
        if fisher is None or math.isinf(offset):
            importance = importance.abs()
        else:
            importance = (fisher.detach() + offset) * (importance * importance)
    importance = importance.detach().contiguous()
    threshold, first = table.threshold[sparsity], int(table.position[sparsity])
    mask = importance > threshold
    flat = mask.view(-1)[first:]
    flat |= importance.view(-1)[first:] == threshold
    return mask


def _fake_distortion_table(
    weight: Tensor,
    fisher: Tensor | None,
    importance: Tensor | None,
    bits: Sequence[int],
    steps: Sequence[float],
    sparsities: Sequence[float],
    clips: Sequence[float],
    smoothing: float,
    group: int,
    dead_zone: float,
) -> tuple[Tensor, ...]:
    cells = (len(bits) + len(steps), len(sparsities))
    rows, columns = weight.shape
    units = 1 if group < 0 else rows
    if group > 0:
        units = rows * -(-columns // group)
    real, count, single = torch.float64, torch.int64, torch.float32
    shapes = [*[cells] * 6, cells[1:], cells[1:], (), (len(bits), units), (units,)]
    dtypes = [real, count, real, real, real, real, single, count, *[single] * 3]
    return tuple(
        weight.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


register_fake("distortion_table", _fake_distortion_table)
