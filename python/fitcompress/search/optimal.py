"""``Optimal``: the best plan there is, with a proof."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fitcompress.errors import BudgetInfeasibleError, OptionError, SearchLimitError
from fitcompress.search.objective import Objective
from fitcompress.search.optimum import Solution, solve
from fitcompress.search.problem import Choice, Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["Optimal"]

SEVERAL = 1e-4


@dataclass(frozen=True)
class Optimal(Objective):
    """Solve the multiple-choice knapsack, whatever the budgets and rules.

    minimise Σ_l w_l D_l(k_l) subject to every bound, exactly in integers, by branch and
    bound: milliseconds for hundreds of layers. The plan carries status, bound and
    gap.

    Attributes:
        gap: Relative gap to stop at. None: 0 for one bound, 1e-4 for several.
        time_limit: Seconds to stop after, with the best plan so far and its gap.
        progress: Called with the best objective so far and the bound, if it takes long.
    """

    gap: float | None = None
    time_limit: float = 60.0
    progress: Callable[[float, float], None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gap is not None and not 0 <= self.gap < math.inf:
            msg = f"gap must be at least 0; got {self.gap}"
            raise ValueError(msg)
        if not self.time_limit >= 0:
            msg = f"time_limit must be at least 0 seconds; got {self.time_limit}"
            raise ValueError(msg)

    def solve(self, problem: Problem) -> Choice:
        """Return the chosen cell of every layer.

        Warns:
            RuntimeWarning: Ctrl-C ended the search; the plan is the best so far.

        Raises:
            BudgetInfeasibleError: No plan meets all bounds; names what one of them
                could be beside the others.
            SearchLimitError: Nothing was found within the time limit.
            KeyboardInterrupt: Ctrl-C before any plan was found.
        """
        begin = time.monotonic()
        cells = self.values(problem).reshape(len(problem.distortion), -1)
        value = np.stack([cells[list(g)].sum(axis=0) for g in problem.groups])
        value = np.where(problem.grouped_allowed(), value, np.inf)
        gap = self.gap
        if gap is None:
            gap = SEVERAL if len(problem.limits) > 1 else 0.0
        answer = solve(
            problem.grouped_costs(),
            value,
            problem.limits,
            gap=gap,
            time_limit=self.time_limit,
            progress=self.progress,
        )
        if answer.status == "INFEASIBLE":
            left = max(self.time_limit - (time.monotonic() - begin), 0.0)
            raise _out_of_reach(problem, value, left)
        if answer.status == "UNKNOWN":
            raise self._nothing_found(answer, problem)
        if answer.stopped == "interrupted":
            warnings.warn(
                f"the search was interrupted; its best plan so far has a gap of "
                f"{100 * answer.gap:.2g} %",
                RuntimeWarning,
                stacklevel=2,
            )
        chosen = np.empty(len(problem.distortion), dtype=np.int64)
        for group, level in zip(problem.groups, answer.choice, strict=True):
            chosen[list(group)] = level
        details: dict[str, Any] = {
            "objective": answer.objective,
            "lower_bound": answer.bound,
            "nodes": answer.nodes,
        }
        if answer.stopped:
            details["stopped"] = answer.stopped
        sparsities = problem.cost.shape[2]
        return Choice(
            grid=chosen // sparsities,
            sparsity=chosen % sparsities,
            method="optimal",
            status=answer.status,
            gap=answer.gap,
            details=details,
        )

    def _nothing_found(self, answer: Solution, problem: Problem) -> BaseException:
        if answer.stopped == "interrupted":
            return KeyboardInterrupt()
        return SearchLimitError(
            "no plan was found in time",
            got=f"{self.time_limit:g} seconds",
            wanted=str(problem.budget),
            fix="raise time_limit or the budget",
        )


def _out_of_reach(
    problem: Problem, value: NDArray[np.float64], seconds: float
) -> BudgetInfeasibleError | OptionError:
    """Return the error that says how small one bound can be beside the others."""
    costs = problem.grouped_costs()
    for budget in range(len(problem.limits)):
        others = [m for m in range(len(problem.limits)) if m != budget]
        # Costs as the objective: float64 holds them exactly below 2⁵³.
        target = np.where(np.isfinite(value), costs[budget].astype(np.float64), np.inf)
        limits = [problem.limits[m] for m in others]
        least = solve(costs[others], target, limits, time_limit=seconds)
        if least.stopped == "interrupted":
            raise KeyboardInterrupt
        if not len(least.choice):
            continue
        total = int(costs[budget, np.arange(len(least.choice)), least.choice].sum())
        beside = " beside the other bounds"
        if least.status != "OPTIMAL":
            beside += ", as far as is known"
        return problem.infeasible(budget, problem.in_units(total, budget), beside)
    return problem.infeasible(0, problem.smallest(0), " on its own")
