"""Factors of layers from the loss rises of plans."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from fitcompress.refinement.regression import (
    Fit,
    cross_validated,
    fit_factors,
    rank_correlation,
    simplest,
)


def noisy_problem(plans, layers, noise, seed=0):
    random = np.random.default_rng(seed)
    x = 4.0 ** -random.integers(0, 5, (plans, layers))
    factors = np.exp(random.normal(0, 1, layers))
    return x, factors, (x @ factors) * np.exp(random.normal(0, noise, plans))


def test_factors_are_found() -> None:
    x, factors, y = noisy_problem(200, 8, 0.0)
    found = fit_factors(x, y, np.zeros(8, dtype=np.int64), 1e-6)
    np.testing.assert_allclose(found, factors, rtol=1e-3)


def test_a_fit_is_a_minimum() -> None:
    x, _, y = noisy_problem(30, 6, 0.1)
    groups = np.array([0, 0, 0, 1, 1, 1])
    found = np.log(fit_factors(x, y, groups, 0.3))

    def value(logs):
        rest = np.log(x @ np.exp(logs)) - np.log(y)
        apart = [logs[groups == g] - logs[groups == g].mean() for g in (0, 1)]
        return rest @ rest + 0.3 * sum(a @ a for a in apart)

    random = np.random.default_rng(1)
    for size in (1e-3, 1e-1):
        for _ in range(50):
            assert value(found + size * random.normal(size=6)) >= value(found) - 1e-9


def test_units_do_not_matter() -> None:
    x, _, y = noisy_problem(30, 6, 0.1)
    groups = np.zeros(6, dtype=np.int64)
    both = (cross_validated(x, y, groups), cross_validated(x * 1e-9, y * 1e6, groups))
    assert simplest(both[0]) == simplest(both[1])
    for plain, scaled in zip(*both, strict=True):
        np.testing.assert_allclose(scaled.factors, plain.factors * 1e15, rtol=1e-5)
        np.testing.assert_allclose(scaled.predicted, plain.predicted * 1e6, rtol=1e-5)


def test_noise_wants_a_larger_ridge() -> None:
    groups = np.zeros(12, dtype=np.int64)
    x, _, y = noisy_problem(24, 12, 0.0)
    fits = cross_validated(x, y, groups)
    clean = fits[simplest(fits)]
    alike = x.sum(1) * np.exp(np.random.default_rng(2).normal(0, 1, 24))
    noisy = cross_validated(x, alike, groups)
    assert noisy[simplest(noisy)].ridge > clean.ridge
    # What was left out was not fitted to.
    assert clean.error > 0
    assert rank_correlation(clean.predicted, y) > rank_correlation(x.sum(1), y)


def test_of_fits_as_good_as_the_best_the_simplest_is_taken() -> None:
    def fit(ridge, squares):
        return Fit(np.ones(1), ridge, np.ones(4), np.array(squares))

    best = fit(0.1, [0.0, 0.0, 0.2, 0.2])  # 0.1 ± 0.05
    assert simplest([fit(1.0, [0.14] * 4), best, fit(3.0, [0.16] * 4)]) == 0
    assert simplest([fit(1.0, [0.16] * 4), best]) == 1
    assert simplest([fit(1.0, [0.14] * 4), fit(1.0, [0.13] * 4), best]) == 1


def test_rank_correlation_is_that_of_scipy() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        a, b = random.integers(0, 6, (2, 15)).astype(float)
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_stages_of_a_plan_are_left_out_together() -> None:
    x, _, y = noisy_problem(16, 4, 0.1)
    twice_x, twice_y = np.repeat(x, 2, axis=0), np.repeat(y, 2)
    groups = np.zeros(4, dtype=np.int64)
    once = cross_validated(x, y, groups, [0.1])[0]
    both = cross_validated(twice_x, twice_y, groups, [0.2], together=2)[0]
    np.testing.assert_allclose(both.predicted[::2], once.predicted, rtol=1e-6)
