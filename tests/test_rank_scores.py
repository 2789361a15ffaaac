"""The benchmark that compares sensitivities: its numbers on made-up ones."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import rank_scores


@pytest.fixture
def table():
    return np.random.default_rng(0).uniform(1, 2, (4, 5)).cumprod(1)


def test_a_perfect_sensitivity_ranks_perfectly(table) -> None:
    choices = np.random.default_rng(1).integers(0, 5, (30, 4))
    truth = 3 * np.array([rank_scores.predicted(table, c) for c in choices])
    found = [("right", table), ("wrong", 100 - table)]
    right, wrong = rank_scores.correlations(found, choices, truth)
    assert right["spearman"] == pytest.approx(1)
    assert right["interval"] == pytest.approx([1, 1])
    assert right["true_over_predicted"] == pytest.approx([3, 3, 3])
    assert wrong["spearman"] == pytest.approx(-1)


def test_the_right_sensitivity_chooses_the_best_plan(table) -> None:
    cost = np.array([10, 20, 30, 40])

    def true(choice) -> float:
        bits = np.array(rank_scores.BITS)[choice]
        assert (cost * bits).sum() <= 4 * cost.sum()
        return rank_scores.predicted(table, choice)

    found = [("right", table), ("other", table[::-1].copy())]
    chosen = rank_scores.decisions(found, cost, 4.0, true)
    assert chosen["right"] <= min(chosen["other"], chosen["uniform"])
    assert "uniform" not in rank_scores.decisions(found, cost, 3.5, lambda _: 0.0)
