"""Scales of fixed-point levels, one per row, by the error that the sweep leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fitcompress.quantize import half_up

if TYPE_CHECKING:
    from fitcompress.compensate.options import Compensation
    from fitcompress.compensate.sweep import Problem

__all__ = ["clipped_scales"]

RATIOS = {
    1: (0.25, 16),
    3: (0.4, 14),
    7: (0.55, 10),
}  # by largest code: least, how many
OTHERS = (0.8, 4)
REFITS = 3
TRIALS = 2e10  # multiply-adds that trial sweeps may take


def clipped_scales(
    problems: list[Problem],
    max_code: int,
    options: Compensation,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return the scales of all rows, float32 [rows], as 16 bits hold them.

    From max|w| / q downwards, every row takes the scale at which its outputs come out
    closest after the sweep; then scale and codes are fitted to each other in turns, as
    long as that helps. Without clipping, or where trial sweeps would take too long, by
    the error of rounded weights over [H⁻¹]_jj.

    Args:
        problems: One per group.
        max_code: q.
        options: Whether to clip.
        mask: What may be non-zero, bool [rows, columns], or None.
    """
    found = []
    for g, problem in enumerate(problems):
        rows = len(problem.target.weight)
        own = None if mask is None else mask[g * rows : (g + 1) * rows]
        used = problem.target.weight * problem.live[problem.target.order]
        largest = half_up((used.abs().amax(1) / max_code).float())
        if options.clipping:
            found.append(_best(problem, largest, max_code, own, options))
        else:
            found.append(largest)
    return half_up(torch.cat(found))


def _best(
    problem: Problem,
    largest: torch.Tensor,
    max_code: int,
    mask: torch.Tensor | None,
    options: Compensation,
) -> torch.Tensor:
    target = problem.target
    rows, columns = target.weight.shape
    least, count = RATIOS.get(max_code, OTHERS)
    swept = rows * columns**2 * count <= TRIALS

    def trial(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values and the error of every row."""
        step = scale.double().reshape(-1, 1)
        if swept:
            codes = problem.sweep(scale, max_code, mask, options, beam=1)
            values = codes * step
            return values, problem.error(values)
        safe = torch.where(step > 0, step, torch.inf)
        values = (target.weight / safe).round().clamp(-max_code, max_code) * step
        return values, ((target.weight - values).square() / target.inverse).sum(1)

    best = largest
    values, error = trial(best)
    for i in range(1, count):
        scale = half_up(largest * least ** (i / (count - 1)))
        other, its = trial(scale)
        better = its < error
        best = torch.where(better, scale, best)
        error = torch.where(better, its, error)
        values = torch.where(better[:, None], other, values)
    for _ in range(REFITS if swept else 0):
        factor = problem.gain(values).clamp(0.5, 2).float()
        scale = half_up(best * factor)
        other, its = trial(scale)
        better = its < error
        best = torch.where(better, scale, best)
        error = torch.where(better, its, error)
        values = torch.where(better[:, None], other, values)
    return best
