"""Exact search under one and two budgets: seconds to a proof, and what others need.

    python benchmarks/search.py [--layers 20 60 200 600 2000] [--seeds N]
        [--budgets 1 2] [--peers ours highs cp-sat cbc] [--gap 1e-4] [--limit 60]
        [--data DIR --weights resnet20.th ...]

Every layer chooses one of 96 levels (``search_instances.py``): generated networks, one
per seed, each with another share of the range of its costs as budget, and with
``--weights`` the table of a trained network under all those shares. Solvers
(``search_peers.py``) run on one thread, one after the other on the same instance, their
order rotating; each stops at the relative gap. Seconds are CPU seconds, model building
included. ``excess`` is how far the plan's objective, recomputed in float64, lies above
the best plan that any peer found within the budgets (ours may lie below), ``gap`` what
the solver proves and ``overrun`` the share of a budget that a plan exceeds it by, the
worst over the instances; ``over`` counts the plans that exceed one, judged in integers,
``unfinished`` those that ran out of time. ``peer_over_ours`` is the fastest peer of an
instance over ours, median and least. ``--gap 0 --limit 600`` asks for optima.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fitcompress.errors import FitcompressError
from harness import parser, start
from search_instances import generated, measured
from search_peers import PEERS, Measured, Solver, measure

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from harness import Result
    from search_instances import Instance

LAYERS = (20, 60, 200, 600, 2000)
FRACTIONS = (0.1, 0.2, 0.3, 0.45, 0.6)  # of the range of a cost
# CPU seconds of ours, at most, by the number of budgets and of layers.
SECONDS = {
    1: {20: 0.005, 60: 0.01, 200: 0.02, 600: 0.03, 2000: 0.06},
    2: {20: 0.05, 60: 0.05, 200: 0.1, 600: 0.2, 2000: 0.4},
}

Answers = list[dict[str, Measured]]  # one dict by solver per instance


def available(names: list[str], result: Result) -> dict[str, Solver]:
    """Return the solvers that are installed, each warmed up."""
    solvers: dict[str, Solver] = {}
    for name in names:
        try:
            solvers[name] = PEERS[name]()
        except ImportError as error:
            result.skip(name, str(error))
            continue
        solvers[name].solve(generated(3, 2, 0.3, 0), 1e-4, 10.0)
    return solvers


def solved(
    instances: Iterator[Instance],
    solvers: dict[str, Solver],
    gap: float,
    limit: float,
) -> Answers:
    """Return what every solver makes of every instance."""
    answers: Answers = []
    for turn, instance in enumerate(instances):
        first = turn % max(len(solvers), 1)
        names = [*list(solvers)[first:], *list(solvers)[:first]]
        found = {name: measure(solvers[name], instance, gap, limit) for name in names}
        for name in solvers:
            print(
                f"{instance.name}: {name}: {found[name]}", file=sys.stderr, flush=True
            )
        answers.append({name: found[name] for name in solvers})
    return answers


def peers_best(found: dict[str, Measured]) -> float:
    """Return the least objective of a peer's plan within the budgets."""
    kept = [a.objective for n, a in found.items() if n != "ours" and not a.overrun]
    return min(kept, default=math.inf)


def excess(name: str, found: dict[str, Measured]) -> float:
    """Return how far a plan lies above the best of the peers, relatively."""
    best = peers_best(found)
    return found[name].objective / best - 1 if math.isfinite(best) else math.nan


def peers_over_ours(found: dict[str, Measured]) -> float:
    """Return the CPU seconds of the fastest peer that finished over ours."""
    peers = [a.cpu_s for n, a in found.items() if n != "ours" and a.finished]
    return min(peers, default=math.nan) / max(found["ours"].cpu_s, 1e-9)


def report(
    case: str, budgets: int, layers: int, answers: Answers, result: Result, gap: float
) -> None:
    """Add the rows of one case, and the bars of ours."""
    for name in answers[0]:
        mine = [found[name] for found in answers]
        cells = {}
        if name == "ours":
            ratios = [peers_over_ours(found) for found in answers]
            cells["peer_over_ours"] = statistics.median(ratios)
            cells["least_over_ours"] = min(ratios)
        result.row(
            case=case,
            budgets=budgets,
            layers=layers,
            solver=name,
            instances=len(mine),
            cpu_median_s=statistics.median(a.cpu_s for a in mine),
            cpu_worst_s=max(a.cpu_s for a in mine),
            wall_median_s=statistics.median(a.wall_s for a in mine),
            wall_worst_s=max(a.wall_s for a in mine),
            excess=max(excess(name, found) for found in answers),
            gap=max(a.gap for a in mine),
            over=sum(a.overrun > 0 for a in mine),
            overrun=max(a.overrun for a in mine),
            unfinished=sum(not a.finished for a in mine),
            **cells,
        )
    if "ours" not in answers[0]:
        return
    mine = [found["ours"] for found in answers]
    label = f"{case}, {layers} layers, {budgets} budget{'s' * (budgets > 1)}"
    worst = max(a.cpu_s for a in mine)
    if layers in SECONDS[budgets]:
        result.bar(f"{label}: worst CPU seconds", worst, SECONDS[budgets][layers])
    result.bar(f"{label}: proven gap", max(a.gap for a in mine), gap + 1e-12)
    result.bar(f"{label}: plans over a budget", sum(a.overrun > 0 for a in mine), 0)
    above = max(excess("ours", found) for found in answers)
    if not math.isnan(above):
        result.bar(f"{label}: above the best peer", above, gap + 1e-9)


def run(arguments: argparse.Namespace, result: Result) -> None:
    """Solve every case and report it."""
    solvers = available(arguments.peers, result)
    if not solvers:
        return
    gap, limit = arguments.gap, arguments.limit
    seeds = range(2 if arguments.quick else arguments.seeds)
    for budgets in arguments.budgets:
        for layers in arguments.layers:
            if arguments.quick and layers > 200:
                continue
            instances = (
                generated(layers, budgets, FRACTIONS[seed % len(FRACTIONS)], seed)
                for seed in seeds
            )
            answers = solved(instances, solvers, gap, limit)
            report("generated", budgets, layers, answers, result, gap)
        for path in arguments.weights:
            tables = measured(path, arguments.data, budgets, list(FRACTIONS))
            answers = solved(iter(tables), solvers, gap, limit)
            layers = tables[0].cost.shape[1]
            report(path.stem.split("-")[0], budgets, layers, answers, result, gap)


def main() -> None:
    """Run what can be run here."""
    made = parser(__doc__ or "", threads=1)
    made.add_argument("--layers", nargs="*", type=int, default=list(LAYERS))
    made.add_argument("--seeds", type=int, default=5, metavar="N")
    made.add_argument("--budgets", nargs="+", type=int, default=[1, 2], choices=(1, 2))
    made.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    made.add_argument("--gap", type=float, default=1e-4, help="relative gap to stop at")
    made.add_argument("--limit", type=float, default=60.0, help="seconds per solve")
    made.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("FITCOMPRESS_DATA"),
        help="folder of CIFAR-10's binary files (default: FITCOMPRESS_DATA)",
    )
    made.add_argument(
        "--weights",
        nargs="+",
        type=Path,
        default=[],
        help="checkpoints named resnet20-….th or resnet56-….th; need --data",
    )
    arguments = made.parse_args()
    try:
        result = start(arguments)
        if arguments.data is None and arguments.weights:
            result.skip("trained networks", "need --data")
            arguments.weights = []
        run(arguments, result)
    except (FitcompressError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    result.finish()


if __name__ == "__main__":
    main()
