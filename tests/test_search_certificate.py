"""Bounds of the exact search, where layers are too many for brute force."""

import dataclasses
import math
import signal
import time

import numpy as np
import pytest

import fitcompress as fc
from fitcompress.methods import Optimal
from fitcompress.search.optimum import solve
from test_search import random_table

INTEGERS = ("few values", "uniform", "a line", "falling", "blocks", "octaves")


def sums_problem(seed):
    """Six to sixty layers of small costs, one to three budgets, and a gap."""
    rng = np.random.default_rng(seed)
    budgets = int(rng.integers(1, 4))
    layers, levels = int(rng.integers(6, 60)), int(rng.integers(2, 6))
    layers = min(layers, 24) if budgets == 3 else layers
    cost = rng.integers(0, {1: 60, 2: 14, 3: 5}[budgets], (budgets, layers, levels))
    kind = INTEGERS[rng.integers(0, len(INTEGERS))]
    if kind == "few values":
        value = rng.integers(0, 8, (layers, levels)).astype(float)
    elif kind == "uniform":
        value = rng.uniform(size=(layers, levels))
    elif kind == "a line":
        value = 100.0 - cost.sum(0) + rng.integers(0, 3, (layers, levels))
    elif kind == "falling":
        value = np.exp(rng.normal(0, 0.2, (layers, levels))) / (1.0 + cost.sum(0))
    elif kind == "blocks":
        block = int(rng.integers(2, 6))
        copies = layers // block + 1
        cost = np.tile(cost[:, :block], (1, copies, 1))[:, :layers]
        part = rng.integers(0, 30, (block, levels)).astype(float)
        value = np.tile(part, (copies, 1))[:layers]
    else:
        value = 10.0 ** rng.uniform(-4, 2, (layers, levels))
    low, high = cost.min(2).sum(1), cost.max(2).sum(1)
    share = rng.uniform(0.02, 0.8, budgets)
    limits = [int(x) for x in low + (high - low) * share]
    return cost, value, limits, float(rng.choice([0, 1e-9, 1e-4, 1e-3, 1e-2, 0.2]))


def best_by_sums(cost, value, limits):
    """The least value, from a table over all sums of costs."""
    budgets, layers, levels = cost.shape
    best = np.full([limit + 1 for limit in limits], np.inf)
    best[(0,) * budgets] = 0.0
    for layer in range(layers):
        after = np.full_like(best, np.inf)
        for level in range(levels):
            step = cost[:, layer, level]
            source = tuple(
                slice(0, max(n - s, 0)) for n, s in zip(best.shape, step, strict=True)
            )
            target = tuple(slice(int(s), None) for s in step)
            moved = best[source] + value[layer, level]
            after[target] = np.minimum(after[target], moved)
        best = after
    return float(best.min())


@pytest.mark.parametrize("first", range(0, 400, 40))
def test_no_plan_is_below_the_bound(first):
    for seed in range(first, first + 40):
        cost, value, limits, gap = sums_problem(seed)
        best = best_by_sums(cost, value, limits)
        found = solve(cost, value, limits, gap=gap, time_limit=1)
        if math.isinf(best):
            assert found.status == "INFEASIBLE", seed
            continue
        assert found.bound <= best * (1 + 1e-12) + 1e-12, seed
        assert found.objective >= best * (1 - 1e-9) - 1e-9, seed
        spent = cost[:, np.arange(len(value)), found.choice].sum(1)
        assert (spent <= limits).all(), seed
        if not found.stopped:
            assert found.gap <= max(gap, 1e-9), seed
            assert found.objective - best <= gap * abs(found.objective) + 1e-9, seed


