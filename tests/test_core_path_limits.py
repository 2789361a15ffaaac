"""How a path search ends before its end, and what it says on the way."""

import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

from fitcompress import _core
from fitcompress.search import path_reference as reference
from test_core_path import MODES, OPTIONS, check_consistent, same, solve, tables

ENDLESS = {"lam": 0.0, "mode": "best_first", "max_expansions": 2**31 - 1}


def late_goal() -> dict[str, Any]:
    """30 layers, of which the last one alone can meet the budget, by a long step."""
    t = tables(30, 9, 3)
    t["cost"][-1, :, :] = 10**9
    t["cost"][-1, 1:, :] = 1
    t["grid_length"][-1, 0, :] = 1e4
    return t


def test_the_limit_of_time() -> None:
    start = time.monotonic()
    answer = solve(tables(30, 9, 3), 0.3, **ENDLESS, max_seconds=0.2)
    assert 0.1 < time.monotonic() - start < 20
    assert answer["status"] == "limit"
    assert answer["expansions"] > 1000
    check_consistent(tables(30, 9, 3), answer, 0.0)
    with pytest.raises(ValueError, match=r"max_seconds: got 0\.0"):
        solve(tables(2, 2, 2), 0.5, max_seconds=0.0)


def test_memory_is_bounded() -> None:
    # 3000 layers: 30 kB a node, so that a gigabyte are some 30000 of them.
    answer = solve(tables(3000, 2, 1), 0.8, **ENDLESS)
    assert answer["status"] == "limit"
    assert answer["expansions"] < 100_000


@pytest.mark.parametrize("mode", ["beam", "best_first"])
def test_a_limit_returns_the_plan_that_is_known(mode: str) -> None:
    t = late_goal()
    options = {**ENDLESS, "mode": mode, "budget": 10**8, "max_expansions": 50}
    answer = solve(t, 1.0, **options)
    assert answer["status"] == "limit"
    assert answer["cost"] <= 10**8
    assert answer["grids"].tolist() == [0] * 29 + [1]
    arguments = {**t, **OPTIONS, **options}
    assert same(answer, reference.path_search(**arguments))


@pytest.mark.usefixtures("interruptible")
def test_a_signal_returns_the_plan_that_is_known() -> None:
    thread = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    thread.start()
    answer = solve(late_goal(), 1.0, **ENDLESS, budget=10**8)
    thread.join()
    assert answer["status"] == "interrupted"
    assert answer["cost"] <= 10**8


def test_progress_is_told_ten_times_a_second_at_most() -> None:
    calls: list[tuple[int, int]] = []
    t = tables(30, 9, 3)
    solve(t, 0.3, **ENDLESS, max_seconds=0.8, progress=lambda *now: calls.append(now))
    assert 1 <= len(calls) <= 8
    assert sorted(calls) == calls
    assert all(cost <= t["cost"][:, 0, 0].sum() for _, cost in calls)


def test_an_error_in_progress_is_the_callers() -> None:
    def fail(expansions: int, cost: int) -> None:
        raise RuntimeError(expansions)

    with pytest.raises(RuntimeError):
        solve(tables(30, 9, 3), 0.3, **ENDLESS, progress=fail)


@pytest.mark.parametrize("mode", MODES)
def test_the_trace_has_every_node_in_order(mode: str) -> None:
    t = tables(5, 4, 3)
    answer = solve(t, 0.4, mode=mode, trace=True)
    trace = answer["trace"]
    assert len(trace["g"]) == answer["expansions"] + 1
    assert not trace["grids"][0].any()
    levels = np.column_stack([trace["grids"], trace["sparsity"]])
    assert len(np.unique(levels, axis=0)) == len(levels)  # none twice
    rows = np.arange(5)
    for grids, s, cost in zip(
        trace["grids"], trace["sparsity"], trace["cost"], strict=True
    ):
        assert t["cost"][rows, grids, s].sum() == cost
    assert (trace["f"] >= trace["g"]).all()
    assert "trace" not in solve(t, 0.4, mode=mode)


def test_more_levels_than_a_byte_counts() -> None:
    with pytest.raises(ValueError, match="at most 256 grids"):
        solve(tables(1, 257, 1), 0.5)
    assert solve(tables(2, 256, 1), 0.6)["status"] == "reached"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((1, 2), "got 2 values, wanted 5"),
        ((np.zeros(2), np.zeros(3), np.zeros(3), 0.0, 0.0), "grid_length is no array"),
        ((np.zeros(3), np.zeros(3), np.zeros(3), -1.0, 0.0), "negative"),
        ((np.zeros(3), np.full(3, np.nan), np.zeros(3), 0.0, 0.0), "not finite"),
    ],
)
def test_a_metric_that_answers_nonsense(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(tables(3, 3, 2), 0.5, metric=lambda grids, sparsity: answer)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exact", [False, True])
def test_a_metric_that_repeats_the_tables_gives_their_path(
    mode: str, exact: bool
) -> None:
    t = tables(4, 4, 3)
    rows = np.arange(4)

    def metric(grids: np.ndarray, s: int) -> tuple[Any, ...]:
        finer = np.minimum(grids + 1, 3)
        sparser = min(s + 1, 2)
        return (
            t["grid_length"][rows, grids, s],
            t["norm"][rows, grids, s],
            t["norm"][rows, finer, s],
            t["prune_length"][rows, grids, s].sum(),
            t["norm"][rows, grids, sparser].sum(),
        )

    arguments = {**t, **OPTIONS, "mode": mode, "budget": t["cost"][:, 0, 0].sum() // 3}
    static = _core.path_search(**arguments)
    moving = _core.path_search(**arguments, metric=metric, exact=exact)
    assert moving["grids"].tolist() == static["grids"].tolist()
    assert moving["sparsity"] == static["sparsity"]
    assert moving["expansions"] == static["expansions"]
