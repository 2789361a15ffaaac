"""FITCompress: the shortest path through compression space, with a static metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from fitcompress import _core
from fitcompress.errors import OptionError, SearchLimitError
from fitcompress.search.problem import Choice, Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
        max_expansions: Where to give up.
    """

    mode: Literal["greedy", "beam", "best_first"] = "beam"
    lam: float = 1.0
    beam_width: int = 64
    max_expansions: int = 200_000

    def solve(self, problem: Problem) -> Choice:
        """Return the chosen cell of every layer.

        Raises:
            OptionError: The problem mixes steps and bits.
            SearchLimitError: ``max_expansions`` did not suffice.
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
        )
        if answer["status"] != "reached":
            raise SearchLimitError(
                f"the path search ended after {answer['expansions']} expansions",
                got=f"cost {answer['cost']}",
                wanted=f"at most {problem.limit}",
                fix="raise max_expansions, or use mode='greedy' or a larger lam",
            )
        grid = np.asarray(answer["grids"], dtype=np.int64)
        return Choice(
            grid=grid,
            sparsity=np.full_like(grid, answer["sparsity"]),
            method=f"path ({self.mode})",
            status="FEASIBLE",
            gap=None,
            details={
                "length": answer["length"],
                "expansions": answer["expansions"],
                "lam": self.lam,
            },
        )
