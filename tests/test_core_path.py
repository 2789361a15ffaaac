"""The path search of _core: shortest where it says so, exact in cost, repeatable."""

import heapq
import math
import signal
import threading
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitcompress import _core
from fitcompress.search import path_reference as reference

MODES = ("greedy", "beam", "best_first")
OPTIONS = {
    "start_length": 0.0,
    "lam": 1.0,
    "mode": "best_first",
    "beam_width": 8,
    "max_expansions": 100_000,
}


def tables(layers: int, grids: int, sparsities: int, seed: int = 0) -> dict[str, Any]:
    """Random tables whose cost falls with every grid and sparsity, as real ones do."""
    rng = np.random.default_rng(seed)
    shape = layers, grids, sparsities
    weights = rng.integers(10, 1000, (layers, 1, 1))
    bits = np.arange(2 * grids, grids, -1).reshape(1, -1, 1)
    kept = np.linspace(100, 40, sparsities).astype(np.int64).reshape(1, 1, -1)
    cost = weights * bits * kept
    coarse = np.arange(grids).reshape(1, -1, 1) + np.arange(sparsities)
    return {
        "grid_length": rng.exponential(size=shape),
        "prune_length": rng.exponential(size=shape),
        "norm": rng.exponential(size=shape) + 1,
        "distortion": rng.exponential(size=shape) * 0.1 + coarse,
        "cost": np.ascontiguousarray(cost),
        "reference_cost": int(cost[:, 0, 0].sum()) * 2,
    }


def solve(given_tables: dict[str, Any], share: float, **options: Any) -> dict[str, Any]:
    """Search for a share of the cost at the start."""
    cost = given_tables["cost"]
    budget = int(cost[:, 0, 0].sum() * share)
    return _core.path_search(**{**given_tables, **OPTIONS, "budget": budget, **options})


