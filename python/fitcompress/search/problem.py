"""The table that a search method works on: L layers, each with its own choices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fitcompress.errors import BudgetInfeasibleError, OptionError
from fitcompress.search.plan import Level, Plan
from fitcompress.search.rules import allowed_cells

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from fitcompress.search.budget import Budget
    from fitcompress.sensitivity.table import Sensitivity

__all__ = ["Choice", "Family", "Problem", "make_problem"]

Family = Literal["step", "bits", "any"]


UNITS = {"size": "bytes", "bops": "bit operations", "latency": "ns"}


@dataclass(frozen=True)
class Problem:
    """Minimise Σ_l D_l(k_l) subject to Σ_l c_l^m(k_l) ≤ limit^m for every budget m.

    Attributes:
        sensitivity: Where the numbers come from.
        budget: What is bounded, M costs.
        limits: The bounds on the sums of ``costs``, M, in bits, bit operations or ns.
        overheads: What every plan costs besides; taken off ``limits`` already.
        grids: Indices of the grids that may be used, [G']; each as often as there are
            activation bits to go with it.
        activations: Indices of the activation bits that go with them, [G'].
        costs: Costs of every cell, [M, L, G', S], integers.
        distortion: Distortion of every cell, [L, G', S], nats.
        allowed: Which cells the rules leave, [L, G', S].
        groups: Indices of the layers that share a cell, together all layers.
        limit_bytes: The bound on the file, if there is one.
    """

    sensitivity: Sensitivity
    budget: Budget
    limits: tuple[int, ...]
    overheads: tuple[int, ...]
    grids: NDArray[np.int64]
    activations: NDArray[np.int64]
    costs: NDArray[np.int64]
    distortion: NDArray[np.float64]
    allowed: NDArray[np.bool_]
    groups: tuple[tuple[int, ...], ...]
    limit_bytes: int | None

    @property
    def kind(self) -> str:
        """The bounded cost; the first of several."""
        return self.budget.costs[0]

    @property
    def cost(self) -> NDArray[np.int64]:
        """Cost of every cell, of the first of several, [L, G', S]."""
        first: NDArray[np.int64] = self.costs[0]
        return first

    @property
    def limit(self) -> int:
        """Bound on the sum of ``cost``."""
        return self.limits[0]

    def check_plain(self, method: str) -> None:
        """Raise if there is more than one cost to bound in layers on their own.

        Raises:
            OptionError: Names the method that cannot do it.
        """
        several = len(self.limits) > 1
        if several or len(self.groups) < len(self.distortion) or not self.allowed.all():
            raise OptionError(
                f"{method} bounds one cost, without rules and groups",
                got=str(self.budget),
                wanted="one bound alone",
                fix="search with method=Optimal()",
            )

    def grouped_costs(self) -> NDArray[np.int64]:
        """Return what a cell costs in all layers of a group together, [M, R, K]."""
        flat = self.costs.reshape(*self.costs.shape[:2], -1)
        return np.stack([flat[:, list(g)].sum(axis=1) for g in self.groups], axis=1)

    def grouped_allowed(self) -> NDArray[np.bool_]:
        """Return which cells a group may have, [R, K]."""
        flat = self.allowed.reshape(len(self.allowed), -1)
        return np.stack([flat[list(g)].all(axis=0) for g in self.groups])

    def in_units(self, total: int, budget: int) -> int:
        """Return a sum of costs with overhead, in bytes, bit operations or ns."""
        total += self.overheads[budget]
        return -(-total // 8) if self.budget.costs[budget] == "size" else total

    def smallest(self, budget: int = 0) -> int:
        """Return the least cost that any plan has, in bytes, bit operations or ns."""
        return self.in_units(self._least(budget), budget)

    def _least(self, budget: int) -> int:
        allowed = self.grouped_allowed()
        costs = np.where(allowed, self.grouped_costs()[budget], np.iinfo(np.int64).max)
        return int(costs.min(axis=1).sum())

    def check_feasible(self) -> None:
        """Raise unless some plan meets each bound on its own.

        Raises:
            BudgetInfeasibleError: Carries and names the smallest reachable cost.
        """
        for budget, limit in enumerate(self.limits):
            if self._least(budget) > limit:
                raise self.infeasible(budget, self.smallest(budget))

    def infeasible(
        self, budget: int, smallest: int, beside: str = ""
    ) -> BudgetInfeasibleError:
        """Return the error that says what a budget could be at the least."""
        kind = self.budget.costs[budget]
        unit = UNITS[kind]
        got = self.limits[budget] + self.overheads[budget]
        got = got // 8 if kind == "size" else got
        dense = self.sensitivity.dense_bytes
        share = f" ({100 * smallest / dense:.2f} %)" if kind == "size" else ""
        fix = "raise the budget, or measure coarser grids and more sparsity"
        if kind == "latency":
            fix = "raise the budget: no levels in the table are faster together"
        if kind == "bops" and not self.activations.any():
            fix = "raise the budget, or measure with activation_bits and coarser grids"
        return BudgetInfeasibleError(
            "no plan meets the budget",
            smallest=smallest,
            got=f"{got} {unit}",
            wanted=f"at least {smallest} {unit}{share}, the smallest possible{beside}",
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
    latency: ArrayLike | None = None,
) -> Problem:
    """Return the problem of meeting ``budget``.

    Args:
        sensitivity: The measured table.
        budget: The bounds.
        family: Which grids may be used. None: entropy-coded steps for a bound on the
            size alone, fixed-point bits for others.
        masks: Whether masks may drop weights. None: not with entropy-coded steps, where
            rounding makes the zeros and a mask only keeps compensation from using them.
        activations: Whether the inputs of layers may be quantized. None: for a bound on
            bit operations, if the table knows how much it hurts.
        latency: Milliseconds of every layer at every grid and sparsity of the
            sensitivity, [L, G] or [L, G, S], for a bound on the latency.

    Raises:
        OptionError: The table has no grid of that family; rules or groups fit no layer.
        BudgetInfeasibleError: A bound is out of reach.
    """
    family = family or ("step" if budget.costs == ("size",) else "bits")
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
    if latency is not None and "latency" not in budget.costs:
        raise OptionError(
            "the latency table has no effect",
            got=f"a budget of {budget}",
            wanted="a bound on the latency",
            fix="search with Budget(…, latency=…)",
        )
    masks = family != "step" if masks is None else masks
    kept = sensitivity.distortion.shape[2] if masks else 1
    used = "bops" in budget.costs if activations is None else activations
    inputs = np.arange(len(sensitivity.activation_bits) if used else 1)
    grids, inputs = np.repeat(grids, len(inputs)), np.tile(inputs, len(grids))
    costs, limits, overheads = [], [], []
    for kind in budget.costs:
        overhead = 0
        if kind == "size":
            overhead = 8 * sensitivity.overhead_bytes
            limit = 8 * budget.size_bytes(sensitivity.dense_bytes) - overhead
            cost = sensitivity.size_bits[:, grids]
        elif kind == "bops":
            cost = np.stack(
                [
                    sensitivity.bops(int(a))[:, g]
                    for g, a in zip(grids, inputs, strict=True)
                ],
                1,
            )
            limit = budget.bops_limit(int(sensitivity.macs.sum()) * 32 * 32)
        else:
            cost = _nanoseconds(latency, sensitivity)[:, grids]
            limit = budget.latency_ns()
        costs.append(cost[:, :, :kept])
        limits.append(limit)
        overheads.append(overhead)
    hurt = sensitivity.distortion[:, grids, :kept]
    hurt = hurt + sensitivity.activation_distortion[:, inputs, None]
    limit_bytes = None
    if budget.size is not None:
        limit_bytes = budget.size_bytes(sensitivity.dense_bytes)
    problem = Problem(
        sensitivity=sensitivity,
        budget=budget,
        limits=tuple(limits),
        overheads=tuple(overheads),
        grids=grids,
        activations=inputs,
        costs=np.ascontiguousarray(np.stack(costs)),
        distortion=np.ascontiguousarray(hurt),
        allowed=allowed_cells(budget.rules, sensitivity, grids, kept)
        & (sensitivity.quantizable_inputs[:, None] | (inputs == 0))[:, :, None],
        groups=_groups(budget.groups, sensitivity.names),
        limit_bytes=limit_bytes,
    )
    _check_groups(problem)
    problem.check_feasible()
    return problem


def _nanoseconds(
    latency: ArrayLike | None, sensitivity: Sensitivity
) -> NDArray[np.int64]:
    """Return a latency table in whole nanoseconds, rounded up, [L, G, S]."""
    shape = sensitivity.distortion.shape
    if latency is None:
        raise OptionError(
            "a bound on the latency needs a latency table",
            got="none",
            wanted=f"milliseconds [L, G] or [L, G, S] = {list(shape)}",
            fix="search(…, latency=table)",
        )
    try:
        table = np.asarray(latency, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise OptionError(
            "the latency table is no array of numbers",
            got=str(error),
            wanted=f"milliseconds [L, G] or [L, G, S] = {list(shape)}",
        ) from error
    if table.shape == shape[:2]:
        table = table[:, :, None]
    if table.shape not in (shape, (*shape[:2], 1)):
        raise OptionError(
            "the latency table is of another shape than the sensitivity",
            got=list(table.shape),
            wanted=f"{list(shape[:2])} or {list(shape)}",
        )
    if not (np.isfinite(table).all() and (table >= 0).all() and (table < 1e9).all()):
        raise OptionError(
            "the latency table has numbers that are no milliseconds",
            got=f"{table.min()} to {table.max()}",
            wanted="finite numbers from 0 to 1e9",
        )
    nanoseconds = table * 1e6
    nearest = np.rint(nanoseconds)  # .35 ms are 350000 ns, whatever the product says
    dust = np.abs(nanoseconds - nearest) <= 1e-9 * nearest
    whole = np.where(dust, nearest, np.ceil(nanoseconds)).astype(np.int64)
    return np.array(np.broadcast_to(whole, shape))


def _groups(
    groups: tuple[tuple[str, ...], ...], names: tuple[str, ...]
) -> tuple[tuple[int, ...], ...]:
    """Return the groups as indices, and every other layer as one of its own."""
    place = {name: i for i, name in enumerate(names)}
    for name in (name for group in groups for name in group):
        if name not in place:
            raise OptionError(
                f"a group names a layer {name!r} that was not measured",
                got=", ".join(names[:6]),
                wanted="names of the sensitivity",
            )
    shared = [tuple(place[name] for name in group) for group in groups if group]
    taken = {i for group in shared for i in group}
    single = [(i,) for i in range(len(names)) if i not in taken]
    return tuple(sorted([*shared, *single]))


def _check_groups(problem: Problem) -> None:
    """Raise if the rules leave a group no level in common."""
    names = problem.sensitivity.names
    for row in np.flatnonzero(~problem.grouped_allowed().any(axis=1)):
        raise OptionError(
            "the rules leave a group no level in common",
            got=", ".join(names[i] for i in problem.groups[row]),
            wanted="a level that all of them may have",
        )
