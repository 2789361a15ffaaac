"""Several budgets, rules and groups; methods side by side; differences of plans."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

import fitcompress as fc
from fitcompress.errors import (
    BudgetInfeasibleError,
    OptionError,
    PlanMismatchError,
    SearchLimitError,
)
from fitcompress.methods import Greedy, Lagrangian, Optimal, PathSearch, Uniform
from fitcompress.search.budget import BudgetError
from fitcompress.search.optimum import solve
from fitcompress.search.problem import make_problem
from test_search import make_table, random_table

EXACT = Optimal("rounded", 1, gap=0.0)


def bits_table(layers=4, grids=3, sparsities=2, seed=0, **changes):
    """A table of fixed-point grids, which bit operations can be bounded of."""
    kinds = tuple(fc.Grid(bits=8 - 2 * g) for g in range(grids))
    bits = np.tile([8 - 2 * g for g in range(grids)], (layers, 1))
    table = random_table(layers, grids, sparsities, seed)
    return dataclasses.replace(table, grids=kinds, weight_bits=bits, **changes)


def plans(table, problem):
    """Every plan: distortion, totals of costs, cells."""
    layers = len(table.names)
    cells = problem.cost.shape[1] * problem.cost.shape[2]
    costs = problem.costs.reshape(len(problem.limits), layers, -1)
    value = problem.distortion.reshape(layers, -1)
    for choice in itertools.product(range(cells), repeat=layers):
        rows = np.arange(layers)
        yield value[rows, choice].sum(), costs[:, rows, choice].sum(1), choice


@pytest.mark.parametrize("seed", range(6))
def test_two_budgets_against_brute_force(seed):
    table = bits_table(seed=seed)
    budget = fc.Budget(size="60%", bops="14%")
    problem = make_problem(table, budget, None)
    within = [
        value
        for value, costs, _ in plans(table, problem)
        if (costs <= problem.limits).all()
    ]
    if not within:
        with pytest.raises(BudgetInfeasibleError):
            fc.search(table, budget, method=EXACT)
        return
    plan = fc.search(table, budget, method=EXACT)
    assert plan.distortion == pytest.approx(min(within), rel=1e-12)
    assert plan.status == "OPTIMAL"
    assert plan.size_bytes <= plan.limit_bytes
    assert plan.bops <= budget.bops_limit(int(table.macs.sum()) * 1024)
    assert fc.Plan.from_json(plan.to_json()) == plan


def test_the_least_bound_beside_the_others():
    # few bytes take many operations and the other way round
    cost = np.array([[[10], [40]], [[10], [40]]])
    macs = np.array([1000, 1000])
    table = make_table(
        cost,
        np.ones((2, 2, 1)),
        grids=(fc.Grid(bits=8), fc.Grid(bits=2)),
        weight_bits=np.array([[8, 2], [8, 2]]),
        macs=macs,
        overhead_bytes=0,
    )
    bops = 1000 * 32 * (8 + 2)
    plan = fc.search(table, fc.Budget(size=7, bops=bops), method=EXACT)
    assert sorted(level.grid.bits for level in plan.levels.values()) == [2, 8]
    with pytest.raises(BudgetInfeasibleError, match="beside the other bounds") as info:
        fc.search(table, fc.Budget(size=6, bops=bops), method=EXACT)
    assert info.value.smallest == 7  # 10 + 40 bits
    with pytest.raises(BudgetInfeasibleError, match="at least 3 bytes") as info:
        fc.search(table, fc.Budget(size=2, bops=bops), method=EXACT)
    assert info.value.smallest == 3


@pytest.mark.parametrize("seed", range(4))
def test_latency(seed):
    table = bits_table(seed=seed)
    rng = np.random.default_rng(seed)
    latency = rng.uniform(0.1, 2.0, (4, 3))
    budget = fc.Budget(latency_ms=3.5)
    plan = fc.search(table, budget, method=EXACT, latency=latency)
    grids = list(table.grids)
    taken = sum(
        latency[i, grids.index(level.grid)]
        for i, level in enumerate(plan.levels.values())
    )
    assert taken <= 3.5
    problem = make_problem(table, budget, None, latency=latency)
    best = min(
        value
        for value, costs, _ in plans(table, problem)
        if (costs <= problem.limits).all()
    )
    assert plan.distortion == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(
    ("latency", "message"),
    [
        (None, "needs a latency table"),
        (np.ones((2, 3)), "another shape"),
        (np.full((4, 3), np.nan), "no milliseconds"),
        (-np.ones((4, 3)), "no milliseconds"),
    ],
)
def test_bad_latencies(latency, message):
    with pytest.raises(OptionError, match=message):
        fc.search(bits_table(), fc.Budget(latency_ms=1), latency=latency)


@pytest.mark.parametrize("seed", range(4))
def test_rules_and_groups_against_brute_force(seed):
    table = bits_table(layers=4, seed=seed)
    rules = (
        fc.Rule("layer[01]", min_bits=6),
        fc.Rule("layer3", max_sparsity=0.0),
        fc.Rule("*", max_bits=6),
    )
    budget = fc.Budget(bops="18%", rules=rules, groups=(("layer1", "layer2"),))
    plan = fc.search(table, budget, method=EXACT)
    levels = plan.levels
    assert all(level.grid.bits <= 6 for level in levels.values())
    assert levels["layer0"].grid.bits == 6
    assert levels["layer3"].sparsity == 0
    assert levels["layer1"].grid == levels["layer2"].grid
    assert levels["layer1"].sparsity == levels["layer2"].sparsity
    problem = make_problem(table, budget, None)
    allowed = problem.allowed.reshape(4, -1)
    best = min(
        value
        for value, costs, cells in plans(table, problem)
        if (costs <= problem.limits).all()
        and cells[1] == cells[2]
        and allowed[np.arange(4), cells].all()
    )
    assert plan.distortion == pytest.approx(best, rel=1e-12)
    for method in (Greedy("rounded", 1), EXACT):
        other = fc.search(table, budget, method=method)
        assert other.distortion >= plan.distortion * (1 - 1e-12)
        assert other.levels["layer1"].grid == other.levels["layer2"].grid


def test_a_fixed_layer():
    table = bits_table()
    grid = fc.Grid(bits=4)
    budget = fc.Budget(size="90%", rules=(fc.Rule("layer2", grid=grid),))
    plan = fc.search(table, budget, family="bits")
    assert plan.levels["layer2"].grid == grid


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": (fc.Rule("conv*"),)}, "matches no layer"),
        ({"rules": (fc.Rule("layer1", min_bits=7, max_bits=7),)}, "no level"),
        ({"groups": (("layer0", "layer9"),)}, "was not measured"),
        (
            {
                "rules": (
                    fc.Rule("layer0", grid=fc.Grid(bits=8)),
                    fc.Rule("layer1", grid=fc.Grid(bits=4)),
                ),
                "groups": (("layer0", "layer1"),),
            },
            "no level in common",
        ),
    ],
)
def test_rules_that_leave_nothing(options, message):
    with pytest.raises(OptionError, match=message):
        fc.search(bits_table(), fc.Budget(bops="50%", **options))


def test_a_rule_that_contradicts_itself():
    with pytest.raises(OptionError, match="allows nothing"):
        fc.Rule("*", min_bits=6, max_bits=4)


@pytest.mark.parametrize("method", [Lagrangian(), PathSearch()])
@pytest.mark.parametrize(
    "options",
    [
        {"bops": "50%"},
        {"rules": (fc.Rule("layer1", max_bits=6),)},
        {"groups": (("layer0", "layer1"),)},
    ],
)
def test_methods_for_one_budget_say_so(method, options):
    budget = fc.Budget(size="90%", **options)
    with pytest.raises(OptionError, match=r"bounds one cost.*method=Optimal"):
        fc.search(bits_table(), budget, family="bits", method=method)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bounds", [{"size": "45%"}, {"size": "60%", "bops": "20%"}])
def test_optimal_is_never_worse(seed, bounds):
    table = bits_table(layers=6, grids=4, sparsities=3, seed=seed)
    budget = fc.Budget(**bounds)
    options = {"family": "bits", "masks": True}
    best = fc.search(table, budget, method=EXACT, **options)
    methods = [Greedy("rounded", 1), Uniform("rounded", 1)]
    if len(bounds) == 1:
        methods += [Lagrangian("rounded", 1), PathSearch()]
    for method in methods:
        try:
            other = fc.search(table, budget, method=method, **options)
        except (BudgetInfeasibleError, SearchLimitError):
            continue
        assert other.size_bytes <= other.limit_bytes
        assert best.distortion <= other.distortion * (1 + 1e-12)


def test_uniform_gives_one_level_to_all():
    table = bits_table(layers=3)
    plan = fc.search(table, fc.Budget(bops="50%"), method=Uniform())
    assert len({str(level) for level in plan.levels.values()}) == 1
    with pytest.raises(BudgetInfeasibleError, match="with one level for all"):
        rules = (fc.Rule("layer0", min_bits=8),)
        fc.search(table, fc.Budget(bops="20%", rules=rules), method=Uniform())


def test_a_search_that_is_out_of_time():
    table = bits_table(layers=30, grids=3, sparsities=4)
    method = Optimal(time_limit=0.0)
    plan = fc.search(table, fc.Budget(size="50%"), family="bits", method=method)
    assert plan.details.get("stopped", "time") == "time"
    with pytest.raises(ValueError, match="gap must be at least 0"):
        Optimal(gap=-1)
    with pytest.raises(ValueError, match="time_limit must be at least 0"):
        Optimal(time_limit=-1)


def test_the_difference_of_two_plans():
    table = bits_table()
    before = fc.search(table, fc.Budget(size="500%"), family="bits")
    least = make_problem(table, fc.Budget(size="500%"), "bits").smallest()
    after = fc.search(table, fc.Budget(size=least), family="bits")
    text = before.diff(after)
    assert f"{before.size_bytes} ⇒ {after.size_bytes} bytes" in text.splitlines()[0]
    changed = [
        name for name in before.levels if before.levels[name] != after.levels[name]
    ]
    assert changed
    assert [line.split(":")[0] for line in text.splitlines()[1:]] == changed
    assert before.diff(before).splitlines()[1] == "the same level for every layer"
    other = fc.search(bits_table(layers=3), fc.Budget(size="90%"), family="bits")
    with pytest.raises(PlanMismatchError):
        before.diff(other)


def test_a_latency_is_the_decimal_that_was_written() -> None:
    assert fc.Budget(latency_ms=0.7).latency_ns() == 700_000
    assert fc.Budget(latency_ms=np.float32(1)).latency_ns() == 10**6
    assert fc.Budget(latency_ms=10**400).latency_ns() == 2**59
    table = random_table(2, 3, 1, 0)
    times = np.full((2, 3), 0.35)
    budget = fc.Budget(latency_ms=0.7)
    plan = fc.search(table, budget, latency=times, family="any")
    assert plan.status == "OPTIMAL"


def test_groups_may_come_from_a_generator() -> None:
    groups = (tuple(names) for names in (["a", "b"],))
    assert fc.Budget(size=1, groups=groups).groups == (("a", "b"),)


@pytest.mark.parametrize(
    "change",
    [
        {"rules": fc.Rule("fc")},
        {"rules": ("fc",)},
        {"rules": "fc"},
        {"rules": None},
        {"groups": None},
        {"groups": (1, 2)},
        {"groups": ((1, 2),)},
        {"groups": "ab"},
        {"latency_ms": True},
        {"latency_ms": "fast"},
        {"latency_ms": float("nan")},
        {"size": 10**5000},
    ],
)
def test_budgets_that_make_no_sense(change) -> None:
    with pytest.raises(BudgetError):
        fc.Budget(**{"size": 100, **change})


@pytest.mark.parametrize("value", ["2MB", "2bpw", "two"])
def test_bit_operations_have_no_bytes(value) -> None:
    with pytest.raises(BudgetError) as caught:
        fc.Budget(bops=value)
    if value != "two":
        assert "KB" not in str(caught.value)
        assert "bit operations" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"pattern": 5},
        {"max_bits": 0},
        {"min_bits": "4"},
        {"min_bits": True},
        {"min_bits": float("nan")},
        {"min_sparsity": 60},
        {"max_sparsity": -1},
        {"max_sparsity": float("nan")},
        {"max_sparsity": "0.5"},
        {"grid": "4"},
    ],
)
def test_rules_that_make_no_sense(change) -> None:
    with pytest.raises(OptionError):
        fc.Rule(**{"pattern": "*", **change})


def test_a_latency_table_without_a_bound_is_refused() -> None:
    with pytest.raises(OptionError, match="no effect"):
        fc.search(random_table(2, 3, 1, 0), fc.Budget(size="90%"), latency=[[1]])


@pytest.mark.parametrize("latency", ["nonsense", [[1, 2], [3]]])
def test_a_latency_table_that_is_none(latency) -> None:
    with pytest.raises(OptionError, match="no array"):
        fc.search(bits_table(layers=2), fc.Budget(latency_ms=1), latency=latency)


def test_uniform_names_the_rules_that_leave_nothing() -> None:
    table = bits_table(layers=2)
    rules = [fc.Rule(n, grid=g) for n, g in zip(table.names, table.grids, strict=False)]
    budget = fc.Budget(bops="90%", rules=rules)
    with pytest.raises(OptionError, match="all layers"):
        fc.search(table, budget, method=Uniform())


def test_arguments_are_checked_before_limits() -> None:
    with pytest.raises(ValueError, match="value"):
        solve([[[1, 2]]], [[1.0, 2.0], [3.0, 4.0]], [-1])
    with pytest.raises(ValueError, match="2\\*\\*63"):
        solve([[[1, 2]]], [[1.0, 2.0]], [2**70])
    with pytest.raises(ValueError, match="gap"):
        solve([[[1, 2]]], [[1.0, 2.0]], [3], gap=math.inf)
    assert solve([[[1, 2]]], [[1.0, 2.0]], [-1]).status == "INFEASIBLE"
