"""The exact search: brute force, a MILP solver, ties, limits, interruption."""

import itertools
import math
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from fitcompress.search.optimum import solve

KINDS = ("ties", "tiny", "correlated", "octaves", "forbidden")


def random_problem(seed, kind, most_layers=5, most_levels=6):
    """Small numbers that tie, huge ones, values over many octaves, forbidden levels."""
    rng = np.random.default_rng(seed)
    budgets = int(rng.integers(1, 4))
    shape = int(rng.integers(1, most_layers + 1)), int(rng.integers(1, most_levels + 1))
    largest = int(rng.choice([2, 5, 100, 10**6, 10**12]))
    cost = rng.integers(0, largest, (budgets, *shape))
    if kind == "ties":
        value = rng.integers(0, 5, shape).astype(float)
    elif kind == "tiny":
        value = rng.normal(size=shape) * 10.0 ** rng.integers(-30, 30)
    elif kind == "correlated":
        value = rng.integers(0, 3, shape) - 1.0 * cost.sum(0)
    elif kind == "octaves":
        value = 10.0 ** rng.uniform(-12, 3, shape)
    else:
        value = rng.uniform(size=shape)
        value[rng.uniform(size=shape) < 0.2] = math.inf
        value[:, 0] = 1.0
    low, high = cost.min(2).sum(1), cost.max(2).sum(1)
    share = rng.uniform(-0.05, 1.05, budgets)
    return cost, value, [int(x) for x in low + (high - low) * share]


def brute_force(cost, value, limits):
    """The least value of all choices within the limits."""
    layers, levels = value.shape
    best = math.inf
    for choice in itertools.product(range(levels), repeat=layers):
        totals = cost[:, np.arange(layers), list(choice)].sum(1)
        if (totals <= limits).all():
            best = min(best, math.fsum(value[np.arange(layers), list(choice)]))
    return best


def network_like(layers, seed, budgets):
    """Six bit-widths at sixteen sparsities of layers of very different sizes."""
    rng = np.random.default_rng(seed)
    bits, sparsity = np.array([2, 3, 4, 5, 6, 8])[:, None], np.linspace(0, 0.97, 16)
    count = np.exp(rng.uniform(np.log(1e3), np.log(3e6), layers))[:, None, None]
    uses = np.exp(rng.uniform(0, np.log(1024), layers))[:, None, None]
    stored = np.round(count * (bits * (1 - sparsity) + 0.5))
    operations = np.round(count * uses * bits * 8 * (1 - sparsity))
    noise = np.exp(0.05 * rng.normal(size=(layers, 6, 16)))
    error = sparsity**3 + 12.0 * 4.0**-bits * (1 - sparsity)
    value = np.sqrt(count) * np.exp(rng.normal(0, 1.5, (layers, 1, 1))) * error * noise
    cost = np.stack([stored, operations])[:budgets].astype(np.int64)
    return cost.reshape(budgets, layers, -1), value.reshape(layers, -1)


def limits_at(cost, shares):
    low, high = cost.min(2).sum(1), cost.max(2).sum(1)
    return [int(x) for x in low + (high - low) * np.array(shares)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", range(4))
def test_against_brute_force(kind, block):
    for seed in range(100 * block, 100 * block + 40):
        cost, value, limits = random_problem(seed, kind)
        best = brute_force(cost, value, limits)
        found = solve(cost, value, limits)
        if math.isinf(best):
            assert found.status == "INFEASIBLE", seed
            assert len(found.choice) == 0
            continue
        assert found.status == "OPTIMAL", seed
        totals = cost[:, np.arange(len(value)), found.choice].sum(1)
        assert (totals <= limits).all(), seed
        assert found.objective == pytest.approx(best, rel=1e-9, abs=0), seed
        assert found.bound <= best + 1e-12 * abs(best), seed
        loose = solve(cost, value, limits, gap=0.1)
        assert loose.objective - best <= 0.1 * abs(loose.objective) + 1e-300, seed
        assert loose.bound <= best + 1e-12 * abs(best), seed


def highs(cost, value, limits, gap):
    """Solve with HiGHS; returns choice and lower bound."""
    budgets, layers, levels = cost.shape
    one_each = csr_array(
        (
            np.ones(layers * levels),
            (np.repeat(np.arange(layers), levels), np.arange(layers * levels)),
        )
    )
    rows = cost.reshape(budgets, -1) / np.array(limits)[:, None]
    answer = milp(
        value.ravel(),
        integrality=np.ones(layers * levels),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(rows, -np.inf, 1),
        ],
        options={"mip_rel_gap": gap, "time_limit": 60},
    )
    return answer.x.reshape(layers, levels).argmax(1), answer.mip_dual_bound


