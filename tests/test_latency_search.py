"""Plans under a bound on the latency, and bounds themselves."""

import dataclasses
import itertools

import numpy as np
import pytest

import fitcompress as fc
from fitcompress.errors import BudgetInfeasibleError, OptionError, PlanMismatchError
from fitcompress.latency.interplay import make_patterns
from fitcompress.search.budget import BudgetError
from fitcompress.search.integer_layers import choose_integer_layers
from test_search_activations import make_table


def table_of(single, pair, names=None, float_ms=4.0) -> fc.LatencyTable:
    """A table with these milliseconds."""
    layers = len(single)
    patterns = make_patterns(layers, 2**layers)
    near = patterns[:, :-1] & patterns[:, 1:]
    ratios = 1 + (patterns @ np.array(single) + near @ np.array(pair)) / float_ms
    names = names or tuple(f"layer{i}" for i in range(layers))
    spread = np.zeros(len(ratios))
    return fc.LatencyTable(names, 8, 8, float_ms, patterns, ratios, spread, "made up")


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_of_layers_against_brute_force(seed) -> None:
    rng = np.random.default_rng(seed)
    layers = 1 + seed % 7
    single, pair = rng.integers(-9, 9, layers), rng.integers(-9, 9, layers - 1)
    value = rng.integers(0, 9, (layers, 2)).astype(float)
    value[rng.random((layers, 2)) < 0.1] = np.inf
    every = make_patterns(layers, 2**layers)
    times = 30 + every @ single + (every[:, :-1] & every[:, 1:]) @ pair
    values = value[np.arange(layers), every.astype(int)].sum(axis=1)
    for limit in range(-10, 60, 3):
        found = choose_integer_layers(30, single, pair, value, limit)
        within = (times <= limit) & np.isfinite(values)
        assert found.proven
        if not within.any():
            assert not len(found.integer)
            continue
        at = np.flatnonzero((every == found.integer).all(axis=1))[0]
        assert times[at] == found.nanoseconds <= limit
        assert values[at] == values[within].min()


@pytest.mark.parametrize("seed", range(6))
def test_plans_meet_the_budget_and_none_is_better(seed) -> None:
    rng = np.random.default_rng(seed)
    sensitivity = make_table(layers=4, seed=seed)
    table = table_of(rng.uniform(-1, 0.5, 4), rng.uniform(-1, 0.5, 3))
    method = fc.methods.Optimal("rounded", 1, gap=0.0)
    for size in (None, sensitivity.overhead_bytes + 4 * 75):
        budget = fc.Budget(size=size, latency="80%")
        plan = fc.search(sensitivity, budget, method=method, latency=table)
        assert table.predict(plan) <= 0.8 * table.float_ms
        assert plan.details["latency_ms"] == pytest.approx(table.predict(plan), 1e-5)
        assert plan.status == "OPTIMAL"
        best = np.inf
        choices = list(itertools.product(range(2), range(3)))
        weights = sensitivity.distortion[:, :, 0]
        inputs = sensitivity.activation_distortion
        for cells in itertools.product(choices, repeat=4):
            levels = {
                f"layer{i}": fc.Level(
                    sensitivity.grids[g], 0, (10, 10), activation_bits=(None, 8, 4)[a]
                )
                for i, (g, a) in enumerate(cells)
            }
            bits = sum(int(sensitivity.size_bits[i, g, 0]) for i, (g, _) in
                       enumerate(cells))  # fmt: skip
            if size is not None and bits > 8 * (size - sensitivity.overhead_bytes):
                continue
            if table.predict(fc.Plan(levels)) <= 0.8 * table.float_ms:
                value = sum(weights[i, g] + inputs[i, a]
                            for i, (g, a) in enumerate(cells))  # fmt: skip
                best = min(best, value)
        assert plan.distortion == pytest.approx(best)


