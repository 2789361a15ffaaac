"""The Lagrangian method: the best plan of the convex front, filled up to the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from fitcompress.errors import OptionError
from fitcompress.search.hull import front
from fitcompress.search.problem import Choice, Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Lagrangian"]


@dataclass(frozen=True)
class Lagrangian:
    """Minimise the loss rise layer by layer at one exchange rate, then fill up.

    minimise Σ_l w_l D_l(k_l) + μ Σ_l c_l(k_l), with μ as small as the budget allows.
    What is left is spent on single layers, best gain per cost first. The relaxation's
    optimum is a lower bound, so the answer carries a proven gap.

    Attributes:
        errors: Which errors D stands for. ``"rounded"``: those of weights rounded to
            the nearest level, the measured distortion. ``"compensated"``: those that
            remain once errors are compensated. They behave as at high resolution,
            uniform over a step whatever the weights are, so D_l = ½ F̄ n_l Δ²/12 (steps
            only). None: compensated for steps, rounded otherwise. On ResNet-20 at 3.5 %
            of the bytes, measured on calibration inputs, this plan had a KL divergence
            a quarter below that of one step for all layers, and half of that of the
            rounded objective.
        fisher_power: α in w_l = (F̄_l / F̄)^α for compensated and (F̄_l / F̄)^(α−1) for
            rounded errors, F̄_l the mean Fisher value of layer l, F̄ that of the network.
            1 weights the layers by their Fisher information, 0 all alike. None: 0 with
            steps, where weighting by it was measured to cost bytes, 1 otherwise.
    """

    errors: Literal["compensated", "rounded"] | None = None
    fisher_power: float | None = None

    def __post_init__(self) -> None:
        if self.errors not in (None, "compensated", "rounded"):
            msg = f"errors must be 'compensated' or 'rounded'; got {self.errors!r}"
            raise ValueError(msg)
        if self.fisher_power is not None and not 0 <= self.fisher_power <= 1:
            msg = f"fisher_power must be between 0 and 1; got {self.fisher_power}"
            raise ValueError(msg)

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return the objective of every cell, w_l D_l, [L, G', S]."""
        table = problem.sensitivity
        grids = [table.grids[g] for g in problem.grids]
        steps = np.array([grid.step or 0.0 for grid in grids])
        only_steps = bool((steps > 0).all())
        errors = self.errors or ("compensated" if only_steps else "rounded")
        power = self.fisher_power
        power = (0.0 if only_steps else 1.0) if power is None else power
        overall = float(table.fisher_trace.sum() / table.sizes.sum())
        floor = max(overall, float(np.finfo(float).tiny)) * 1e-9
        relative = np.maximum(table.fisher_trace / table.sizes, floor) / max(
            overall, floor
        )
        if errors == "rounded":
            return np.asarray(
                problem.distortion * (relative ** (power - 1))[:, None, None]
            )
        if not only_steps:
            raise OptionError(
                "compensated errors are known for steps only",
                got="fixed-point grids",
                wanted="family='step'",
                fix="use errors='rounded'",
            )
        weight = table.sizes * relative**power * max(overall, floor) / 24
        values = weight[:, None] * np.square(steps)[None, :]
        cells = np.broadcast_to(values[:, :, None], problem.cost.shape)
        return np.array(cells, dtype=np.float64)

    def solve(self, problem: Problem) -> Choice:
        """Return the chosen cell of every layer."""
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
