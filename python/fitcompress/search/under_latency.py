"""Searching under a bound on the latency by a measured table.

First which layers are integer: what quantizing their inputs costs, at least, against
what it gains in time (``integer_layers``). Then a level for each layer, under the other
bounds, that leaves it float or integer as chosen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fitcompress.errors import OptionError, PlanMismatchError
from fitcompress.search.integer_layers import choose_integer_layers
from fitcompress.search.objective import Objective
from fitcompress.search.problem import Choice, Family, Problem, make_problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fitcompress.latency.table import LatencyTable
    from fitcompress.search.budget import Budget
    from fitcompress.search.plan import Plan
    from fitcompress.search.selection import Method
    from fitcompress.sensitivity.table import Sensitivity

__all__ = ["search_under_latency"]

FLOAT, INTEGER = 0, 1


def search_under_latency(
    sensitivity: Sensitivity,
    budget: Budget,
    latency: LatencyTable,
    method: Method,
    *,
    family: Family | None = None,
    masks: bool | None = None,
) -> Plan:
    """Return the plan that hurts least under all bounds of ``budget``.

    With a bound on the latency alone it is the best by the tables, proven. Beside a
    bound on the size it is, too, if no grid has more bits than integer weights;
    otherwise it is the best among plans with the integer layers chosen first.

    Args:
        sensitivity: Measured with activation bits.
        budget: Bounds the latency.
        latency: Of the same network.
        method: Chooses the levels; one that obeys rules.
        family: As for ``search``.
        masks: As for ``search``.

    Raises:
        BudgetInfeasibleError: Names the smallest latency that can be reached.
        OptionError: The sensitivity has no activation bits that the table was measured
            with, or the budget has groups.
        PlanMismatchError: The table is for another network.
    """
    if "latency" not in budget.costs:
        raise OptionError(
            "the latency table has no effect",
            got=f"a budget of {budget}",
            wanted="a bound on the latency",
            fix="search with Budget(…, latency=…)",
        )
    if any(len(group) > 1 for group in budget.groups):
        raise OptionError(
            "groups cannot be searched with a measured latency table",
            got=f"{len(budget.groups)} groups",
            wanted="layers on their own",
            fix="leave the groups out, or fix levels by rules",
        )
    limit = budget.latency_ns(latency.float_ms)
    places = _places(latency, sensitivity)
    bounded = replace(budget, latency=None, latency_ms=limit / 1e6)
    nothing = np.zeros(sensitivity.distortion.shape[:2])  # the pairs are bounded here
    problem = make_problem(sensitivity, bounded, family, masks, True, nothing)
    kinds = _kinds(problem, latency, places)
    by_kind = [problem.allowed & (kinds == kind)[:, :, None] for kind in (0, 1)]
    values = problem.distortion
    if isinstance(method, Objective):
        values = method.values(problem)
    least = np.stack(
        [np.where(cells, values, np.inf).min(axis=(1, 2)) for cells in by_kind], axis=1
    )
    _check_levels(problem, latency, least, places)
    layers = choose_integer_layers(
        int(_nanoseconds(latency.float_ms)),
        _nanoseconds(latency.single_ms),
        _nanoseconds(latency.pair_ms),
        least[places],
        limit,
    )
    if not len(layers.integer):
        place = budget.costs.index("latency")
        raise problem.infeasible(place, layers.nanoseconds)
    integer = np.zeros(len(kinds), dtype=np.bool_)
    integer[places] = layers.integer
    allowed = np.where(integer[:, None, None], by_kind[INTEGER], by_kind[FLOAT])
    restricted = replace(problem, allowed=allowed)
    restricted.check_feasible()
    choice = method.solve(restricted)
    if not (layers.proven and _separable(problem, latency)):
        choice = replace(choice, status="FEASIBLE", gap=None)
    return _finished(restricted, choice, layers.nanoseconds, int(integer.sum()))


def _nanoseconds(milliseconds: NDArray[np.float64] | float) -> NDArray[np.int64]:
    """Round up to whole nanoseconds, but for the dust of a fit."""
    whole = np.ceil(np.asarray(milliseconds) * 1e6 - 1e-3)
    return np.asarray(whole, dtype=np.int64)


def _places(latency: LatencyTable, sensitivity: Sensitivity) -> NDArray[np.int64]:
    """Return where the layers of the latency table stand in the sensitivity."""
    places = {name: i for i, name in enumerate(sensitivity.names)}
    for name in latency.names:
        if name not in places:
            raise PlanMismatchError(
                f"the latency table has a layer {name!r} that the sensitivity lacks",
                got=", ".join(sensitivity.names[:6]),
                wanted="tables of one network",
            )
    return np.array([places[name] for name in latency.names], dtype=np.int64)


def _kinds(
    problem: Problem, latency: LatencyTable, places: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return whether cells are float or integer, −1 if not measured, [L, G']."""
    table = problem.sensitivity
    inputs = [table.activation_bits[a] for a in problem.activations]
    quantized = np.array([bits is not None for bits in inputs])
    narrow = np.array([(bits or 0) <= latency.activation_bits for bits in inputs])
    weights = table.weight_bits[:, problem.grids] <= latency.weight_bits
    kinds = np.where(weights & narrow, INTEGER, -1)
    kinds[:, ~quantized] = FLOAT
    others = np.setdiff1d(np.arange(len(kinds)), places)
    kinds[np.ix_(others, np.flatnonzero(quantized))] = -1
    return kinds


def _check_levels(
    problem: Problem,
    latency: LatencyTable,
    least: NDArray[np.float64],
    places: NDArray[np.int64],
) -> None:
    table = problem.sensitivity
    if not np.isfinite(least[places, INTEGER]).any():
        raise OptionError(
            "the sensitivity has no level that runs in integers",
            got=f"activation bits {table.activation_bits[1:] or 'none'}",
            wanted=f"at most {latency.activation_bits} bits of inputs and "
            f"{latency.weight_bits} of weights",
            fix=f"measure(…, activation_bits=({latency.activation_bits},))",
        )
    for i in np.flatnonzero(~np.isfinite(least).any(axis=1)):
        raise OptionError(
            f"the rules leave layer {table.names[i]!r} no level with a known latency",
            wanted=f"at most {latency.weight_bits} bits, or float inputs",
        )


def _separable(problem: Problem, latency: LatencyTable) -> bool:
    """Tell whether choosing integer layers first loses nothing."""
    kinds = problem.budget.costs
    if kinds == ("latency",):
        return True
    weights = problem.sensitivity.weight_bits[:, problem.grids]
    return "bops" not in kinds and bool((weights <= latency.weight_bits).all())


def _finished(problem: Problem, choice: Choice, nanoseconds: int, integer: int) -> Plan:
    details = {"latency_ms": nanoseconds / 1e6, "integer_layers": integer}
    return problem.plan(replace(choice, details=choice.details | details))
