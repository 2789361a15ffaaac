"""What one would try first: methods to compare with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fitcompress.errors import OptionError
from fitcompress.search.objective import Objective
from fitcompress.search.problem import Choice, Problem

__all__ = ["Greedy", "Uniform"]


@dataclass(frozen=True)
class Uniform(Objective):
    """Give all layers the same grid and sparsity: the best pair that fits.

    Nothing is proven. Rules must leave all layers a level in common.
    """

    def solve(self, problem: Problem) -> Choice:
        """Return the chosen cell of every layer.

        Raises:
            OptionError: The rules leave the layers no level in common.
            BudgetInfeasibleError: No level fits for all layers; names the smallest cost
                of those levels.
        """
        layers, _, sparsities = problem.cost.shape
        value = self.values(problem).reshape(layers, -1).sum(axis=0)
        costs = problem.costs.reshape(len(problem.limits), layers, -1).sum(axis=1)
        fits = problem.allowed.reshape(layers, -1).all(axis=0)
        if not fits.any():
            raise OptionError(
                "the rules leave no level that all layers may have",
                got=", ".join(repr(rule.pattern) for rule in problem.budget.rules),
                wanted="a level in common",
                fix="relax the rules, or search with method=Optimal()",
            )
        for budget, limit in enumerate(problem.limits):
            within = fits & (costs[budget] <= limit)
            if not within.any():
                least = problem.in_units(int(costs[budget][fits].min()), budget)
                raise problem.infeasible(budget, least, " with one level for all")
            fits = within
        cell = int(np.where(fits, value, np.inf).argmin())
        return Choice(
            grid=np.full(layers, cell // sparsities),
            sparsity=np.full(layers, cell % sparsities),
            method="uniform",
            status="FEASIBLE",
            gap=None,
        )


@dataclass(frozen=True)
class Greedy(Objective):
    """Start from the best levels; take what hurts least per cost until all bounds hold.

    In every step one layer (or group) gets the level that raises the objective least
    per share of the bounds that it frees. Nothing is proven, and nothing is undone.
    """

    def solve(self, problem: Problem) -> Choice:
        """Return the chosen cell of every layer.

        Raises:
            BudgetInfeasibleError: The walk ended before all bounds held.
        """
        sparsities = problem.cost.shape[2]
        flat = self.values(problem).reshape(len(problem.distortion), -1)
        value = np.stack([flat[list(g)].sum(axis=0) for g in problem.groups])
        value = np.where(problem.grouped_allowed(), value, np.inf)
        costs = problem.grouped_costs()
        limits = np.array(problem.limits)[:, None, None]
        rows = np.arange(len(value))
        chosen = value.argmin(axis=1)
        while True:
            now = costs[:, rows, chosen]
            total = now.sum(axis=1)[:, None, None]
            over = np.maximum(total - limits, 0) / np.maximum(limits, 1)
            if not over.any():
                break
            after = total - now[:, :, None] + costs
            left = (np.maximum(after - limits, 0) / np.maximum(limits, 1)).sum(axis=0)
            freed = over.sum() - left
            rise = value - value[rows, chosen][:, None]
            usable = (freed > 0) & np.isfinite(value)
            if not usable.any():
                worst = int(over.ravel().argmax())
                raise problem.infeasible(worst, problem.smallest(worst))
            rate = np.full_like(value, np.inf)
            rate[usable] = rise[usable] / freed[usable]
            layer, cell = divmod(int(rate.argmin()), value.shape[1])
            chosen[layer] = cell
        cells = np.empty(len(problem.distortion), dtype=np.int64)
        for group, cell in zip(problem.groups, chosen, strict=True):
            cells[list(group)] = cell
        return Choice(
            grid=cells // sparsities,
            sparsity=cells % sparsities,
            method="greedy",
            status="FEASIBLE",
            gap=None,
        )
