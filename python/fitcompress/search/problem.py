"""The table that a search method works on: L layers, each with its own choices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fitcompress.errors import BudgetInfeasibleError, OptionError
from fitcompress.search.plan import Level, Plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fitcompress.search.budget import Budget
    from fitcompress.sensitivity.table import Sensitivity

__all__ = ["Choice", "Family", "Problem", "make_problem"]

Family = Literal["step", "bits", "any"]


@dataclass(frozen=True)
class Problem:
    """Minimise Σ_l D_l(k_l) subject to Σ_l c_l(k_l) ≤ limit.

    Attributes:
        sensitivity: Where the numbers come from.
        kind: The bounded cost, ``"size"`` or ``"bops"``.
        limit: The bound on the sum of ``cost``, in bits or bit operations.
        overhead: What every plan costs besides, in the same unit; taken off ``limit``.
        grids: Indices of the grids that may be used, [G']; each as often as there are
            activation bits to go with it.
        activations: Indices of the activation bits that go with them, [G'].
        cost: Cost of every cell, [L, G', S], integer.
        distortion: Distortion of every cell, [L, G', S], nats.
        limit_bytes: The bound on the file, if that is what is bounded.
    """

    sensitivity: Sensitivity
    kind: str
    limit: int
    overhead: int
    grids: NDArray[np.int64]
    activations: NDArray[np.int64]
    cost: NDArray[np.int64]
    distortion: NDArray[np.float64]
    limit_bytes: int | None

    def smallest(self) -> int:
        """Return the least cost that any plan has, in bytes or bit operations."""
        total = int(self.cost.min(axis=(1, 2)).sum()) + self.overhead
        return -(-total // 8) if self.kind == "size" else total

    def check_feasible(self) -> None:
        """Raise unless some plan meets the bound.

        Raises:
            BudgetInfeasibleError: Carries and names the smallest reachable cost.
        """
        if int(self.cost.min(axis=(1, 2)).sum()) <= self.limit:
            return
        unit = "bytes" if self.kind == "size" else "bit operations"
        got = self.limit + self.overhead
        got = got // 8 if self.kind == "size" else got
        dense = self.sensitivity.dense_bytes
        share = (
            f" ({100 * self.smallest() / dense:.2f} %)" if self.kind == "size" else ""
        )
        fix = "raise the budget, or measure coarser grids and more sparsity"
        if self.kind == "bops" and not self.activations.any():
            fix = "raise the budget, or measure with activation_bits and coarser grids"
        raise BudgetInfeasibleError(
            "no plan meets the budget",
            smallest=self.smallest(),
            got=f"{got} {unit}",
            wanted=f"at least {self.smallest()} {unit}{share}, the smallest possible",
            fix=fix,
        )

    def plan(self, choice: Choice) -> Plan:
        """Turn chosen cells into a plan."""
        table, levels = self.sensitivity, {}
        bops = [table.bops(a) for a in range(len(table.activation_bits))]
        for i, name in enumerate(table.names):
            g, s = int(self.grids[choice.grid[i]]), int(choice.sparsity[i])
            a = int(self.activations[choice.grid[i]])
            if table.macs[i] == 0:
                a = 0  # nothing is multiplied: an embedding
            distortion = table.distortion[i, g, s] + table.activation_distortion[i, a]
            levels[name] = Level(
                grid=table.grids[g],
                sparsity=float(table.sparsity[i, s]),
                shape=table.shapes[i],
                distortion=float(distortion),
                size_bits=int(table.size_bits[i, g, s]),
                bops=int(bops[a][i, g, s]),
                activation_bits=table.activation_bits[a],
            )
        bits = sum(level.size_bits for level in levels.values())
        return Plan(
            levels=levels,
            method=choice.method,
            distortion=sum(level.distortion for level in levels.values()),
            size_bytes=-(-bits // 8) + table.overhead_bytes,
            bops=sum(level.bops for level in levels.values()),
            limit_bytes=self.limit_bytes,
            status=choice.status,
            gap=choice.gap,
            details=choice.details,
        )


@dataclass(frozen=True)
class Choice:
    """A method's answer: indices into ``Problem.grids`` and of sparsities, [L] each."""

    grid: NDArray[np.int64]
    sparsity: NDArray[np.int64]
    method: str
    status: str
    gap: float | None
    details: dict[str, Any] = field(default_factory=dict)


def make_problem(
    sensitivity: Sensitivity,
    budget: Budget,
    family: Family | None,
    masks: bool | None = None,
    activations: bool | None = None,
) -> Problem:
    """Return the problem of meeting ``budget``.

    Args:
        sensitivity: The measured table.
        budget: The bound.
        family: Which grids may be used. None: entropy-coded steps for a bound on the
            size, fixed-point bits for one on bit operations.
        masks: Whether masks may drop weights. None: not with entropy-coded steps, where
            rounding makes the zeros and a mask only keeps compensation from using them.
        activations: Whether the inputs of layers may be quantized. None: for a bound on
            bit operations, if the table knows how much it hurts.

    Raises:
        OptionError: The table has no grid of that family.
    """
    family = family or ("step" if budget.kind == "size" else "bits")
    grids = np.array(
        [
            g
            for g, grid in enumerate(sensitivity.grids)
            if family in ("any", grid.family)
        ],
        dtype=np.int64,
    )
    if not len(grids):
        raise OptionError(
            f"the sensitivity has no grid of family {family!r}",
            got=", ".join(sorted({grid.family for grid in sensitivity.grids}))
            or "none",
            wanted="step, bits or any, and grids of that family",
            fix="measure with such grids, or search with another family",
        )
    masks = family != "step" if masks is None else masks
    kept = slice(None) if masks else slice(0, 1)
    limit_bytes = None
    used = budget.kind == "bops" if activations is None else activations
    inputs = np.arange(len(sensitivity.activation_bits) if used else 1)
    grids, inputs = np.repeat(grids, len(inputs)), np.tile(inputs, len(grids))
    if budget.kind == "size":
        limit_bytes = budget.size_bytes(sensitivity.dense_bytes)
        overhead = 8 * sensitivity.overhead_bytes
        limit = 8 * limit_bytes - overhead
        cost = sensitivity.size_bits[:, grids]
    else:
        overhead = 0
        cost = np.stack(
            [
                sensitivity.bops(int(a))[:, g]
                for g, a in zip(grids, inputs, strict=True)
            ],
            1,
        )
        limit = budget.bops_limit(int(sensitivity.macs.sum()) * 32 * 32)
    hurt = sensitivity.distortion[:, grids, kept]
    hurt = hurt + sensitivity.activation_distortion[:, inputs, None]
    problem = Problem(
        sensitivity=sensitivity,
        kind=budget.kind,
        limit=limit,
        overhead=overhead,
        grids=grids,
        activations=inputs,
        cost=np.ascontiguousarray(cost[:, :, kept]),
        distortion=np.ascontiguousarray(hurt),
        limit_bytes=limit_bytes,
    )
    problem.check_feasible()
    return problem
