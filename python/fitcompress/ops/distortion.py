"""What every level of a layer costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from fitcompress.ops.library import register_fake

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["DistortionTable", "distortion_table"]


class DistortionTable(NamedTuple):
    """What each of G grids costs at each of S sparsities; all tensors are [G, S].

    θ̂ is the weight after prune-then-quantize, F the Fisher diagonal.
    """

    distortion: Tensor
    """D = ½ Σ F (θ − θ̂)², float64; in nats if F is in nats²."""
    nnz: Tensor
    """Number of non-zero codes, int64."""
    entropy_bits: Tensor
    """Number of weights × order-0 entropy of the codes, float64, in bits."""
    grid_length: Tensor
    """Σ F (θ̂_g − θ̂_{g+1})² at the same mask, float64; 0 for the last grid."""
    prune_length: Tensor
    """Σ F θ̂² over weights that leave at the next sparsity; 0 for the last one."""
    norm: Tensor
    """Σ F θ̂², float64."""


def distortion_table(
    weight: Tensor,
    fisher: Tensor | None,
    importance: Tensor,
    bits: Sequence[int],
    steps: Sequence[float],
    sparsities: Sequence[float],
) -> DistortionTable:
    """Tabulate what every weight grid costs at every sparsity.

    The mask at sparsity s drops the ⌊s·n⌋ weights of lowest importance (ties: the lower
    flat index first). Grids, in this order:

    - b bits: per row Δ_r = max|w_r| / (2^{b−1} − 1) over all weights of the row, codes
      clip(round(w/Δ_r), ±(2^{b−1} − 1));
    - step Δ: codes round(w/Δ) without bounds.

    Rounding is half to even, values are float32, sums float64. On CUDA tensors the
    call sorts the importances and waits for the result.

    Args:
        weight: [R, N], float32, bfloat16 or float16; rows are output channels.
        fisher: [R, N] float32, F ≥ 0 in nats²; None for 1 everywhere.
        importance: [R, N] float32, ≥ 0.
        bits: Bits of the fixed-point grids, 2 to 16.
        steps: Steps Δ > 0 of the entropy-coded grids.
        sparsities: Shares of weights to drop, ascending, in [0, 1).

    Returns:
        Six tables of shape [len(bits) + len(steps), len(sparsities)].

    Raises:
        ValueError: If shapes, types, devices or values do not fit, a weight is not
            finite, or a step gives codes beyond 2²².

    Source: section "Distortion" of FITCompress (Zandonati et al., 2023,
    arXiv 2302.07612), computed for all levels at once.
    """
    tables = torch.ops.fitcompress.distortion_table(
        weight.detach(),
        None if fisher is None else fisher.detach(),
        importance.detach(),
        list(bits),
        list(steps),
        list(sparsities),
    )
    return DistortionTable(*tables)


def _fake_distortion_table(
    weight: Tensor,
    fisher: Tensor | None,
    importance: Tensor,
    bits: Sequence[int],
    steps: Sequence[float],
    sparsities: Sequence[float],
) -> tuple[Tensor, ...]:
    cells = (len(bits) + len(steps), len(sparsities))
    real, count = torch.float64, torch.int64
    return tuple(
        weight.new_empty(cells, dtype=dtype)
        for dtype in (real, count, real, real, real, real)
    )


register_fake("distortion_table", _fake_distortion_table)
