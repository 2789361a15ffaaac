"""``search`` and ``pareto``: from a sensitivity and a budget to plans."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fitcompress.errors import OptionError
from fitcompress.search.budget import Budget
from fitcompress.search.hull import front
from fitcompress.search.lagrangian import Lagrangian
from fitcompress.search.problem import Choice, Family, Problem, make_problem

if TYPE_CHECKING:
    from fitcompress.search.plan import Plan
    from fitcompress.sensitivity.table import Sensitivity

__all__ = ["Method", "pareto", "search"]


class Method(Protocol):
    """What chooses a level for every layer."""

    def solve(self, problem: Problem) -> Choice:
        """Return the chosen cell of every layer."""
        ...


def search(
    sensitivity: Sensitivity,
    budget: Budget,
    *,
    method: Method | None = None,
    family: Family | None = None,
    masks: bool | None = None,
    activations: bool | None = None,
) -> Plan:
    """Return the plan that the method thinks hurts least under ``budget``.

    For entropy-coded steps these are by default the errors that compensation leaves,
    alike in all layers; the loss rise that the plan predicts is that of rounded weights
    all the same. See :class:`fitcompress.methods.Lagrangian`.

    Args:
        sensitivity: What :func:`fitcompress.measure` returned.
        budget: The bound.
        method: ``Lagrangian()`` (default) or ``PathSearch()``.
        family: Grids that may be used: ``"step"`` (default for a size: smallest file),
            ``"bits"`` (default for BOPs: what runtimes execute) or ``"any"``.
        masks: Whether masks may drop weights besides those that round to zero. None:
            not with steps alone, where that was measured to cost accuracy at equal
            size.
        activations: Whether the inputs of layers may be quantized, too. None: for a
            bound on bit operations, if the sensitivity was measured with activation
            bits. They save no bytes.

    Returns:
        A plan whose predicted cost is within the budget, with status and gap.

    Raises:
        BudgetInfeasibleError: Names the smallest reachable cost.
        OptionError: The sensitivity has no grid of that family, or steps are to meet a
            bound on bit operations.
        SearchLimitError: The method gave up before it met the budget.
    """
    if budget.kind == "bops" and family in ("step", "any"):
        raise OptionError(
            "entropy-coded steps have no fixed number of bits to bound",
            got=f"a budget on bit operations with family={family!r}",
            wanted="family='bits'",
        )
    problem = make_problem(sensitivity, budget, family, masks, activations)
    return problem.plan((method or Lagrangian()).solve(problem))


def pareto(
    sensitivity: Sensitivity,
    *,
    kind: str = "size",
    family: Family | None = None,
    method: Lagrangian | None = None,
    points: int = 100,
) -> list[Plan]:
    """Return plans along the whole convex front, from the cheapest to the best.

    They bound no file: :func:`fitcompress.apply` takes their steps as they are.

    Args:
        sensitivity: What :func:`fitcompress.measure` returned.
        kind: The cost, ``"size"`` or ``"bops"``.
        family: As for :func:`search`.
        method: Whose weighting of the layers to use.
        points: At most so many plans, evenly spaced along the front.
    """
    budget = Budget(**{kind: 2**60})  # no bound
    problem = make_problem(sensitivity, budget, family)
    layers, _, sparsities = problem.cost.shape
    value = (method or Lagrangian()).values(problem).reshape(layers, -1)
    steps = front(problem.cost.reshape(layers, -1), value)
    chosen = np.unique(np.linspace(0, len(steps.layer), points).round().astype(int))
    plans = []
    for step in chosen:
        cell = steps.choice(int(step))
        choice = Choice(cell // sparsities, cell % sparsities, "front", "OPTIMAL", 0.0)
        plans.append(replace(problem.plan(choice), limit_bytes=None))
    return plans
