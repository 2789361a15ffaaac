"""Solvers that are compared with ours: on tiny problems all find what is best."""

import importlib.util
import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import search_instances
import search_peers

SCRIPT = Path(search_peers.__file__).with_name("search.py")


@pytest.fixture(autouse=True)
def ctrl_c():
    """Some solvers leave the default handler behind, which ends the process."""
    yield
    signal.signal(signal.SIGINT, signal.getsignal(signal.SIGINT))


def made(name):
    try:
        return search_peers.PEERS[name]()
    except ImportError as error:
        pytest.skip(str(error))


def tiny(seed, budgets):
    """3 layers of 5 levels; values over three orders of magnitude."""
    random = np.random.default_rng(seed)
    cost = random.integers(1, 100, (budgets, 3, 5))
    value = 10 ** random.uniform(-2, 1, (3, 5))
    limits = tuple(int(each.min(1).sum() + 60) for each in cost)
    return search_instances.Instance("tiny", cost, value, limits, 1.0)


def best(instance):
    """The least objective of all plans, infinite if none meets the limits."""
    plans = map(np.array, itertools.product(range(5), repeat=3))
    return min(
        (
            instance.objective(plan)
            for plan in plans
            if all(np.less_equal(instance.spent(plan), instance.limits))
        ),
        default=np.inf,
    )


@pytest.mark.parametrize("budgets", [1, 2])
@pytest.mark.parametrize("name", search_peers.PEERS)
def test_all_find_the_optimum(name, budgets):
    solver = made(name)
    for seed in range(5):
        instance = tiny(seed, budgets)
        wanted = best(instance)
        found = search_peers.measure(solver, instance, 0.0, 10.0, shortest=0.0)
        assert found.finished
        assert found.objective == pytest.approx(wanted, rel=1e-9)
        if np.isfinite(wanted):
            assert found.gap < 1e-5
            assert found.overrun == 0


@pytest.mark.parametrize("name", search_peers.PEERS)
def test_impossible_limits(name):
    instance = tiny(0, 1)
    limits = (int(instance.cost[0].min(1).sum()) - 1,)
    instance = search_instances.Instance(
        "tiny", instance.cost, instance.value, limits, 1.0
    )
    answer = made(name).solve(instance, 0.0, 10.0)
    assert answer.choice is None
    assert answer.finished


def test_overruns_are_counted_in_integers():
    class Wrong:
        def solve(self, instance, gap, limit):
            return search_peers.Answer(np.array([1, 1]), 1.0, finished=True)

    huge = 2**53
    cost = np.array([[[0, huge], [0, 1]]])
    instance = search_instances.Instance("x", cost, np.ones((2, 2)), (huge,), 1.0)
    found = search_peers.measure(Wrong(), instance, 0.0, 1.0, shortest=0.0)
    assert found.overrun > 0
    assert found.gap == 0.5


@pytest.mark.parametrize("budgets", [1, 2])
def test_generated_instances_can_be_met(budgets):
    for fraction in (0.1, 0.6):
        instance = search_instances.generated(4, budgets, fraction, 3)
        again = search_instances.generated(4, budgets, fraction, 3)
        assert instance.cost.shape == (budgets, 4, 96)
        assert instance.cost.dtype == np.int64
        assert (instance.cost == again.cost).all()
        assert (instance.value == again.value).all()
        assert all(
            each.min(1).sum() < limit < each.max(1).sum()
            for each, limit in zip(instance.cost, instance.limits, strict=True)
        )
        assert instance.value.min(1).sum() < instance.reference


@pytest.mark.skipif(not importlib.util.find_spec("scipy"), reason="needs scipy")
def test_script_writes_rows_and_what_is_skipped(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--json", str(path), "--peers", "highs"]
    command += ["--layers", "4", "--seeds", "2", "--budgets", "1", "2"]
    environment = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    found = json.loads(path.read_text())
    assert found["finished"]
    rows = [row for row in found["rows"] if row["solver"] == "highs"]
    assert [(row["budgets"], row["layers"]) for row in rows] == [(1, 4), (2, 4)]
    assert all(row["instances"] == 2 for row in rows)
    assert all(row["gap"] <= 1e-4 for row in rows)