def test_integers_go_where_they_pay() -> None:
    sensitivity = make_table(layers=3)
    table = table_of([1.0, 0.5, -1.0], [-3.0, 0.5])  # layers 0 and 1 pay together
    free = fc.search(sensitivity, fc.Budget(latency=4), latency=table)
    assert all(level.activation_bits is None for level in free.levels.values())
    one = fc.search(sensitivity, fc.Budget(latency="3ms"), latency=table)
    integer = [name for name, level in one.levels.items() if level.activation_bits]
    assert integer in (["layer2"], ["layer0", "layer1"])
    both = fc.search(sensitivity, fc.Budget(latency_ms=2.1), latency=table)
    assert all(level.activation_bits == 8 for level in both.levels.values())
    assert all(level.grid.bits <= 8 for level in both.levels.values())
    assert both.details["integer_layers"] == 3
    with pytest.raises(
        BudgetInfeasibleError, match=r"at least 2000000 ns.*faster together"
    ) as info:
        fc.search(sensitivity, fc.Budget(latency="1ms"), latency=table)
    assert info.value.smallest == 2_000_000


def test_levels_that_were_not_measured_are_not_chosen() -> None:
    wide = (fc.Grid(bits=16), fc.Grid(bits=8))
    bits = np.tile([16, 8], (2, 1))
    sensitivity = make_table(2, inputs=(None, 16, 8), grids=2)
    sensitivity = dataclasses.replace(sensitivity, grids=wide, weight_bits=bits)
    table = table_of([-1.0, 0.5], [0.0])
    plan = fc.search(sensitivity, fc.Budget(latency="3ms"), latency=table)
    assert plan.levels["layer0"].activation_bits == 8
    assert plan.levels["layer0"].grid.bits == 8
    assert plan.levels["layer1"].activation_bits is None
    size = fc.Budget(size="90%", latency="3ms")
    assert fc.search(sensitivity, size, latency=table).status == "FEASIBLE"


def test_searches_that_cannot_be() -> None:
    sensitivity, table = make_table(layers=2), table_of([-1.0, -1.0], [0.0])
    budget = fc.Budget(latency="3ms")
    plain = make_table(layers=2, inputs=(None,))
    with pytest.raises(OptionError, match=r"no level that runs.*activation_bits=\(8,"):
        fc.search(plain, budget, latency=table)
    grouped = fc.Budget(latency="3ms", groups=(("layer0", "layer1"),))
    with pytest.raises(OptionError, match="groups cannot"):
        fc.search(sensitivity, grouped, latency=table)
    other = table_of([-1.0, -1.0], [0.0], names=("a", "b"))
    with pytest.raises(PlanMismatchError, match="the sensitivity lacks"):
        fc.search(sensitivity, budget, latency=other)
    with pytest.raises(OptionError, match="no effect"):
        fc.search(sensitivity, fc.Budget(size="50%"), latency=table)
    with pytest.raises(BudgetError, match="refers to that of the float network"):
        fc.search(sensitivity, fc.Budget(latency="50%"), latency=np.ones((2, 2)))
    rules = (fc.Rule("layer1", min_bits=8),)
    both = fc.Budget(latency="2ms", bops="90%", rules=rules)
    plan = fc.search(sensitivity, both, latency=table)
    assert plan.levels["layer1"].grid.bits == 8
    assert plan.status == "FEASIBLE"


@pytest.mark.parametrize(
    ("bound", "nanoseconds"),
    [("4ms", 4_000_000), ("0.7 ms", 700_000), ("300us", 300_000), ("2s", 2 * 10**9),
     (4, 4_000_000), (0.7, 700_000), ("50%", 1_000_000), ("3", 3_000_000)],
)  # fmt: skip
def test_bounds_on_the_latency(bound, nanoseconds) -> None:
    assert fc.Budget(latency=bound).latency_ns(2.0) == nanoseconds
    assert fc.Budget(latency=bound).costs == ("latency",)


@pytest.mark.parametrize("bound", ["", "0ms", "-1ms", "fast", "5MB", True, 0, [4]])
def test_what_is_no_bound_on_the_latency(bound) -> None:
    with pytest.raises(BudgetError, match="bound on the latency cannot be understood"):
        fc.Budget(latency=bound)
    with pytest.raises(BudgetError, match="bounded twice"):
        fc.Budget(latency=1, latency_ms=1)


def test_bounds_describe_themselves() -> None:
    assert str(fc.Budget(latency="50%")) == "latency ≤ 50%"
    assert str(fc.Budget(size=9, latency=4)) == "size ≤ 9 and latency ≤ 4 ms"
