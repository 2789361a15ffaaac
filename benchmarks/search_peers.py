"""Solvers of multiple-choice knapsacks, ours and what others have, on one thread.

| name | how |
|---|---|
| `ours` | `fitcompress.search.optimum.solve` |
| `highs` | HiGHS through `scipy.optimize.milp` |
| `cp-sat` | OR-Tools' CP-SAT, the objective rounded to integers |
| `cbc` | CBC, in a process of its own, through PuLP |

All but ours get every level of every layer as a binary variable. They build their model
themselves, and that counts.
"""

from __future__ import annotations

import contextlib
import gc
import math
import re
import resource
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from search_instances import Instance

__all__ = ["PEERS", "Answer", "Measured", "Solver", "measure"]

SCALED = 1e3  # the reference objective of real-valued solvers: tolerances are absolute
ROUNDING = 1e-7  # what rounding all of the objective to integers may cost, relatively
LARGEST = 2.0**40  # integer objectives of levels far from any good plan end there


@dataclass(frozen=True)
class Answer:
    """What a solver says.

    Attributes:
        choice: The level of every layer, [L]; None if it found no plan.
        bound: No plan has less, it says, in the units of the instance.
        finished: Whether it stopped for the gap, not for the time.
    """

    choice: NDArray[np.int64] | None
    bound: float
    finished: bool


class Solver(Protocol):
    """A way to solve an instance; making one raises ImportError if it is missing."""

    def solve(self, instance: Instance, gap: float, limit: float) -> Answer:
        """Return an answer within a gap, or what there is after ``limit`` seconds."""
        ...


@dataclass(frozen=True)
class Measured:
    """An answer, checked, and what it took.

    Attributes:
        objective: Recomputed from the choice; infinite without a plan.
        gap: (objective − bound) / objective; at least 0.
        overrun: By which share of a limit the plan exceeds it, the largest; 0 if it
            meets all of them, in integers.
        finished: Whether it stopped for the gap, not for the time.
        cpu_s: Processor seconds, other processes that it started included.
        wall_s: Elapsed seconds.
    """

    objective: float
    gap: float
    overrun: float
    finished: bool
    cpu_s: float
    wall_s: float


def measure(
    solver: Solver, instance: Instance, gap: float, limit: float, shortest: float = 0.1
) -> Measured:
    """Solve once, or if that is quick up to nine times, and check the answer.

    Args:
        solver: What solves.
        instance: What is solved.
        gap: Relative gap at which it may stop.
        limit: Seconds after which it has to.
        shortest: Seconds to measure at least; the medians of the repeats are reported.
    """
    cpu: list[float] = []
    wall: list[float] = []
    while not wall or (sum(wall) < shortest and len(wall) < 9):
        gc.collect()
        first, start = _processor(), time.perf_counter()
        answer = solver.solve(instance, gap, limit)
        wall.append(time.perf_counter() - start)
        cpu.append(_processor() - first)
    seconds = float(np.median(cpu)), float(np.median(wall))
    if answer.choice is None:
        return Measured(math.inf, math.inf, 0.0, False, *seconds)
    objective = instance.objective(answer.choice)
    pairs = list(zip(instance.spent(answer.choice), instance.limits, strict=True))
    overrun = max(max(spent - bound, 0) / max(bound, 1) for spent, bound in pairs)
    proven = max(objective - answer.bound, 0.0) / max(objective, 1e-300)
    return Measured(objective, proven, overrun, answer.finished, *seconds)