def test_the_root_is_proven_by_the_last_node_before_layers_are_left_out():
    rng = np.random.default_rng(1159)  # crashed once: nothing was left to search
    budgets, layers = int(rng.integers(1, 4)), int(rng.integers(6, 60))
    levels = int(rng.integers(2, 6))
    cost = rng.integers(0, 14, (budgets, layers, levels))
    rng.integers(0, 6)
    block = int(rng.integers(2, 6))
    copies = layers // block + 1
    cost = np.tile(cost[:, :block], (1, copies, 1))[:, :layers]
    part = rng.integers(0, 30, (block, levels)).astype(float)
    value = np.tile(part, (copies, 1))[:layers]
    if rng.uniform() < 0.15:
        cost[-1] = cost[0]
    low, high = cost.min(2).sum(1), cost.max(2).sum(1)
    share = rng.uniform(0.02, 0.8, budgets)
    limits = [int(x) for x in low + (high - low) * share]
    found = solve(cost, value, limits, gap=0.05)
    assert found.gap <= 0.05
    assert found.nodes == 40


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_is_found_where_few_are_within_all_budgets(seed):
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 60, (3, 10, 3))
    cost[1] = 60 - cost[0]  # together with the first: an equation
    value = rng.integers(0, 30, (10, 3)).astype(float)
    planted = rng.integers(0, 3, 10)
    limits = [int(c[np.arange(10), planted].sum()) for c in cost]
    found = solve(cost, value, limits)
    assert found.status == "OPTIMAL"
    assert found.objective <= value[np.arange(10), planted].sum()


def test_denormal_values():
    found = solve([[[0, 1, 2]] * 4], [[3e-310, 2e-310, 0]] * 4, [5], time_limit=5)
    assert found.status == "OPTIMAL"
    assert found.objective == pytest.approx(5e-310, rel=1e-9)


def test_layers_without_fisher_information():
    table = random_table(4, 3, 2, 0)
    table = dataclasses.replace(table, fisher_trace=np.zeros_like(table.fisher_trace))
    budget = fc.Budget(size="20%")
    assert fc.search(table, budget, method=Optimal(time_limit=5)).status == "OPTIMAL"


def test_an_optimum_of_zero():
    size = np.random.default_rng(0).integers(1, 50, 40)
    cost = size[:, None] * np.array([0, 1, 2])
    value = (size[:, None] - cost).astype(float)
    for budgets in (1, 2):
        found = solve([cost] * budgets, value, [int(size.sum())] * budgets)
        assert (found.status, found.objective, found.gap) == ("OPTIMAL", 0.0, 0.0)


def subset_sum():
    """Even costs, an odd limit, and values that fall as costs rise: never proven."""
    rng = np.random.default_rng(3)
    cost = 2 * rng.integers(10**8, 10**9, (1, 60, 2))
    cost[0, :, 0] = 0
    return cost, -cost[0].astype(float), [int(cost.sum() // 2) | 1]


def test_plans_of_equal_bounds_are_not_all_dropped():
    cost, value, limits = subset_sum()
    found = solve(cost, value, limits, time_limit=20)
    assert found.gap <= 2e-8


def test_progress_counts_the_layers_that_are_decided():
    cost, value, limits, _ = sums_problem(106)
    assert len(limits) == 2
    decided = np.tile([[0, 1, 0]], (2, 2 * len(value), 1))
    more = np.tile([[5000.0, 10.0, 5000.0]], (decided.shape[1], 1))
    reports = []
    found = solve(
        np.concatenate([cost, decided], 1),
        np.concatenate([value, more]),
        [limit + decided.shape[1] for limit in limits],
        time_limit=0.3,
        progress=lambda best, bound: reports.append((best, bound)),
    )
    assert found.nodes > 40
    assert reports
    assert all(bound <= found.objective <= best for best, bound in reports)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_within_the_progress_leaves_a_plan():
    cost, value, limits = subset_sum()

    def interrupt(best, bound):
        signal.raise_signal(signal.SIGINT)

    found = solve(cost, value, limits, time_limit=20, progress=interrupt)
    assert found.stopped == "interrupted"
    assert len(found.choice) == 60


def test_the_time_limit_holds_while_levels_are_compared():
    levels = 40_000  # of which none beats another
    rising = np.sort(np.random.default_rng(0).integers(0, 10**9, (2, levels)))
    value = np.random.default_rng(1).uniform(size=(2, levels))
    begin = time.perf_counter()
    found = solve([rising, 10**9 - rising], value, [10**9] * 2, time_limit=0.2)
    assert time.perf_counter() - begin < 2
    assert found.stopped == "time"
