"""What compensation does, each part of it a switch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fitcompress.errors import OptionError

__all__ = ["Compensation"]


@dataclass(frozen=True, kw_only=True)
class Compensation:
    """How errors are compensated; the defaults are what paid in bytes at equal KL.

    Attributes:
        drift: γ, the share of the drift correction W + γ(W* − W) that is used, W* the
            least-squares weights for the inputs as they are now. None: the share that
            fits a quarter of the calibration data best which W* was not fitted to, for
            each layer; .75 where that would take too much memory, 0 with fewer than
            four batches to hold one out from.
        bias: Give the outputs the mean that they had, through the bias or the batch
            norm that follows, and fit weights to what deviates from the mean only.
        residual: Let a layer whose outputs are added to others, as in residual
            connections, repair those as well, by the share γ.
        shared: Spread the errors of weights that linear layers share, tied embeddings
            among them, by the inputs that these have in the dense network; else they
            are rounded. ``compensate_shards`` rounds them: it does not know these.
        beam: Paths that the sweep keeps per row, 1 for plain error feedback. None: as
            many as cost little, 16 for layers up to a thousand inputs.
        rate: λ of rate-aware rounding of entropy-coded steps, relative to the slope of
            distortion against rate at high resolution, Δ² ln 2 / (6 U_jj²) per bit: 0
            rounds to what is nearest. Fixed-point levels take no notice.
        row_scale: Multiply each row by its least-squares factor after the sweep, where
            a batch norm follows that takes it for free.
        clipping: For fixed-point levels, choose every row's scale by the error that the
            sweep leaves, then fit it to the codes; else the largest weight decides.
        damping: Ridge δ over the mean diagonal of H.
        widen: Where fixed-point codes take more bytes than the plan allows, and there
            are no steps to scale, widen all their scales; else that is an error.
    """

    drift: float | None = None
    bias: bool = True
    residual: bool = True
    shared: bool = True
    beam: int | None = None
    rate: float = 0.0
    row_scale: bool = False
    clipping: bool = True
    damping: float = 0.02
    widen: bool = True

    def __post_init__(self) -> None:
        if self.drift is not None:
            _check("drift", self.drift, 0, 1)
        if self.beam is not None and not (
            type(self.beam) is int and 1 <= self.beam <= 1024
        ):
            raise OptionError("beam", got=self.beam, wanted="an integer, 1 to 1024")
        _check("rate", self.rate, 0, 100)
        _check("damping", self.damping, 1e-12, 100)

    def paths(self, rows: int, columns: int) -> int:
        """Return the number of paths for a layer."""
        if self.beam is not None:
            return self.beam
        affordable = max(1, int(WORK / max(rows * columns**2, 1)))
        return min(16, 1 << (affordable.bit_length() - 1))


WORK = 16 * 512 * 1024**2  # multiply-adds that a sweep may take by default


def _check(name: str, value: float, least: float, most: float) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        raise OptionError(name, got=value, wanted=f"{least:g} to {most:g}")
