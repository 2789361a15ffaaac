"""The Lagrangian method: the best plan of the convex front, filled up to the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fitcompress.search.hull import front
from fitcompress.search.objective import Objective
from fitcompress.search.problem import Choice, Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Lagrangian"]


@dataclass(frozen=True)
class Lagrangian(Objective):
    """Minimise the objective layer by layer at one exchange rate, then fill up.

    minimise Σ_l w_l D_l(k_l) + μ Σ_l c_l(k_l), with μ as small as the budget allows.
    What is left is spent on single layers, best gain per cost first. The relaxation's
    optimum is a lower bound, so the answer carries a proven gap. One budget, without
    rules; :class:`Optimal` does more and is never worse.
    """

    def solve(self, problem: Problem) -> Choice:
        """Return the chosen cell of every layer."""
        problem.check_plain("Lagrangian()")
        layers, _, sparsities = problem.cost.shape
        cost = problem.cost.reshape(layers, -1)
        value = self.values(problem).reshape(layers, -1)
        steps = front(cost, value)
        step = int(np.searchsorted(steps.cost, problem.limit, side="right")) - 1
        chosen = fill(steps.choice(step), cost, value, problem.limit)
        rows = np.arange(layers)
        objective = float(value[rows, chosen].sum())
        bound = min(steps.bound(problem.limit), objective)
        gap = (objective - bound) / objective if objective > 0 else 0.0
        return Choice(
            grid=chosen // sparsities,
            sparsity=chosen % sparsities,
            method="lagrangian",
            status="OPTIMAL" if gap <= 1e-12 else "FEASIBLE",
            gap=gap,
            details={"objective": objective, "lower_bound": bound},
        )


def fill(
    chosen: NDArray[np.int64],
    cost: NDArray[np.int64],
    value: NDArray[np.float64],
    limit: int,
) -> NDArray[np.int64]:
    """Improve single layers, best gain per cost first, while the budget holds.

    Args:
        chosen: Cell of every layer, within the budget, [L].
        cost: [L, K].
        value: [L, K].
        limit: Bound on the total cost.

    Returns:
        The improved cells; a new array.
    """
    chosen = chosen.copy()
    rows = np.arange(len(cost))
    left = limit - int(cost[rows, chosen].sum())
    while True:
        extra = cost - cost[rows, chosen][:, None]
        gain = value[rows, chosen][:, None] - value
        usable = (extra <= left) & (gain > 0)
        if not usable.any():
            return chosen
        rate = np.where(usable, gain / np.maximum(extra, 1), -np.inf)
        best = int(rate.argmax())
        layer, cell = divmod(best, cost.shape[1])
        left -= int(extra[layer, cell])
        chosen[layer] = cell
