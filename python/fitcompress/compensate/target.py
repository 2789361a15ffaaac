"""The weights that a layer should have, given its inputs as they are now.

    W* = argmin_V E‖y − ȳ − V (x̂ − μ)‖² + δ‖V − W‖² = (X + δW)(H + δ)⁻¹

with y the dense outputs and x̂ the inputs of the network compressed so far: later layers
repair what earlier ones broke. With few calibration data W* fits their noise as well,
so only a share γ of the correction W* − W is used, the one that minimises the error on
data which W* was not fitted to. In closed form, with H_v, X_v of those data:

    γ = ⟨D, X_v − W H_v⟩ / ⟨D, D H_v⟩,   D = W* − W,   clipped to 0 … 1.

The means μ, ȳ are left out (H, X are covariances) where a bias can restore them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fitcompress.compensate.cholesky import cholesky_, inverse_factor, solved
from fitcompress.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fitcompress.compensate.statistics import Moments

__all__ = ["Normal", "Target", "drift_share", "solve"]

logger = logging.getLogger(__name__)

DRIFT = 0.75  # γ where cross-validation would take too much memory
NOISE = 1e-5  # of the mean square, in float32 sums over a tile
LARGE = 2048  # columns from which on it would
ATTEMPTS = 6
WORTH = 0.01  # share of the outputs' energy that a correction gains at least


@dataclass
class Normal:
    """Normal equations of one group, per position.

    Attributes:
        h: H, [columns, columns].
        x: X, [rows, columns].
        mean: μ, [columns]; zero if means are not left out.
        output: ȳ, [rows], likewise.
        live: Which inputs are ever other than zero, bool [columns].
        noise: What rounding may have made of the diagonal of H: float32 sums of
            squares, from which the means are taken off.
    """

    h: torch.Tensor
    x: torch.Tensor
    mean: torch.Tensor
    output: torch.Tensor
    live: torch.Tensor
    noise: float

    @classmethod
    def of(cls, moments: Moments, group: int, *, centered: bool) -> Normal:
        """Return the equations; the memory of ``moments`` is used for them."""
        second, cross = moments.second[group], moments.cross[group]
        count = max(moments.count, 1.0)
        h, x = second[:-1, :-1].div_(count), cross[:, :-1].div_(count)
        mean, output = second[:-1, -1] / count, cross[:, -1] / count
        live, noise = h.diagonal() > 0, NOISE * float(h.diagonal().mean())
        if centered:
            h.addr_(mean, mean, alpha=-1)
            x.addr_(output, mean, alpha=-1)
        else:
            mean, output = torch.zeros_like(mean), torch.zeros_like(output)
        return cls(h, x, mean, output, live, noise)

    def ridge(self, damping: float) -> float:
        """Return δ."""
        return max(damping * float(self.h.diagonal().mean()), self.noise)


@dataclass
class Target:
    """What the sweep works on; columns are in falling order of H_jj.

    Attributes:
        weight: W + γ(W* − W), float64 [rows, columns].
        factor: U, upper Cholesky factor of (H + δ)⁻¹.
        inverse: Diagonal of (H + δ)⁻¹.
        order: Column of the layer at each place.
        drift: γ.
        gain: By how much the whole of W* − W would lower the error per position, on the
            data that γ was chosen by and on those it was fitted to; NaN if unknown.
    """

    weight: torch.Tensor
    factor: torch.Tensor
    inverse: torch.Tensor
    order: torch.Tensor
    drift: float
    gain: tuple[float, float] = (float("nan"), float("nan"))

    def unsorted(self, columns: torch.Tensor) -> torch.Tensor:
        """Return columns in the order of the layer."""
        out = torch.empty_like(columns)
        out[:, self.order] = columns
        return out


def solve(
    weight: torch.Tensor,
    fitted: Normal,
    held_out: Normal | None,
    whole: Normal,
    *,
    damping: float,
    drift: float | None,
    name: str,
) -> Target:
    """Return the target of one group.

    Args:
        weight: W, float32 [rows, columns].
        fitted: Of most of the data.
        held_out: Of the others, or None if there are none.
        whole: Of all of them; used up, to save memory.
        damping: δ over the mean diagonal of H.
        drift: γ, or None to choose it.
        name: Of the layer, for messages.

    Raises:
        CalibrationError: H stays singular with a hundred thousand times the damping.
    """
    gain = (float("nan"), float("nan"))
    if drift is None:
        drift = DRIFT
        if held_out is not None:
            others = held_out
            drift, gain = drift_share(
                weight,
                lambda: replace(fitted),
                lambda: replace(others),
                damping=damping,
                name=name,
            )
    ridge = whole.ridge(damping)
    if not ridge > 0:  # inputs are zero: there is nothing to compensate with
        eye = torch.eye(len(whole.h), dtype=torch.float64, device=weight.device)
        order = torch.arange(len(eye), device=weight.device)
        nothing = torch.full_like(eye[0], torch.inf)  # any weight may go
        return Target(weight.double(), eye, nothing, order, 0.0)
    lower, order, ridge = _factor(whole, ridge, name)
    if drift > 0:
        right = whole.x.add_(weight, alpha=ridge).T[order]
        whole.x = lower.new_empty(0)
        target = solved(lower, right)
        del right
        target = target.flip(0).T.contiguous().mul_(drift)
        order = order.flip(0)
        target.add_(weight[:, order], alpha=1 - drift)
    else:
        order = order.flip(0)
        target = weight[:, order].double()
    upper = inverse_factor(lower)
    del lower
    diagonal = torch.linalg.vector_norm(upper, dim=0).square()
    return Target(target, upper, diagonal, order, drift, gain)


def _factor(
    normal: Normal, ridge: float, name: str
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the Cholesky factor of H + δ in *rising* order of H_jj, the order, δ.

    H is taken out of ``normal``, to save memory.
    """
    order = normal.h.diagonal().argsort(descending=True, stable=True).flip(0)
    h, normal.h = normal.h[order], normal.h.new_empty(0)
    h, added = h[:, order], 0.0
    for _ in range(ATTEMPTS):
        h.diagonal().add_(ridge - added)
        added = ridge
        if cholesky_(h):
            return h, order, ridge
        logger.warning("layer %s: H is singular, damping raised tenfold", name)
        ridge *= 10
    raise _singular(name, ridge)


