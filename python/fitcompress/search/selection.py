"""``search`` and ``pareto``: from a sensitivity and a budget to plans."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from fitcompress.errors import OptionError
from fitcompress.latency.table import LatencyTable
from fitcompress.search.budget import Budget
from fitcompress.search.hull import front
from fitcompress.search.objective import Objective
from fitcompress.search.optimal import Optimal
from fitcompress.search.problem import Choice, Family, Problem, make_problem
from fitcompress.search.under_latency import search_under_latency

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

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
    latency: ArrayLike | LatencyTable | None = None,
) -> Plan:
    """Return the plan that hurts least under ``budget``, as far as the method knows.

    For entropy-coded steps these are by default the errors that compensation leaves,
    alike in all layers; the loss rise that the plan predicts is that of rounded weights
    all the same. See :class:`fitcompress.methods.Optimal`.

    For bit operations :func:`fitcompress.refine` the sensitivity first, or let
    :func:`fitcompress.compress` do so: without that, weights are predicted as if they
    were rounded, and get bits that the inputs need.

    Args:
        sensitivity: What :func:`fitcompress.measure` returned.
        budget: The bounds, with rules for single layers.
        method: One of :mod:`fitcompress.methods`; ``Optimal()`` by default.
        family: Grids that may be used: ``"step"`` (default for a size alone: smallest
            file), ``"bits"`` (default otherwise: what runtimes execute) or ``"any"``.
        masks: Whether masks may drop weights besides those that round to zero. None:
            not with steps alone, where that was measured to cost accuracy at equal
            size.
        activations: Whether the inputs of layers may be quantized, too. None: for a
            bound on bit operations, if the sensitivity was measured with activation
            bits. They save no bytes.
        latency: For a bound on the latency: what :func:`fitcompress.measure_latency`
            returned; then inputs of layers are quantized where that pays, and
            ``activations`` has no effect. Or milliseconds of your own, of every layer
            at every grid and sparsity of the sensitivity, [L, G] or [L, G, S].

    Returns:
        A plan whose predicted cost is within the budget, with status and gap.

    Raises:
        BudgetInfeasibleError: Names the smallest reachable cost.
        OptionError: The sensitivity has no grid of that family, steps are to meet a
            bound on bit operations, or the method is none that searches a table.
        SearchLimitError: The method gave up before it met the budget.
    """
    if "bops" in budget.costs and family in ("step", "any"):
        raise OptionError(
            "entropy-coded steps have no fixed number of bits to bound",
            got=f"a budget on bit operations with family={family!r}",
            wanted="family='bits'",
        )
    chosen = method or Optimal()
    if not hasattr(chosen, "solve"):
        raise OptionError(
            "this method does not choose from a table",
            got=type(method).__name__,
            wanted="one with solve, such as Optimal()",
            fix="call its run() with the model, if it is one that trains",
        )
    if isinstance(latency, LatencyTable):
        return search_under_latency(
            sensitivity, budget, latency, chosen, family=family, masks=masks
        )
    problem = make_problem(sensitivity, budget, family, masks, activations, latency)
    return problem.plan(chosen.solve(problem))


def pareto(
    sensitivity: Sensitivity,
    *,
    kind: Literal["size", "bops"] = "size",
    family: Family | None = None,
    method: Objective | None = None,
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
    no_bound = 2**60
    budget = Budget(size=no_bound) if kind == "size" else Budget(bops=no_bound)
    problem = make_problem(sensitivity, budget, family)
    layers, _, sparsities = problem.cost.shape
    value = (method or Objective()).values(problem).reshape(layers, -1)
    steps = front(problem.cost.reshape(layers, -1), value)
    chosen = np.unique(np.linspace(0, len(steps.layer), points).round().astype(int))
    plans = []
    for step in chosen:
        cell = steps.choice(int(step))
        choice = Choice(cell // sparsities, cell % sparsities, "front", "OPTIMAL", 0.0)
        plans.append(replace(problem.plan(choice), limit_bytes=None))
    return plans
