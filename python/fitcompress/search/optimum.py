"""The multiple-choice knapsack, solved with a proof of how good the answer is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from fitcompress import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

__all__ = ["ROUNDING", "Solution", "solve"]

ROUNDING = 1e-9
"""A smaller relative gap is one of floating-point sums: the answer is optimal."""


@dataclass(frozen=True)
class Solution:
    """A choice, and what is proven about it.

    Attributes:
        choice: Level of every layer, int64 [L]; empty if infeasible or none is known.
        objective: Σ_l value[l, choice_l], correctly rounded; infinity without a choice.
        bound: No choice within the limits has a lower objective.
        gap: (objective − bound) / |objective|.
        status: ``"OPTIMAL"``: the gap is one of rounding. ``"FEASIBLE"``: within the
            limits, better ones may exist. ``"INFEASIBLE"``: proven that nothing is.
            ``"UNKNOWN"``: stopped before any was found.
        stopped: ``""``, ``"time"``, ``"interrupted"`` by Ctrl-C or ``"memory"``.
        nodes: Nodes of the search tree, or states of the dynamic program.
    """

    choice: NDArray[np.int64]
    objective: float
    bound: float
    gap: float
    status: Literal["OPTIMAL", "FEASIBLE", "INFEASIBLE", "UNKNOWN"]
    stopped: Literal["", "time", "interrupted", "memory"]
    nodes: int


def solve(
    cost: ArrayLike,
    value: ArrayLike,
    limits: Sequence[int] | NDArray[np.int64],
    *,
    gap: float = 0.0,
    time_limit: float = math.inf,
    progress: Callable[[float, float], None] | None = None,
) -> Solution:
    """Choose one level for every layer, at the least value within all limits.

    minimise Σ_l value[l, k_l] subject to Σ_l cost[m, l, k_l] ≤ limits[m] for every m.

    Costs are integers, so limits are kept exactly. Branch and bound on Lagrangian
    bounds, the best multipliers found by Dantzig and Wolfe's decomposition; with one
    limit, where that takes too many nodes, dynamic programming from the linear
    relaxation outwards (after Pisinger, EJOR 83, 1995). The answer depends neither on
    the order of the layers nor on threads; among equally good ones, which it is is
    fixed. Ctrl-C ends the search with the best choice so far.

    Args:
        cost: Integers ≥ 0, [M, L, K], M from 1 to 3; sums below 2⁶¹.
        value: [L, K], at most 1e200 in magnitude; +inf for levels that may not be used.
        limits: M integers.
        gap: Relative gap to stop at; 0 for an optimal choice.
        time_limit: Seconds to stop after.
        progress: Called with the best objective so far and the bound, at most thirty
            times a second.

    Raises:
        TypeError: Costs or limits are not integers.
        ValueError: Shapes or numbers do not fit.

    Example:
        >>> solve([[[1, 2, 4], [1, 2, 4]]], [[5, 3, 0], [4, 2, 0]], [5]).choice.tolist()
        [2, 0]
    """
    costs, bounds = _integers(cost, "cost"), _integers(limits, "limits")
    values = np.ascontiguousarray(value, dtype=np.float64)
    if not gap < math.inf:
        msg = f"gap: got {gap}, wanted a finite number ≥ 0"
        raise ValueError(msg)
    reachable = np.clip(bounds, 0, 2**61)
    # A limit below 0 is out of reach of any cost, but the arguments are checked first.
    seconds = 0.0 if (bounds < 0).any() else time_limit
    answer = _core.knapsack(costs, values, reachable, gap, seconds, progress)
    if answer["status"] == "infeasible" or (bounds < 0).any():
        return _infeasible()
    stopped: Literal["", "time", "interrupted", "memory"] = ""
    if answer["status"] == "stopped":
        stopped = "interrupted" if answer["interrupted"] else "memory"
        if answer["timed_out"]:
            stopped = "time"
    choice = answer["choice"]
    if not len(choice):
        nodes = answer["nodes"]
        return Solution(
            choice, math.inf, answer["bound"], math.inf, "UNKNOWN", stopped, nodes
        )
    chosen = values[np.arange(len(choice)), choice]
    objective = math.fsum(chosen)
    bound = min(answer["bound"], objective)
    gap = 0.0
    if objective - bound > ROUNDING * float(np.abs(chosen).sum()):
        gap = (objective - bound) / abs(objective) if objective else math.inf
    return Solution(
        choice=choice,
        objective=objective,
        bound=bound,
        gap=gap,
        status="OPTIMAL" if gap <= ROUNDING else "FEASIBLE",
        stopped=stopped,
        nodes=answer["nodes"],
    )


def _infeasible() -> Solution:
    none = np.zeros(0, dtype=np.int64)
    return Solution(none, math.inf, math.inf, math.inf, "INFEASIBLE", "", 0)


def _integers(values: ArrayLike, name: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.dtype == object and all(isinstance(x, int) for x in array.flat):
        msg = f"{name}: got numbers of more than 64 bits, wanted at most 2**63 - 1"
        raise ValueError(msg)
    if array.dtype.kind not in "iu":
        msg = f"{name}: got dtype {array.dtype}, wanted integers"
        raise TypeError(msg)
    if array.dtype.kind == "u" and array.size and int(array.max()) >= 2**63:
        msg = f"{name}: got {int(array.max())}, wanted at most 2**63 - 1"
        raise ValueError(msg)
    return np.ascontiguousarray(array, dtype=np.int64)
