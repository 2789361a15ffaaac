"""Factors of layers, fitted to the loss rises of whole plans.

A plan p whose layers have distortions x_pl raises the loss by y_p. Fitted is

    log y_p ≈ log Σ_m a_m x_pm,    a_m = exp(c_g(m) + t_m),

m a column of x: a layer, or the mask of a layer. Columns form groups g, each with a
common factor exp(c_g), and t_m says how far a column is from the others of its group:

    minimise Σ_p (log Σ_m a_m x_pm − log y_p)² + ρ Σ_m t_m².

ρ is the largest whose error on plans that were not fitted to is within one standard
error of the least one (Breiman et al. 1984): with few plans for many layers the least
one is least by chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Reals = NDArray[np.float64]

__all__ = ["Fit", "cross_validated", "fit_factors", "rank_correlation", "simplest"]

RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
FOLDS = 8
LOOSE = 1e-9  # ridge of the common factors, for groups that never occur
STEPS, ENOUGH = 100, 1e-12  # of the descent; relative gain that ends it


@dataclass(frozen=True)
class Fit:
    """What was fitted, and how well it predicts plans that it has not seen.

    Attributes:
        factors: a, [M].
        ridge: ρ.
        predicted: Σ a x of every plan, from a fit to the others, [P].
        squares: log²(predicted / y) of every plan, [P].
    """

    factors: Reals
    ridge: float
    predicted: Reals
    squares: Reals

    @property
    def error(self) -> float:
        """Root mean square of log(predicted / y)."""
        return float(np.sqrt(self.squares.mean()))


def fit_factors(x: Reals, y: Reals, groups: NDArray[np.int64], ridge: float) -> Reals:
    """Return a, [M].

    Args:
        x: Distortions of every plan and column, [P, M], not negative; every plan has
            one that is positive.
        y: Loss rises, [P], positive.
        groups: Group of every column, [M], from 0.
        ridge: ρ > 0.
    """
    columns = x.shape[1]
    member = np.eye(int(groups.max()) + 1)[groups]  # [M, groups]
    commons = member.shape[1]
    target = np.log(y)
    start = float(np.median(target - np.log(x.sum(1))))
    t = np.concatenate([np.full(commons, start), np.zeros(columns)])
    penalty = np.concatenate([np.full(commons, LOOSE), np.full(columns, ridge)])
    centre = np.concatenate([np.full(commons, start), np.zeros(columns)])

    def factors(t: Reals) -> Reals:
        return np.asarray(np.exp(member @ t[:commons] + t[commons:]))

    def value(t: Reals) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            rest = np.log(x @ factors(t)) - target
            return float(rest @ rest + penalty @ np.square(t - centre))

    best, damping = value(t), 1e-3
    for _ in range(STEPS):
        parts = x * factors(t)
        total = parts.sum(1)
        slope = parts / total[:, None]
        jacobian = np.concatenate([slope @ member, slope], axis=1)
        gradient = jacobian.T @ (np.log(total) - target) + penalty * (t - centre)
        curvature = jacobian.T @ jacobian + np.diag(penalty)
        while damping < 1e12:
            scaled = curvature + damping * np.diag(curvature.diagonal())
            ahead = t - np.linalg.solve(scaled, gradient)
            found = value(ahead)
            if found <= best:
                break
            damping *= 4
        else:
            break
        gain, t, best = best - found, ahead, found
        damping = max(damping / 4, 1e-9)
        if gain <= ENOUGH * best:
            break
    return factors(t)


def cross_validated(
    x: Reals,
    y: Reals,
    groups: NDArray[np.int64],
    ridges: Sequence[float] = RIDGES,
    *,
    together: int = 1,
) -> list[Fit]:
    """Return a fit for every ridge, and how it predicts plans that are left out.

    Args:
        x: As for `fit_factors`; P ≥ 2.
        y: As for `fit_factors`.
        groups: As for `fit_factors`.
        ridges: To try.
        together: So many rows, one after the other, are of one plan and left out
            together.
    """
    plans = len(y)
    owner = np.arange(plans) // together
    count = min(FOLDS, plans // together)
    folds = [np.flatnonzero(owner % count == k) for k in range(count)]
    fits = []
    for ridge in ridges:
        predicted = np.empty(plans)
        for out in folds:
            rest = np.setdiff1d(np.arange(plans), out)
            predicted[out] = x[out] @ fit_factors(x[rest], y[rest], groups, ridge)
        squares = np.square(np.log(predicted / y))
        factors = fit_factors(x, y, groups, ridge)
        fits.append(Fit(factors, ridge, predicted, squares))
    return fits


def simplest(fits: Sequence[Fit]) -> int:
    """Return which fit has the largest ridge of those as good as the best.

    That is, within one standard error of its mean square; of equal ridges the one with
    the least error.
    """
    means = [float(fit.squares.mean()) for fit in fits]
    best = fits[int(np.argmin(means))].squares
    allowed = best.mean() + best.std() / np.sqrt(len(best))
    good = [i for i, mean in enumerate(means) if mean <= allowed]
    return max(good, key=lambda i: (fits[i].ridge, -means[i]))


def rank_correlation(a: Reals, b: Reals) -> float | None:
    """Return Spearman's rank correlation, None if all of a or of b are equal.

    Of equal values the ranks are averaged.
    """
    first, second = _ranks(a), _ranks(b)
    first, second = first - first.mean(), second - second.mean()
    length = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / length) if length > 0 else None


def _ranks(values: Reals) -> Reals:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - (count - 1) / 2)[place], dtype=np.float64)
