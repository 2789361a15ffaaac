"""Searching plans: against brute force and an exact solver, and what holds always."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array, vstack

import fitcompress as fc
from fitcompress.errors import BudgetInfeasibleError, FitcompressError, OptionError
from fitcompress.methods import Lagrangian, PathSearch
from fitcompress.search.hull import front
from fitcompress.search.hull_reference import lower_hull
from fitcompress.search.problem import make_problem

# Its objective is the distortion itself.
FISHER = Lagrangian(errors="rounded", fisher_power=1)


def make_table(
    size_bits: np.ndarray, distortion: np.ndarray, **changes
) -> fc.Sensitivity:
    """Return a sensitivity with these costs and distortions, [L, G, S]."""
    layers, grids, sparsities = distortion.shape
    rng = np.random.default_rng(0)
    kinds = [fc.Grid(step=0.1 * 2**g) for g in range(grids)]
    cells = (layers, grids, sparsities)
    values = {
        "names": tuple(f"layer{i}" for i in range(layers)),
        "shapes": ((10, 10),) * layers,
        "macs": rng.integers(100, 1000, layers),
        "fisher_trace": rng.exponential(size=layers),
        "fisher_error": np.zeros(layers),
        "grids": tuple(kinds),
        "sparsity": np.tile(np.linspace(0, 0.9, sparsities), (layers, 1)),
        "distortion": distortion,
        "size_bits": size_bits,
        "nonzeros": np.ones(cells, np.int64),
        "weight_bits": np.tile(np.arange(16, 16 - grids, -1), (layers, 1)),
        "grid_length": rng.exponential(size=cells),
        "prune_length": rng.exponential(size=cells),
        "norm": 1 + rng.exponential(size=cells),
        "overhead_bytes": 10,
        "dense_bytes": 400 * layers,
        "samples": 1,
        "loss": 1.0,
    }
    return fc.Sensitivity(**values | changes)


def random_table(
    layers: int, grids: int = 2, sparsities: int = 2, seed: int = 0, **changes
) -> fc.Sensitivity:
    """Costs fall and distortions rise with every grid and sparsity, unevenly."""
    rng = np.random.default_rng(seed)
    shape = (layers, grids, sparsities)
    scale = rng.integers(1, 30, (layers, 1, 1))
    fall = np.cumsum(np.cumsum(rng.integers(1, 9, shape), 1), 2)
    cost = (fall.max((1, 2), keepdims=True) - fall + 8) * scale
    rise = np.cumsum(np.cumsum(rng.exponential(size=shape), 1), 2)
    return make_table(cost, rise * rng.exponential(size=(layers, 1, 1)), **changes)


def find(table: fc.Sensitivity, size: int, method: Lagrangian = FISHER) -> fc.Plan:
    """Search with masks, which a size alone would not use."""
    return fc.search(table, fc.Budget(size=size), method=method, masks=True)


def every_plan(table: fc.Sensitivity) -> list[tuple[int, float]]:
    """(bits, distortion) of every plan."""
    layers = table.distortion.shape[0]
    cost = table.size_bits.reshape(layers, -1)
    value = table.distortion.reshape(layers, -1)
    cells = itertools.product(range(cost.shape[1]), repeat=layers)
    rows = np.arange(layers)
    return [
        (int(cost[rows, list(c)].sum()), float(value[rows, list(c)].sum()))
        for c in cells
    ]


def budgets(table: fc.Sensitivity, count: int) -> list[int]:
    """Bytes from the smallest possible to more than any plan needs."""
    layers = table.distortion.shape[0]
    cost = table.size_bits.reshape(layers, -1)
    low = -(-int(cost.min(1).sum()) // 8) + table.overhead_bytes
    high = int(cost.max(1).sum()) // 8 + table.overhead_bytes + 2
    return np.linspace(low, high, count).astype(int).tolist()


@pytest.mark.parametrize("seed", range(8))
def test_lagrangian_against_brute_force(seed) -> None:
    layers = 2 + seed % 5
    table = random_table(layers, seed=seed)
    plans = every_plan(table)
    for size in budgets(table, 9):
        plan = find(table, size)
        limit = 8 * (size - table.overhead_bytes)
        optimum = min(d for bits, d in plans if bits <= limit)
        objective = plan.details["objective"]
        assert plan.size_bytes <= size
        assert plan.limit_bytes == size
        assert sum(level.size_bits for level in plan.levels.values()) <= limit
        assert objective == pytest.approx(plan.distortion, rel=1e-12)
        assert plan.details["lower_bound"] <= optimum * (1 + 1e-12)
        assert objective >= optimum * (1 - 1e-12)
        low = plan.details["lower_bound"]
        assert plan.gap == pytest.approx((objective - low) / objective, abs=1e-12)
        if plan.status == "OPTIMAL":
            assert objective == pytest.approx(optimum, rel=1e-8)


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_more_budget_is_never_worse(seed, layers) -> None:
    table = random_table(layers, seed=seed)
    plans = [find(table, size) for size in budgets(table, 25)]
    for less, more in itertools.pairwise(plans):
        assert more.distortion <= less.distortion * (1 + 1e-12)
        assert more.details["lower_bound"] <= less.details["lower_bound"] * (1 + 1e-12)


@pytest.mark.parametrize("method", [Lagrangian(), FISHER], ids=["default", "fisher"])
def test_the_order_of_the_layers_does_not_matter(method) -> None:
    table = random_table(6, 4, 3, seed=5)
    order = np.random.default_rng(1).permutation(6)
    arrays = {
        f.name: getattr(table, f.name)[order]
        for f in dataclasses.fields(table)
        if isinstance(getattr(table, f.name), np.ndarray)
    }
    names = tuple(table.names[i] for i in order)
    other = dataclasses.replace(table, names=names, **arrays)
    for size in budgets(table, 12):
        a = find(table, size, method)
        b = find(other, size, method)
        assert a.levels == b.levels
        assert list(b.levels) == list(names)


def test_an_optimal_plan_says_so() -> None:
    table = random_table(5, 3, 3, seed=2)
    plan = find(table, 10**6)
    assert plan.status == "OPTIMAL"
    assert plan.distortion == pytest.approx(table.distortion.min((1, 2)).sum())


def exact(table: fc.Sensitivity, limit: int) -> float:
    """The optimum by mixed-integer programming (HiGHS)."""
    layers = table.distortion.shape[0]
    cost = table.size_bits.reshape(layers, -1)
    one_each = block_diag([np.ones((1, cost.shape[1]))] * layers)
    total = csr_array(cost.reshape(1, -1).astype(float))
    answer = milp(
        table.distortion.ravel(),
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(
            vstack([one_each, total]),
            np.r_[np.ones(layers), 0],
            np.r_[np.ones(layers), limit],
        ),
        options={"mip_rel_gap": 1e-9, "time_limit": 20},
    )
    assert answer.status == 0
    return float(answer.fun)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_large_tables_against_an_exact_solver(share) -> None:
    table = random_table(60, 12, 4, seed=9)
    low, *_, high = budgets(table, 3)
    size = int(low + share * (high - low))
    plan = find(table, size)
    optimum = exact(table, 8 * (size - table.overhead_bytes))
    assert plan.size_bytes <= size
    assert plan.details["lower_bound"] <= optimum * (1 + 1e-7)
    assert optimum <= plan.distortion * (1 + 1e-7)
    assert plan.gap < 0.01


def test_fisher_power_removes_differences_between_layers() -> None:
    # Two layers that differ by their Fisher values only get equal levels with power 0.
    cost = np.array([[500, 400, 300, 200, 100]] * 2)[:, :, None]
    rise = np.array([[1.0, 2, 4, 8, 16], [100, 200, 400, 800, 1600]])[:, :, None]
    table = make_table(cost, rise, fisher_trace=np.array([1.0, 100.0]))
    size = table.overhead_bytes + 600 // 8
    flat = find(table, size, Lagrangian("rounded", 0))
    assert [x.size_bits for x in flat.levels.values()] == [300, 300]
    fisher = find(table, size)
    assert [x.size_bits for x in fisher.levels.values()] == [100, 500]
    with pytest.raises(ValueError, match=r"between 0 and 1; got 1\.5"):
        Lagrangian(fisher_power=1.5)


def test_a_layer_without_fisher_information_takes_the_cheapest_level() -> None:
    table = random_table(3, 4, 2, seed=1)
    table.distortion[1] = 0
    table.fisher_trace[1] = 0
    size = budgets(table, 5)[2]
    for method in (Lagrangian(), FISHER):
        plan = find(table, size, method)
        assert plan.levels["layer1"].distortion == 0
        assert plan.size_bytes <= size
    assert plan.levels["layer1"].size_bits == table.size_bits[1].min()


METHODS = [
    Lagrangian(),
    FISHER,
    PathSearch(),
    PathSearch(mode="greedy"),
    PathSearch(mode="best_first", lam=1e6),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("kind", ["size", "bops"])
def test_no_method_exceeds_a_budget(sensitivity, method, kind) -> None:
    front = fc.pareto(sensitivity, kind=kind)
    costs = [p.size_bytes if kind == "size" else p.bops for p in front]
    for limit in np.linspace(costs[0], costs[-1], 7).astype(int).tolist():
        plan = fc.search(sensitivity, fc.Budget(**{kind: limit}), method=method)
        assert (plan.size_bytes if kind == "size" else plan.bops) <= limit
        assert list(plan.levels) == list(sensitivity.names)
        families = {level.grid.family for level in plan.levels.values()}
        assert families == {"step" if kind == "size" else "bits"}
        assert fc.search(sensitivity, fc.Budget(**{kind: limit}), method=method) == plan
        assert plan.status in ("OPTIMAL", "FEASIBLE")
        assert (plan.gap is None) == isinstance(method, PathSearch)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("kind", ["size", "bops"])
def test_an_impossible_budget_names_the_smallest_possible_one(
    sensitivity, method, kind
) -> None:
    with pytest.raises(BudgetInfeasibleError) as caught:
        fc.search(sensitivity, fc.Budget(**{kind: 1}), method=method)
    smallest = caught.value.smallest
    assert f"at least {smallest} " in str(caught.value)
    assert "To fix it" in str(caught.value)
    plan = fc.search(sensitivity, fc.Budget(**{kind: smallest}), method=method)
    assert (plan.size_bytes if kind == "size" else plan.bops) == smallest
    with pytest.raises(BudgetInfeasibleError) as again:
        fc.search(sensitivity, fc.Budget(**{kind: smallest - 1}), method=method)
    assert again.value.smallest == smallest


def test_families_are_kept_apart(sensitivity) -> None:
    budget = fc.Budget(size="60%")
    for family in ("step", "bits"):
        plan = fc.search(sensitivity, budget, family=family)
        assert {x.grid.family for x in plan.levels.values()} == {family}
    either = fc.search(sensitivity, budget, family="any", method=FISHER)
    for family in ("step", "bits"):
        alone = fc.search(sensitivity, budget, family=family, method=FISHER)
        assert either.details["lower_bound"] <= alone.details["lower_bound"] * (
            1 + 1e-12
        )


def test_wrong_combinations_are_typed_errors(sensitivity) -> None:
    table = random_table(2)
    with pytest.raises(FitcompressError, match="no grid of family 'bits'"):
        fc.search(table, fc.Budget(bops="50%"))
    with pytest.raises(FitcompressError, match="one family"):
        fc.search(sensitivity, fc.Budget(size="90%"), family="any", method=PathSearch())


def test_a_path_that_gives_up_is_a_typed_error(sensitivity) -> None:
    impatient = PathSearch(max_expansions=3)
    with pytest.raises(FitcompressError, match="3 expansions"):
        fc.search(sensitivity, fc.Budget(size=900), method=impatient)


@pytest.mark.parametrize("family", ["step", "bits"])
@pytest.mark.parametrize("kind", ["size", "bops"])
def test_the_front_rises_from_the_cheapest_plan_to_the_best(
    sensitivity, kind, family
) -> None:
    plans = fc.pareto(sensitivity, kind=kind, family=family, method=FISHER)
    cost = [p.size_bytes if kind == "size" else p.bops for p in plans]
    assert cost == sorted(cost)
    loss = [p.distortion for p in plans]
    assert all(a > b for a, b in itertools.pairwise(loss))
    assert len(plans) > 5
    if (kind, family) == ("bops", "step"):  # what a code takes is not known before
        with pytest.raises(OptionError, match="no fixed number of bits"):
            fc.search(sensitivity, fc.Budget(bops="50%"), family=family)
    else:
        with pytest.raises(BudgetInfeasibleError) as caught:
            fc.search(sensitivity, fc.Budget(**{kind: 1}), family=family)
        assert cost[0] == caught.value.smallest
    few = fc.pareto(sensitivity, kind=kind, family=family, method=FISHER, points=4)
    assert [few[0], few[-1]] == [plans[0], plans[-1]]
    assert len(few) == 4


def test_plans_of_the_front_bound_no_file(sensitivity) -> None:
    # Otherwise `apply` would scale the steps of each until the file has ten times the
    # bytes of the dense model.
    assert {p.limit_bytes for p in fc.pareto(sensitivity)} == {None}


def test_the_front_of_a_model_that_is_mostly_overhead() -> None:
    table = random_table(2, overhead_bytes=10_000, dense_bytes=80)
    assert len(fc.pareto(table)) > 1


@given(
    st.lists(st.tuples(st.integers(0, 60), st.floats(0, 1e6)), min_size=1, max_size=40)
)
def test_hull_is_convex_and_below_every_point(points) -> None:
    cost = np.array([c for c, _ in points])
    value = np.array([v for _, v in points])
    corners = lower_hull(cost, value)
    assert cost[corners[0]] == cost.min()
    assert value[corners[-1]] == value.min()
    x, y = cost[corners], value[corners]
    assert (np.diff(x) > 0).all()
    assert (np.diff(y) < 0).all()
    slopes = np.diff(y) / np.diff(x)
    assert (np.diff(slopes) >= -1e-9 * np.abs(slopes[1:])).all()
    below = np.interp(cost, x, y)
    assert (below <= value + 1e-9 * (1 + value)).all()


def test_the_front_bounds_every_plan() -> None:
    table = random_table(4, 3, 2, seed=11)
    steps = front(table.size_bits.reshape(4, -1), table.distortion.reshape(4, -1))
    for bits, distortion in every_plan(table):
        assert steps.bound(bits) <= distortion * (1 + 1e-12)


def test_a_problem_counts_in_bits_and_rounds_bytes_up() -> None:
    cost = np.array([[[17]]])
    table = make_table(cost, np.ones((1, 1, 1)))
    problem = make_problem(table, fc.Budget(size=13), None)
    assert problem.smallest() == 13  # 10 overhead, 17 bits
    assert problem.limit == 24
    with pytest.raises(BudgetInfeasibleError, match="got 12 bytes"):
        make_problem(table, fc.Budget(size=12), None)