def check_consistent(t: dict[str, Any], answer: dict[str, Any], start: float) -> None:
    """The moves lead to the levels, their lengths sum up, the sums are those there."""
    layers, grids, sparsities = t["cost"].shape
    level, s, length = [0] * layers, 0, start
    for layer, index in answer["moves"]:
        if layer < 0:
            assert index == s + 1 < sparsities
            length += math.sqrt(t["prune_length"][range(layers), level, s].sum())
            s = index
        else:
            assert index == level[layer] + 1 < grids
            length += math.sqrt(t["grid_length"][layer, level[layer], s])
            level[layer] = index
    assert answer["grids"].tolist() == level
    assert answer["grids"].dtype == np.int64
    assert answer["sparsity"] == s
    assert answer["length"] == pytest.approx(length, rel=1e-12)
    assert answer["cost"] == int(t["cost"][range(layers), level, s].sum())
    at_end = t["distortion"][range(layers), level, s].sum()
    assert answer["distortion"] == pytest.approx(at_end, rel=1e-12)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Equal to the last bit."""
    return all(np.array_equal(a[key], b[key]) for key in a.keys() | b.keys())


def shortest_by_dijkstra(t: dict[str, Any], budget: int) -> float:
    """Length of the shortest way to any levels within the budget."""
    layers, grids, sparsities = t["cost"].shape
    row = np.arange(layers)
    ways = [(0.0, (0,) * layers, 0)]
    done = set()
    while ways:
        length, level, s = heapq.heappop(ways)
        if (level, s) in done:
            continue
        done.add((level, s))
        if t["cost"][row, level, s].sum() <= budget:
            return length
        for i in range(layers):
            if level[i] + 1 < grids:
                step = math.sqrt(t["grid_length"][i, level[i], s])
                after = (*level[:i], level[i] + 1, *level[i + 1 :])
                heapq.heappush(ways, (length + step, after, s))
        if s + 1 < sparsities:
            step = math.sqrt(t["prune_length"][row, level, s].sum())
            heapq.heappush(ways, (length + step, level, s + 1))
    return math.inf


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    st.integers(0, 10_000),
    st.floats(0.1, 1.1),
    st.sampled_from([0.0, 0.3, 1.0, 10.0]),
    st.sampled_from(MODES),
    st.integers(1, 5),
    st.sampled_from([1, 3, 100_000]),
)
def test_equals_the_python_twin(
    shape: tuple[int, int, int],
    seed: int,
    share: float,
    lam: float,
    mode: str,
    beam_width: int,
    max_expansions: int,
) -> None:
    t = tables(*shape, seed=seed)
    arguments = {
        **t,
        "start_length": 0.25,
        "budget": int(t["cost"][:, 0, 0].sum() * share),
        "lam": lam,
        "mode": mode,
        "beam_width": beam_width,
        "max_expansions": max_expansions,
    }
    answer = _core.path_search(**arguments)
    assert same(answer, reference.path_search(**arguments))
    check_consistent(t, answer, 0.25)
    if answer["status"] != "limit":  # which may have found a plan, too
        within = answer["cost"] <= arguments["budget"]
        assert within == (answer["status"] == "reached")


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.int64, (3, 3, 3), elements=st.integers(0, 5)),
    hnp.arrays(np.float64, (3, 3, 3), elements=st.sampled_from([0.0, 0.25, 1.0])),
    st.integers(0, 15),
    st.sampled_from(MODES),
)
def test_equals_the_python_twin_on_ties_and_rising_costs(
    cost: np.ndarray, values: np.ndarray, budget: int, mode: str
) -> None:
    t = {
        "grid_length": values,
        "prune_length": values[::-1].copy(),
        "norm": values[:, ::-1].copy(),
        "distortion": values[:, :, ::-1].copy(),
        "cost": cost,
        "reference_cost": 20,
    }
    arguments = {**t, **OPTIONS, "budget": budget, "mode": mode, "beam_width": 2}
    answer = _core.path_search(**arguments)
    assert same(answer, reference.path_search(**arguments))
    check_consistent(t, answer, 0.0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_uniform_cost_search_finds_the_shortest_path(seed: int, share: float) -> None:
    t = tables(4, 3, 3, seed)
    t["distortion"][:] = 1.0  # nothing to gain from undoing: the path stays as found
    answer = solve(t, share, lam=0.0)
    budget = int(t["cost"][:, 0, 0].sum() * share)
    assert answer["status"] == "reached"
    assert answer["length"] == pytest.approx(shortest_by_dijkstra(t, budget), rel=1e-12)


def test_a_path_by_hand() -> None:
    # Two layers, grids of 8 and 4 bits for 10 and 20 weights, no pruning. Budget 200 of
    # 240 bits: layer 0 saves 40 for length 3, layer 1 saves 80 for length 2.
    column = np.array([[8, 4]]).T[None] * np.array([10, 20]).reshape(2, 1, 1)
    t = {
        "grid_length": np.array([[9.0, 0.0], [4.0, 0.0]]).reshape(2, 2, 1),
        "prune_length": np.zeros((2, 2, 1)),
        "norm": np.ones((2, 2, 1)),
        "distortion": np.array([[0.0, 0.5], [0.0, 0.25]]).reshape(2, 2, 1),
        "cost": np.ascontiguousarray(column, dtype=np.int64),
        "reference_cost": 30 * 32,
    }
    answer = _core.path_search(**t, **{**OPTIONS, "start_length": 0.5}, budget=200)
    assert answer["moves"] == [(1, 1)]
    assert answer["grids"].tolist() == [0, 1]
    assert answer["length"] == 2.5
    assert answer["cost"] == 160
    assert answer["distortion"] == 0.25
    assert answer["status"] == "reached"


def test_returns_the_best_goal_not_the_first_generated() -> None:
    # Both single moves meet the budget; that of layer 0 is generated first, and longer.
    t = tables(2, 2, 1)
    t["grid_length"][:, 0, 0] = [100.0, 1.0]
    t["cost"][:, :, 0] = [[10, 5], [10, 5]]
    for mode in MODES:
        answer = solve(t, 0.75, mode=mode)
        assert answer["moves"] == [(1, 1)]


def test_starts_from_the_finest_levels() -> None:
    t = tables(5, 4, 3)
    answer = solve(t, 1.0)
    assert answer["moves"] == []
    assert answer["expansions"] == 0
    assert answer["status"] == "reached"
    assert answer["length"] == 0.0


def test_undoes_a_step_that_the_budget_does_not_need() -> None:
    # The cheap step of layer 0 comes first, but only that of layer 1 meets the budget:
    # then the first one is undone, and the path no longer contains it.
    t = tables(2, 2, 1)
    t["grid_length"][:, 0, 0] = [1.0, 4.0]
    t["distortion"][:, :, 0] = [[0.0, 1.0], [0.0, 1.0]]
    t["cost"][:, :, 0] = [[10, 9], [100, 50]]
    answer = solve(t, 1.0, budget=60, mode="greedy", lam=0.0)
    assert answer["moves"] == [(1, 1)]
    assert answer["length"] == 2.0
    assert answer["cost"] == 60


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(5))
def test_spends_the_budget_and_never_more(mode: str, seed: int) -> None:
    t = tables(6, 4, 3, seed)
    rows = np.arange(6)
    for share in (0.25, 0.4, 0.6, 0.9):
        budget = int(t["cost"][:, 0, 0].sum() * share)
        answer = solve(t, share, mode=mode)
        assert answer["status"] == "reached"
        assert answer["cost"] <= budget
        # No step can be undone any more: it would not fit, or would gain nothing.
        grids, s = answer["grids"], answer["sparsity"]
        for layer in range(6):
            if grids[layer] == 0:
                continue
            finer = grids.copy()
            finer[layer] -= 1
            gain = answer["distortion"] - t["distortion"][rows, finer, s].sum()
            assert t["cost"][rows, finer, s].sum() > budget or gain <= 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_an_impossible_budget_names_the_smallest_cost(mode: str) -> None:
    t = tables(5, 4, 3)
    smallest = int(t["cost"][:, -1, -1].sum())
    arguments = {**t, **OPTIONS, "mode": mode}
    answer = _core.path_search(**{**arguments, "budget": smallest - 1})
    assert answer["status"] == "exhausted"
    assert answer["cost"] == smallest
    assert answer["expansions"] == 0
    check_consistent(t, answer, 0.0)
    answer = _core.path_search(**{**arguments, "budget": smallest})
    assert answer["status"] == "reached"
    assert answer["grids"].tolist() == [3] * 5
    assert answer["sparsity"] == 2


def test_the_limit_of_expansions() -> None:
    t = tables(6, 4, 3)
    answer = solve(t, 0.3, lam=0.0, max_expansions=10)
    assert answer["status"] == "limit"
    assert answer["expansions"] == 10
    check_consistent(t, answer, 0.0)


def test_a_wide_beam_is_best_first_and_a_narrow_one_finds_a_goal() -> None:
    t = tables(4, 4, 3)
    full = solve(t, 0.4)
    wide = solve(t, 0.4, mode="beam", beam_width=10**6)
    assert same(full, wide)
    assert solve(t, 0.4, mode="beam", beam_width=1)["status"] == "reached"


def test_costs_are_exact_where_floats_are_not() -> None:
    # 2^53 + 1 is no float: rounded, it would pass for 2^53.
    t = tables(1, 2, 1)
    t["cost"][0, :, 0] = [2**53 + 1, 7]
    answer = _core.path_search(**{**t, **OPTIONS, "budget": 2**53})
    assert answer["cost"] == 7
    answer = _core.path_search(**{**t, **OPTIONS, "budget": 2**53 + 1})
    assert answer["cost"] == 2**53 + 1


def test_the_same_answer_every_time_and_in_threads() -> None:
    t = tables(12, 6, 4)
    answers = [solve(t, 0.35, mode="beam")]
    threads = [
        threading.Thread(target=lambda: answers.append(solve(t, 0.35, mode="beam")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 5
    assert all(same(answers[0], other) for other in answers)


def test_permuted_layers_give_the_permuted_answer() -> None:
    t = tables(5, 3, 2, seed=3)
    order = np.array([3, 0, 4, 1, 2])
    permuted = {
        key: np.ascontiguousarray(value[order]) if key != "reference_cost" else value
        for key, value in t.items()
    }
    a, b = solve(t, 0.5), solve(permuted, 0.5)
    assert a["grids"][order].tolist() == b["grids"].tolist()
    assert a["sparsity"] == b["sparsity"]


@pytest.mark.usefixtures("interruptible")
def test_a_signal_stops_the_search() -> None:
    # A wide beam over 9^30 nodes that does not end by itself.
    t = tables(30, 9, 3)
    thread = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        solve(t, 0.3, lam=0.0, mode="beam", beam_width=10**6, max_expansions=2**31 - 1)
    thread.join()


@pytest.mark.parametrize("name", ["grid_length", "prune_length", "norm", "distortion"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_values_that_no_table_holds(name: str, value: float) -> None:
    t = tables(3, 3, 2)
    t[name][1, 2, 0] = value
    if name == "distortion" and value == -1.0:
        assert solve(t, 0.5)["status"] == "reached"
        return
    with pytest.raises(ValueError, match=rf"{name}\[1, 2, 0\]: got -?(nan|inf|1\.0)"):
        solve(t, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start_length": math.nan}, "start_length: got nan"),
        ({"start_length": -1.0}, r"start_length: got -1\.0"),
        ({"lam": -0.5}, r"lam: got -0\.5"),
        ({"lam": math.inf}, "lam: got inf"),
        ({"budget": -1}, "budget: got -1"),
        ({"reference_cost": 0}, "reference_cost: got 0"),
        ({"beam_width": 0}, "beam_width: got 0"),
        ({"max_expansions": 0}, "max_expansions: got 0"),
        ({"max_expansions": 2**31}, "max_expansions: got 2147483648"),
        ({"mode": "best"}, "mode: got 'best'"),
    ],
)
def test_options_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(tables(2, 2, 2), 0.5, **change)


@pytest.mark.parametrize("value", [-1, 2**62])
def test_costs_out_of_range(value: int) -> None:
    t = tables(3, 2, 2)
    t["cost"][2, 0, 1] = value
    with pytest.raises(ValueError, match=rf"cost\[2, 0, 1\]: got {value}"):
        solve(t, 0.5)


@pytest.mark.parametrize(
    "name", ["grid_length", "prune_length", "norm", "distortion", "cost"]
)
def test_shapes_and_dtypes(name: str) -> None:
    t = tables(3, 2, 2)
    for axes in ((0,), (0, 1)):
        with pytest.raises(ValueError, match="got shape"):
            solve(tables(3, 2, 2), 0.5, **{name: t[name].sum(axis=axes)})
    with pytest.raises(TypeError, match=f"{name}: got dtype float32"):
        solve(tables(3, 2, 2), 0.5, **{name: t[name].astype(np.float32)})
    if name != "grid_length":
        with pytest.raises(ValueError, match=r"got shape \(2, 2, 2\), wanted \(3, 2"):
            solve(tables(3, 2, 2), 0.5, **{name: t[name][:2]})


@pytest.mark.parametrize("shape", [(0, 2, 2), (2, 0, 2), (2, 2, 0)])
def test_empty_tables(shape: tuple[int, int, int]) -> None:
    names = ("grid_length", "prune_length", "norm", "distortion")
    empty = {name: np.zeros(shape) for name in names}
    arguments = {**OPTIONS, "budget": 1, "reference_cost": 1}
    with pytest.raises(ValueError, match="wanted at least one layer"):
        _core.path_search(**empty, cost=np.zeros(shape, np.int64), **arguments)