@pytest.mark.parametrize("budgets", [1, 2])
@pytest.mark.parametrize(("layers", "seed"), [(20, 0), (60, 2), (200, 3), (600, 4)])
def test_never_worse_than_a_milp_solver(layers, seed, budgets):
    cost, value = network_like(layers, seed, budgets)
    limits = limits_at(cost, [0.1, 0.08][:budgets])
    gap = 0.0 if budgets == 1 else 1e-4
    ours = solve(cost, value, limits, gap=gap)
    assert (cost[:, np.arange(layers), ours.choice].sum(1) <= limits).all()
    choice, bound = highs(cost, value, limits, 1e-4)
    # Its plans may be over the budget, by up to its tolerance of 1e-6.
    theirs = value[np.arange(layers), choice].sum()
    assert ours.objective <= theirs * (1 + 1e-4 if budgets == 2 else 1 + 1e-6)
    assert ours.objective >= bound * (1 - 1e-5)
    assert ours.bound <= ours.objective
    assert ours.gap <= max(gap, 1e-9)


@pytest.mark.parametrize("budgets", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_blocks_of_layers_that_only_share_the_budget(seed, budgets):
    """Many layers, whose best plans by brute force are put together by hand."""
    rng = np.random.default_rng(seed)
    block = 6
    cost = rng.integers(1, 6, (budgets, block, 4))
    value = rng.integers(0, 40, (block, 4)).astype(float)
    copies = 4 if budgets == 3 else 12
    many = np.tile(cost, (1, copies, 1))
    limits = [int(1.1 * c.min(1).sum()) * copies + 3 for c in cost]
    # All sums of costs are small: a table of the best value for every sum is exact.
    tops = [limit + 1 for limit in limits]
    best = np.full(tops, np.inf)
    best[(0,) * budgets] = 0.0
    for layer in range(block * copies):
        after = np.full(tops, np.inf)
        for level in range(4):
            step = many[:, layer, level]
            source = tuple(slice(0, top - s) for top, s in zip(tops, step, strict=True))
            target = tuple(slice(s, None) for s in step)
            moved = best[source] + value[layer % block, level]
            after[target] = np.minimum(after[target], moved)
        best = after
    found = solve(many, np.tile(value, (copies, 1)), limits)
    if np.isinf(best.min()):
        assert found.status == "INFEASIBLE"
    else:
        assert found.status == "OPTIMAL"
        assert found.objective == best.min()


@pytest.mark.parametrize("budgets", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_layers_does_not_matter(seed, budgets):
    cost, value = network_like(30, seed, budgets)
    limits = limits_at(cost, [0.2, 0.15][:budgets])
    found = solve(cost, value, limits)
    order = np.random.default_rng(seed).permutation(30)
    again = solve(cost[:, order], value[order], limits)
    assert np.array_equal(again.choice, found.choice[order])
    assert again.objective == found.objective


def test_the_same_answer_twice_and_on_another_thread():
    cost, value = network_like(40, 0, 2)
    limits = limits_at(cost, [0.1, 0.1])
    found = [solve(cost, value, limits)]
    threads = [
        threading.Thread(target=lambda: found.append(solve(cost, value, limits)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in found[1:]:
        assert np.array_equal(other.choice, found[0].choice)
        assert other.bound == found[0].bound


def test_first_of_equal_levels():
    found = solve([[[1, 1, 1]]], [[2.0, 1.0, 1.0]], [5])
    assert found.choice.tolist() == [1]


def test_by_hand():
    # within 5: 3 + 2 for the middle levels, 0 + 4 or 5 + 0 for one best level
    cost, value = [[[1, 2, 4], [1, 2, 4]]], [[5, 3, 0], [4, 2, 0]]
    assert solve(cost, value, [5]).choice.tolist() == [2, 0]
    assert solve(cost, value, [4]).choice.tolist() == [1, 1]
    assert solve(cost, value, [8]).objective == 0
    assert solve(cost, value, [2]).choice.tolist() == [0, 0]
    assert solve(cost, value, [1]).status == "INFEASIBLE"
    assert solve(cost, value, [-5]).status == "INFEASIBLE"
    # a second budget of 5 for costs that fall as the first ones rise
    both = [cost[0], [[4, 2, 1], [4, 2, 1]]]
    assert solve(both, value, [8, 4]).choice.tolist() == [2, 2]
    assert solve(both, value, [5, 4]).choice.tolist() == [1, 1]
    assert solve(both, value, [4, 3]).status == "INFEASIBLE"


def test_budgets_that_exclude_each_other():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 1000, (12, 8))
    cost = np.stack([first, 1000 - first])
    least = [int(c.min(1).sum()) for c in cost]
    found = solve(cost, rng.uniform(size=(12, 8)), least)
    assert found.status == "INFEASIBLE"
    assert math.isinf(found.objective)


def test_many_equal_layers():
    cost = np.tile([[[1, 3, 7]]], (1, 300, 1))
    value = np.tile([[9.0, 4.0, 1.0]], (300, 1))
    found = solve(cost, value, [1001])
    assert found.status == "OPTIMAL"
    # 350 steps of cost 2 and gain 5 at most, or such of 4 and 3
    assert found.objective == min(
        300 * 9 - 5 * a - 8 * b
        for a in range(301)
        for b in range(301 - a)
        if 300 + 2 * a + 6 * b <= 1001
    )


def test_a_budget_that_only_one_parity_meets():
    rng = np.random.default_rng(0)
    cost = 2 * rng.integers(1, 1000, (1, 40, 12))
    value = 1e4 - 4.0 * cost[0]
    limit = int(cost.mean(2).sum()) | 1
    found = solve(cost, value, [limit])
    total = int(cost[0, np.arange(40), found.choice].sum())
    assert total == limit - 1  # nothing fits better
    assert found.objective == 40e4 - 4 * total


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.floats(1e-250, 1e150))
def test_the_unit_of_the_value_does_not_matter(seed, unit):
    unit = 2.0 ** math.floor(math.log2(unit))
    cost, value = network_like(8, seed, 2)
    limits = limits_at(cost, [0.2, 0.3])
    found, scaled = solve(cost, value, limits), solve(cost, value * unit, limits)
    assert np.array_equal(found.choice, scaled.choice)
    assert scaled.bound == pytest.approx(found.bound * unit, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cost": [[[1.0, 2.0]]]}, TypeError, "cost: got dtype float64"),
        ({"cost": [[1, 2]]}, ValueError, "cost: got 2 dimensions, wanted 3"),
        ({"cost": [[[1, 2, 3]]]}, ValueError, r"value: got shape \(1, 2\), wanted"),
        ({"cost": [[[-1, 2]]]}, ValueError, r"cost\[0\]\[0, 0\]: got -1, wanted 0 to"),
        ({"cost": [[[2**62, 2]]]}, ValueError, r"cost\[0\]\[0, 0\]: got 4611"),
        ({"cost": [[[1, 2]]] * 4, "limits": [1] * 4}, ValueError, "got 4 budgets"),
        ({"limits": [1, 2]}, ValueError, "limit: got 2 numbers, wanted 1"),
        ({"limits": [1.5]}, TypeError, "limits: got dtype float64, wanted integers"),
        ({"value": [[math.nan, 1]]}, ValueError, r"value\[0, 0\]: got nan"),
        ({"value": [[1, -math.inf]]}, ValueError, r"value\[0, 1\]: got -inf"),
        ({"value": [[1e300, 1]]}, ValueError, r"within ±1e200"),
        ({"value": [[math.inf] * 2]}, ValueError, "layer 0 has no level"),
        (
            {"cost": np.zeros((1, 0, 2), int), "value": np.zeros((0, 2))},
            ValueError,
            "got 0 la",
        ),
        ({"gap": -1.0}, ValueError, "gap: got -1"),
        ({"gap": math.nan}, ValueError, "gap: got nan"),
        ({"time_limit": -1.0}, ValueError, "seconds: got -1"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"cost": [[[1, 2]]], "value": [[1, 0]], "limits": [2]}
    with pytest.raises(error, match=message):
        solve(**{**arguments, **change})


def hard_problem():
    """Three budgets on unrelated costs, close to the value: seconds of branching."""
    rng = np.random.default_rng(0)
    cost = rng.integers(100, 100_000, (3, 20, 96))
    value = 1e6 - 4.0 * cost.mean(0) + rng.uniform(0, 3000, (20, 96))
    return cost, value, limits_at(cost, [0.4, 0.42, 0.4])


def test_the_time_limit_leaves_a_plan_with_its_gap():
    cost, value, limits = hard_problem()
    begin = time.monotonic()
    found = solve(cost, value, limits, time_limit=0.2)
    assert time.monotonic() - begin < 2
    assert (found.status, found.stopped) == ("FEASIBLE", "time")
    assert 1e-9 < found.gap < 0.1
    assert found.bound < found.objective
    assert (cost[:, np.arange(20), found.choice].sum(1) <= limits).all()


def test_progress_is_reported_and_errors_in_it_go_on():
    cost, value, limits = hard_problem()
    seen = []
    solve(
        cost,
        value,
        limits,
        time_limit=0.3,
        progress=lambda best, bound: seen.append((best, bound)),
    )
    assert len(seen) >= 2
    objectives, bounds = zip(*seen, strict=True)
    assert list(objectives) == sorted(objectives, reverse=True)
    assert list(bounds) == sorted(bounds)
    assert all(bound <= best for best, bound in seen)

    def fail(best, bound):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        solve(cost, value, limits, progress=fail)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_leaves_a_plan_with_its_gap():
    cost, value, limits = hard_problem()
    main = threading.main_thread().ident
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    begin = time.monotonic()
    found = solve(cost, value, limits, time_limit=30)
    timer.join()
    assert time.monotonic() - begin < 5
    assert (found.status, found.stopped) == ("FEASIBLE", "interrupted")
    assert found.bound < found.objective


def test_the_lock_is_released():
    cost, value, limits = hard_problem()
    counted = 0
    worker = threading.Thread(
        target=solve, args=(cost, value, limits), kwargs={"time_limit": 0.5}
    )
    worker.start()
    while worker.is_alive():
        counted += 1
        time.sleep(0.001)
    assert counted > 50


@pytest.mark.parametrize("budgets", [1, 2])
def test_thousands_of_layers(budgets):
    cost, value = network_like(2000, 0, budgets)
    limits = limits_at(cost, [0.1, 0.1][:budgets])
    gap = 0.0 if budgets == 1 else 1e-4
    found = solve(cost, value, limits, gap=gap, time_limit=20)
    assert found.gap <= max(gap, 1e-9)
    assert not found.stopped
