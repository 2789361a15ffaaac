"""FITCompress: a short path through compression space."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fitcompress import _core
from fitcompress.errors import OptionError, SearchLimitError
from fitcompress.progress import Bar
from fitcompress.search.problem import Choice, Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fitcompress.search.path_metric import PathMetric

__all__ = ["PathSearch"]


@dataclass(frozen=True)
class PathSearch:
    """Walk from the dense network to the budget along a short path.

    A node is one grid per layer and one sparsity for the network; a step makes one
    layer's grid coarser or raises the sparsity. f = g + λ h, where g sums the
    Riemannian lengths sqrt(Σ_j F_j (θ_j − θ'_j)²) of the steps and h = |α − α_goal|
    sqrt(Σ_j F_j θ_j²) is that of a straight shrink for the rest of the way (α: cost
    over that of float32). h is not admissible in general, so nothing is proven,
    whatever the mode. What is left of the budget at the end is spent on undoing steps.

    Zandonati et al. 2023, arXiv 2302.07612.

    Attributes:
        mode: ``"greedy"`` drops every other open node after each expansion, as the
            published script does; ``"beam"`` keeps ``beam_width``; ``"best_first"``
            all.
        lam: λ; 0 is uniform-cost search, large values head straight for the budget.
        beam_width: Open nodes kept by ``"beam"``.
        max_expansions: Where to give up. So does a search whose nodes take a gigabyte:
            three million expansions for 20 layers, half a million for 200. A plan that
            is known by then and within the budget is returned, with ``status``
            ``"limit"`` in its details; so it is after Ctrl-C, as ``"interrupted"``.
            From 20 layers on, ``best_first`` rarely ends within a limit unless λ is
            large.
        max_seconds: Where to give up, likewise, in seconds.
        metric: Where F is taken. ``"static"``: in the dense network, from the table. Or
            an object that measures it along the path, such as
            :class:`fitcompress.sensitivity.moving_metric.MovingMetric`; then steps are
            still undone by the table's distortion at the end.
        trace: Put all expanded nodes in order into the details of the plan, as
            ``"trace"``: arrays ``grids`` [N, L] and ``sparsity``, ``g``, ``f``,
            ``cost`` [N]; the last one is the node that was found. λ h is f − g.
        progress: Show expansions and the lowest cost after a second.
    """

    mode: Literal["greedy", "beam", "best_first"] = "beam"
    lam: float = 1.0
    beam_width: int = 64
    max_expansions: int = 200_000
    max_seconds: float = float("inf")
    metric: Literal["static"] | PathMetric = "static"
    trace: bool = False
    progress: bool = True

    def solve(self, problem: Problem) -> Choice:
        """Return the chosen cell of every layer.

        Raises:
            OptionError: The problem mixes steps and bits.
            SearchLimitError: No plan was found within the limits.
            KeyboardInterrupt: Ctrl-C came before a plan was known.
        """
        problem.check_plain("PathSearch()")
        table, grids = problem.sensitivity, problem.grids
        families = {table.grids[g].family for g in grids}
        if len(families) > 1:
            raise OptionError(
                "a path needs grids of one family",
                got=" and ".join(sorted(families)),
                wanted="step or bits",
                fix="search with family='step' or family='bits'",
            )
        if problem.activations.any():
            raise OptionError(
                "a path leads through grids and sparsities of weights only",
                got="activation bits to choose from",
                fix="search with activations=False, or with method=Lagrangian()",
            )

        def cells(array: NDArray[np.float64]) -> NDArray[np.float64]:
            kept = problem.cost.shape[2]
            return np.ascontiguousarray(array[:, grids, :kept])

        if problem.kind == "size":
            reference = 8 * table.dense_bytes
        else:
            reference = int(table.macs.sum()) * 32 * 32
        with Bar("search: nodes", None, enabled=self.progress) as bar:
            answer = _core.path_search(
                cells(table.grid_length),
                cells(table.prune_length),
                cells(table.norm),
                problem.distortion,
                problem.cost,
                start_length=float(np.sqrt(2 * problem.distortion[:, 0, 0].sum())),
                budget=problem.limit,
                reference_cost=reference,
                lam=self.lam,
                mode=self.mode,
                beam_width=self.beam_width,
                max_expansions=self.max_expansions,
                max_seconds=self.max_seconds,
                progress=_reporting(bar, problem.limit),
                metric=self._steps(problem),
                exact=self.metric != "static" and self.metric.exact,
                trace=self.trace,
            )
        if answer["cost"] > problem.limit:
            raise SearchLimitError(
                f"the path search ended after {answer['expansions']} expansions",
                got=f"cost {answer['cost']}",
                wanted=f"at most {problem.limit}",
                fix="raise the limits, or use mode='greedy' or a larger lam",
            )
        details: dict[str, Any] = {
            "length": answer["length"],
            "expansions": answer["expansions"],
            "lam": self.lam,
        }
        if answer["status"] != "reached":
            details["status"] = answer["status"]
        if self.trace:
            details["trace"] = answer["trace"]
        grid = np.asarray(answer["grids"], dtype=np.int64)
        return Choice(
            grid=grid,
            sparsity=np.full_like(grid, answer["sparsity"]),
            method=f"path ({self.mode})",
            status="FEASIBLE",
            gap=None,
            details=details,
        )

    def _steps(
        self, problem: Problem
    ) -> Callable[[NDArray[np.int64], int], tuple[Any, ...]] | None:
        """Return the metric in terms of the problem's grids."""
        metric = self.metric
        if metric == "static":
            return None
        return lambda grids, sparsity: metric.steps(problem.grids[grids], sparsity)


def _reporting(bar: Bar, limit: int) -> Callable[[int, int], None]:
    """Return what tells a bar how far a search is; what is left is not known."""
    start = time.monotonic()

    def report(expansions: int, cost: int) -> None:
        spent = time.monotonic() - start
        note = f"{spent:.0f} s, cost {cost} of {limit}"
        bar.advance(expansions - bar.done, note)

    return report
