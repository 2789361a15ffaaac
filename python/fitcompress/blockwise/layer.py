"""One layer, compensated from sums that lie on disk."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fitcompress.blockwise.sums import read_cross, read_second
from fitcompress.compensate.statistics import Moments
from fitcompress.compensate.sweep import Problem, Quantized, on_level
from fitcompress.compensate.target import Normal, drift_share

if TYPE_CHECKING:
    import torch

    from fitcompress.blockwise.work import Work
    from fitcompress.compensate.options import Compensation
    from fitcompress.search.plan import Level

__all__ = ["compensated"]


def compensated(
    weight: torch.Tensor,
    level: Level,
    options: Compensation,
    work: Work,
    stage: str,
    *,
    rows: slice,
    by_inputs: bool,
    held_out: bool,
    biased: bool,
    name: str,
) -> Quantized:
    """Return the codes of a layer, or of some of its rows.

    Of H there are two at a time in memory, and of X three: equations are read when they
    are needed.

    Args:
        weight: W, float32 [rows, columns].
        level: Where the weights are to lie.
        options: What compensation does.
        work: Where the sums are.
        stage: Whose.
        rows: Which of the layer's rows ``weight`` has.
        by_inputs: Whether they are those of the dense inputs, not outputs.
        held_out: Whether there are some of tokens held out, to choose γ by.
        biased: Whether a bias can restore the means of the outputs.
        name: Of the layer, for messages.

    Raises:
        CalibrationError: H cannot be inverted.
    """
    columns = weight.shape[1]
    centered = biased and options.bias

    def outputs(part: str) -> torch.Tensor:
        cross = read_cross(work, stage, part, columns)
        return weight.double() @ cross if by_inputs else cross[rows]

    crosses = {"fitted": outputs("fitted")}
    if held_out:
        crosses["held_out"] = outputs("held_out")

    def normal(part: str) -> Normal:
        second = read_second(work, stage, part, columns)
        return _normal(second, crosses[part].clone(), centered=centered)

    gain = (float("nan"), float("nan"))
    drift = options.drift
    if drift is None:
        drift = 0.0  # too few to tell a correction from noise
        if held_out:
            drift, gain = drift_share(
                weight,
                lambda: normal("fitted"),
                lambda: normal("held_out"),
                damping=options.damping,
                name=name,
            )
    second, cross = read_second(work, stage, "fitted", columns), crosses.pop("fitted")
    if held_out:
        second += read_second(work, stage, "held_out", columns)
        cross += crosses.pop("held_out")
    whole = _normal(second, cross, centered=centered)
    del second, cross
    problem = Problem.of(weight, whole, level, replace(options, drift=drift), name=name)
    problem.target.gain = gain
    return on_level([problem], level, options, centered=centered)


def _normal(second: torch.Tensor, cross: torch.Tensor, *, centered: bool) -> Normal:
    return Normal.of(Moments(second[None], cross[None]), 0, centered=centered)