def _processor() -> float:
    """Return the processor seconds of this process and of those it waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Ours:
    """Our exact search."""

    def __init__(self) -> None:
        from fitcompress.search import optimum

        self._solve = optimum.solve

    def solve(self, instance: Instance, gap: float, limit: float) -> Answer:
        """Return our answer."""
        found = self._solve(
            instance.cost, instance.value, instance.limits, gap=gap, time_limit=limit
        )
        if found.status == "INFEASIBLE":
            return Answer(None, math.inf, finished=True)
        finished = found.status == "OPTIMAL" or found.gap <= gap
        return Answer(found.choice, found.bound, finished)


class Highs:
    """HiGHS, as scipy brings it."""

    def __init__(self) -> None:
        from scipy import optimize, sparse

        self._optimize, self._sparse = optimize, sparse

    def solve(self, instance: Instance, gap: float, limit: float) -> Answer:
        """Return the answer of HiGHS; costs are in units of their limit."""
        budgets, layers, levels = instance.cost.shape
        count, scale = layers * levels, SCALED / instance.reference
        limits = np.array(instance.limits, dtype=np.float64)
        rows = instance.cost.reshape(budgets, count) / np.maximum(limits, 1)[:, None]
        starts = np.arange(0, count + 1, levels)
        one = self._sparse.csr_array((np.ones(count), np.arange(count), starts))
        found = self._optimize.milp(
            scale * instance.value.ravel(),
            integrality=np.ones(count),
            bounds=self._optimize.Bounds(0, 1),
            constraints=[
                self._optimize.LinearConstraint(one, 1, 1),
                self._optimize.LinearConstraint(rows, -np.inf, 1),
            ],
            options={"mip_rel_gap": gap, "time_limit": limit},
        )
        if found.x is None:
            return Answer(None, math.inf, found.status == 2)
        choice = found.x.reshape(layers, levels).argmax(1)
        return Answer(choice, found.mip_dual_bound / scale, found.status == 0)


class CpSat:
    """CP-SAT of OR-Tools, one worker."""

    def __init__(self) -> None:
        from ortools.sat.python import cp_model

        self._cp = cp_model

    def solve(self, instance: Instance, gap: float, limit: float) -> Answer:
        """Return the answer of CP-SAT, its bound less what rounding may be worth."""
        layers, levels = instance.value.shape
        scale = layers / (2 * ROUNDING * instance.reference)
        values = np.rint(np.minimum(scale * instance.value, LARGEST)).astype(np.int64)
        model = self._cp.CpModel()
        chosen = [
            [model.new_bool_var("") for _ in range(levels)] for _ in range(layers)
        ]
        for layer in chosen:
            model.add_exactly_one(layer)
        flat = [variable for layer in chosen for variable in layer]
        total = self._cp.LinearExpr.weighted_sum
        for cost, bound in zip(instance.cost, instance.limits, strict=True):
            model.add(total(flat, cost.ravel().tolist()) <= bound)
        model.minimize(total(flat, values.ravel().tolist()))
        solver = self._cp.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.relative_gap_limit = gap
        solver.parameters.max_time_in_seconds = limit
        status = solver.solve(model)
        if status not in (self._cp.OPTIMAL, self._cp.FEASIBLE):
            return Answer(None, math.inf, status == self._cp.INFEASIBLE)
        choice = [
            next(
                k for k, variable in enumerate(layer) if solver.boolean_value(variable)
            )
            for layer in chosen
        ]
        bound = (solver.best_objective_bound - layers / 2) / scale
        return Answer(np.array(choice), bound, status == self._cp.OPTIMAL)


class Cbc:
    """CBC of PuLP, which writes a file for it and reads one back."""

    def __init__(self) -> None:
        import pulp

        self._pulp = pulp
        with _old_names():
            found = pulp.PULP_CBC_CMD(msg=False).available()
        if not found:
            message = "this PuLP has no CBC"
            raise ImportError(message)

    def solve(self, instance: Instance, gap: float, limit: float) -> Answer:
        """Return the answer of CBC, its bound out of its log."""
        with _old_names():
            return self._solved(instance, gap, limit)

    def _solved(self, instance: Instance, gap: float, limit: float) -> Answer:
        pulp = self._pulp
        layers, levels = instance.value.shape
        scale = SCALED / instance.reference
        problem = pulp.LpProblem("plan", pulp.LpMinimize)
        chosen = [
            [pulp.LpVariable(f"x{i}_{k}", cat="Binary") for k in range(levels)]
            for i in range(layers)
        ]
        flat = [variable for layer in chosen for variable in layer]
        values = (scale * instance.value).ravel().tolist()
        problem += pulp.LpAffineExpression(zip(flat, values, strict=True))
        for layer in chosen:
            problem += pulp.LpAffineExpression((x, 1) for x in layer) == 1
        for cost, bound in zip(instance.cost, instance.limits, strict=True):
            shares = (cost / max(bound, 1)).ravel().tolist()
            problem += pulp.LpAffineExpression(zip(flat, shares, strict=True)) <= 1
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            command = pulp.PULP_CBC_CMD(
                msg=False, threads=1, gapRel=gap, timeLimit=limit, logPath=str(log)
            )
            problem.solve(command)
            text = log.read_text()
        if problem.sol_status not in (
            pulp.LpSolutionOptimal,
            pulp.LpSolutionIntegerFeasible,
        ):
            return Answer(None, math.inf, problem.status == pulp.LpStatusInfeasible)
        picked = np.array([x.value() for x in flat]).reshape(layers, levels)
        choice = picked.argmax(1)
        bound = _cbc_bound(text, instance.objective(choice), scale)
        return Answer(choice, bound, "Stopped on time" not in text)


@contextlib.contextmanager
def _old_names() -> Iterator[None]:
    """Silence PuLP 3 about what PuLP 4 will not have, the CBC that it ships first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _cbc_bound(log: str, objective: float, scale: float) -> float:
    """Return the bound that a log of CBC tells; without one it is the objective."""
    found = re.search(r"^Lower bound:\s+(\S+)", log, re.MULTILINE)
    if found is None:
        return objective
    with contextlib.suppress(ValueError):
        return float(found[1]) / scale
    return -math.inf


PEERS = {"ours": Ours, "highs": Highs, "cp-sat": CpSat, "cbc": Cbc}
