"""A latency as a sum over layers and over neighbours, fitted to measured patterns.

    T(z) / T(0)  =  1 + Σ_l s_l z_l + Σ_l p_l z_l z_{l+1},     z ∈ {0, 1}^L

z_l tells whether layer l has integer weights and a quantized input; layers stand in the
order in which they run. The pairs matter: a convolution runs in integers only if the
layer behind it takes integers, too, so that one of them alone slows a network down.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Fit", "fit", "make_patterns"]

STAY = 0.65  # probability that a layer does as the one before it


@dataclass(frozen=True)
class Fit:
    """Coefficients, as shares of the float network's latency.

    Attributes:
        single: s, [L].
        pair: p, [L−1].
        error: Root mean square of predicted − measured over the patterns, each
            predicted by a fit to the others; NaN if there are too few of them.
    """

    single: NDArray[np.float64]
    pair: NDArray[np.float64]
    error: float

    def predict(self, patterns: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return T(z) / T(0) of every pattern, [M, L] → [M]."""
        ratios: NDArray[np.float64] = 1 + _terms(patterns) @ np.concatenate(
            [self.single, self.pair]
        )
        return ratios


def make_patterns(layers: int, count: int, seed: int = 0) -> NDArray[np.bool_]:
    """Return which layers are integers in the networks to measure, [M, L].

    All float, all integers, and Markov chains that switch along the layers with
    probability .35, without repetition: runs of several layers are what plans have.

    Args:
        layers: L.
        count: M, at least 2; all 2^L patterns if there are no more than that.
        seed: Of the draws.
    """
    if layers < 20 and 2**layers <= count:
        codes = np.arange(2**layers)
        every = (codes[:, None] >> np.arange(layers)) & 1
        return np.asarray(every, dtype=np.bool_)
    rng = np.random.default_rng(seed)
    ends = [(False,) * layers, (True,) * layers]
    rows = dict.fromkeys(ends)
    while len(rows) < count:
        switch = rng.random(layers) > STAY
        switch[0] = rng.random() < 0.5
        rows.setdefault(tuple((np.cumsum(switch) % 2 == 1).tolist()))
    return np.array(list(rows), dtype=np.bool_)


def fit(patterns: NDArray[np.bool_], ratios: NDArray[np.float64]) -> Fit:
    """Fit s and p by least squares, the float network's ratio being 1.

    Where the patterns do not tell coefficients apart, the smallest ones are taken.

    Args:
        patterns: Which layers were integers, [M, L].
        ratios: Measured T(z) / T(0), [M].
    """
    layers = patterns.shape[1]
    told = patterns.any(axis=1)  # the float network says nothing about coefficients
    terms, rise = _terms(patterns[told]), ratios[told] - 1
    inverse = np.linalg.pinv(terms)
    found = inverse @ rise
    left = rise - terms @ found
    # A fit without row i misses it by its residual / (1 − its leverage).
    free = 1 - np.einsum("ij,ji->i", terms, inverse)
    known = free > 1e-6
    error = float("nan")
    if known.any():
        error = float(np.sqrt(np.mean(np.square(left[known] / free[known]))))
    return Fit(found[:layers], found[layers:], error)


def _terms(patterns: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return z_l and z_l z_{l+1} of every pattern, [M, 2L−1]."""
    neighbours = patterns[:, :-1] & patterns[:, 1:]
    return np.concatenate([patterns, neighbours], axis=1).astype(np.float64)