def drift_share(
    weight: torch.Tensor,
    fitted: Callable[[], Normal],
    held_out: Callable[[], Normal],
    *,
    damping: float,
    name: str,
) -> tuple[float, tuple[float, float]]:
    """Return γ, and what D gains on the data held out and on the fitted ones.

    Args:
        weight: W, float32 [rows, columns].
        fitted: Returns the equations of most of the data, which are used up; called
            twice, so that they need not be in memory in between.
        held_out: Returns those of the others.
        damping: δ over the mean diagonal of H.
        name: Of the layer, for messages.

    Raises:
        CalibrationError: H stays singular with a hundred thousand times the damping.
    """
    unknown = (float("nan"), float("nan"))
    normal = fitted()
    ridge = normal.ridge(damping)
    if not ridge > 0:
        return 0.0, unknown
    weight = weight.double()
    lower, order, ridge = _factor(normal, ridge, name)
    right = normal.x.add(weight, alpha=ridge).T[order]
    del normal
    correction = torch.empty_like(weight)
    correction[:, order] = solved(lower, right).T
    del lower, right
    correction -= weight
    slope, curvature = _slope(weight, correction, held_out())
    gamma = min(max(slope / curvature, 0.0), 1.0) if curvature > 0 else 0.0
    data = fitted()
    energy = float((weight @ data.h).mul_(weight).sum())
    own_slope, own_curvature = _slope(weight, correction, data)
    gained = 2 * own_slope - own_curvature
    if gained < WORTH * energy:  # nothing much has drifted
        return gamma, unknown
    return gamma, (2 * slope - curvature, gained)


def _slope(
    weight: torch.Tensor, correction: torch.Tensor, data: Normal
) -> tuple[float, float]:
    """Return ⟨D, X − W H⟩ and ⟨D, D H⟩."""
    moved = correction @ data.h
    with_outputs = float((correction * data.x).sum())
    slope = with_outputs - float((weight * moved).sum())
    return slope, float(moved.mul_(correction).sum())


def _singular(name: str, ridge: float) -> CalibrationError:
    return CalibrationError(
        f"the input statistics of layer {name!r} cannot be inverted",
        got=f"no Cholesky factor with a ridge of {ridge:g}",
        wanted="calibration inputs that are not degenerate",
        fix="calibrate with more, and more varied, samples",
    )
