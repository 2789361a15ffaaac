"""Which sensitivity ranks plans as the true loss rise does, and chooses the best one?

    python benchmarks/rank_correlation.py --data DIR --weights resnet20-12fca82f.th
        [--network resnet20 | resnet56 | digits] [--plans 100] [--regimes bits joint …]
        [--averages 3 2.5] [--sizes 7% 4.6% 3.4%] [--draws 3] [--tune 6400]
        [--cache FILE] [--json FILE] [--figure FILE]

Random plans give the rank correlation of the predicted with the true loss rise, with
its 95 % bootstrap interval, and the ratio of the two. Regimes: fixed-point grids of 6
to 2 bits, with activation bits, with sparsity up to .7, or of 3 and 2 bits;
compensated, rounded, or rounded with batch norms estimated anew.

Then every sensitivity chooses a plan for an average number of bits, by weights (size)
and by operations (bops), and entropy-coded steps for a share of the bytes, with the
same exact solver. Outcomes are means over draws of the images that compensate: one draw
scatters by 5 to 6 %. The true loss rise is the KL divergence from the dense network on
test images that nothing else has seen.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import fitcompress as fc
from fitcompress.cli.models import trained_model
from fitcompress.data import load_dataset
from fitcompress.model import compressible_layers
from fitcompress.model.costs import count_macs
from fitcompress.progress import track
from plan_outcomes import Cell, Outcomes, plan_of
from rank_scores import BITS, correlations, decisions, draw_figure
from sensitivities import DEFAULT, OUTPUT_RULES, from_outputs, from_weights, ours

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Reals = NDArray[np.float64]
    Choice = NDArray[np.int64]

GRIDS = [fc.Grid(bits=bits) for bits in BITS]
SPARSITIES = (0.0, 0.3, 0.5, 0.6, 0.7)
ACTIVATIONS = (8, 6, 4)
HELD_OUT = 2000  # of the test images, for sensitivities measured on them


@dataclass(frozen=True)
class Regime:
    """Levels that random plans draw from, and how plans are applied."""

    cells: list[Cell]
    errors: str


def regimes() -> dict[str, Regime]:
    """Return them by name."""
    bits = [Cell(g) for g in range(len(BITS))]
    joint = [Cell(g, s) for g in range(len(BITS)) for s in range(len(SPARSITIES))]
    inputs = [
        Cell(g, 0, a) for g in range(len(BITS)) for a in range(1, 1 + len(ACTIVATIONS))
    ]
    return {
        "bits": Regime(bits, "compensated"),
        "joint": Regime(joint, "compensated"),
        "activations": Regime(inputs, "compensated"),
        "low": Regime(bits[-2:], "compensated"),
        "rounded": Regime(bits, "rounded"),
        "rounded, 3 to 6 bits": Regime(bits[:-1], "rounded"),
        "rounded, joint": Regime(joint, "rounded"),
        "renormed": Regime(bits, "renormed"),
        "renormed, joint": Regime(joint, "renormed"),
    }


class Comparison:
    """One network, its sensitivities, and what plans really do to it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model = trained_model(arguments.network, arguments.weights)
        name = "digits" if arguments.network == "digits" else "cifar10"
        self.source = load_dataset(name, arguments.data)
        total = len(self.source.test[0])
        held = min(HELD_OUT, total // 2)
        self.held_out = self.source.test[0][:held]
        images = slice(held, min(total, held + arguments.images))
        self.outcomes = Outcomes(self.model, self.source, images, arguments.cache)
        self.draws = arguments.draws
        self.fisher = fc.measure(
            self.model,
            self.source.calibration(),
            grids=GRIDS,
            sparsities=SPARSITIES,
            activation_bits=ACTIVATIONS
            if any(each.startswith("activations") for each in arguments.regimes)
            else (),
            samples=512,
            progress=False,
        )
        self.plain = from_weights(
            self.model, self.source, self.fisher, SPARSITIES, self.held_out
        )
        self._measured: dict[bool, Any] = {}

    def measured(self, *, compensated: bool) -> Any:
        """Return tables that depend on how errors are treated, once."""
        if compensated not in self._measured:
            outputs = from_outputs(
                self.model, self.source, self.fisher, compensated=compensated
            )
            tables = ours(
                self.model,
                self.source.calibration(7),
                self.fisher,
                compensated=compensated,
            )
            options = fc.Compensation() if compensated else None
            tables[f"{DEFAULT}, held out"] = fc.refine(
                self.fisher,
                self.model,
                self.held_out.split(128),
                refinement=fc.Refinement(compensation=options),
                progress=False,
            )
            self._measured[compensated] = outputs, tables
        return self._measured[compensated]

    def tables(self, *, compensated: bool) -> dict[str, Reals]:
        """Return all tables, [L, G, S]."""
        (output, _, _), refined = self.measured(compensated=compensated)
        return (
            self.plain
            | output
            | {name: table.distortion for name, table in refined.items()}
        )

    def correlate(self, name: str, count: int) -> dict[str, Any]:
        """Return how well all sensitivities rank random plans of one regime."""
        regime = regimes()[name]
        compensated = regime.errors == "compensated"
        layers = len(self.fisher.names)
        choices = np.random.default_rng(1).integers(
            0, len(regime.cells), (count, layers)
        )
        truth = np.array(
            [
                self.outcomes.of(
                    plan_of(self.fisher, regime.cells, choice), regime.errors
                ).divergence
                for choice in track(choices, name, count)
            ]
        )
        grids, sparsities, inputs = np.array(regime.cells).T
        (_, moved, p), refined = self.measured(compensated=compensated)
        found = [
            (
                each,
                table[:, grids, sparsities]
                + refined.get(each, self.fisher).activation_distortion[:, inputs],
            )
            for each, table in self.tables(compensated=compensated).items()
        ]
        cells = grids * len(SPARSITIES) + sparsities
        rows = np.arange(layers)
        together = [moved[rows, cells[choice]].sum(0) for choice in choices]
        print(f"{name}: {count} plans, KL {truth.min():.3g} … {truth.max():.3g}")
        guesses = {OUTPUT_RULES[2]: np.array([_gauss_newton(p, d) for d in together])}
        return {
            "true": truth.tolist(),
            "rows": correlations(found, choices, truth, guesses),
        }

    def decide(self, kind: str, average: float, tune: int) -> dict[str, float]:
        """Return mean outcomes of the plans for an average number of bits."""
        layers = compressible_layers(self.model)
        cost = np.array([layer.size for layer in layers])
        if kind == "bops":
            macs = count_macs(self.model, self.source.test[0][:1])
            cost = np.array([macs[layer.name] for layer in layers])
        cells = [Cell(g) for g in range(len(BITS))]
        found = [(n, t[:, :, 0]) for n, t in self.tables(compensated=True).items()]

        def true(choice: Choice) -> float:
            plan = plan_of(self.fisher, cells, choice)
            return self.mean(plan, tune)

        return decisions(found, cost, average, true)

    def mean(self, plan: fc.Plan, tune: int) -> float:
        """Return the divergence of a plan, mean over draws."""
        found = [
            self.outcomes.of(plan, "compensated", draw=draw, tune=tune).divergence
            for draw in range(self.draws)
        ]
        return float(np.mean(found))

    def decide_steps(self, size: str, tune: int) -> dict[str, float]:
        """Return mean outcomes of entropy-coded plans for a share of the bytes."""
        loader = self.source.calibration
        table = fc.measure(self.model, loader(), samples=512, progress=False)
        everything = fc.Refinement(grids=3, plans=24, family="any")
        refined = fc.refine(
            table, self.model, loader(7), refinement=everything, progress=False
        )
        budget = fc.Budget(size=size)
        law = fc.search(table, budget)
        steps = sorted(level.grid.step or 0.0 for level in law.levels.values())
        middle = fc.Grid(step=steps[len(steps) // 2])
        one = replace(
            law,
            levels={n: replace(x, grid=middle) for n, x in law.levels.items()},
        )
        plans = {
            "one global step": one,
            "high resolution": law,
            "Fisher diagonal, augmented": fc.search(
                table, budget, method=fc.methods.Optimal("rounded", fisher_power=1)
            ),
            "single layers and plans": fc.search(
                refined, budget, method=fc.methods.Optimal("rounded", fisher_power=1)
            ),
        }
        return {name: self.mean(plan, tune) for name, plan in plans.items()}


def _gauss_newton(p: NDArray[np.float32], d: NDArray[np.float32]) -> float:
    return float(0.5 * ((p * d * d).sum(-1) - (p * d).sum(-1) ** 2).mean())


def main() -> None:
    """Measure, compare and print."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--data", type=Path, help="CIFAR-10, binary")
    options.add_argument("--weights", required=True, type=Path)
    options.add_argument("--network", default="resnet20")
    options.add_argument("--plans", type=int, default=100)
    options.add_argument(
        "--regimes",
        nargs="*",
        default=["bits", "joint", "rounded"],
        help="names; NAME=COUNT for another number of plans",
    )
    options.add_argument("--averages", type=float, nargs="*", default=[3.0, 2.5])
    options.add_argument("--sizes", nargs="*", default=["7%", "4.6%", "3.4%"])
    options.add_argument("--draws", type=int, default=3)
    options.add_argument("--images", type=int, default=4000, help="that score")
    options.add_argument("--tune", type=int, default=0, help="images, also after that")
    options.add_argument("--cache", type=Path, help="keeps outcomes of plans")
    options.add_argument("--json", type=Path)
    options.add_argument("--figure", type=Path, help="of the first regime")
    arguments = options.parse_args()
    comparison = Comparison(arguments)
    result: dict[str, Any] = {"network": arguments.network}

    def keep(part: str, values: dict[str, Any]) -> None:
        result[part] = values
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")

    for asked in arguments.regimes:
        name, _, count = asked.partition("=")
        keep(name, comparison.correlate(name, int(count or arguments.plans)))
    if arguments.figure and arguments.regimes:
        draw_figure(result, arguments.regimes[0].partition("=")[0], arguments.figure)
    for tune in sorted({0, arguments.tune}):
        after = f", tuned on {tune}" if tune else ""
        parts: dict[str, Callable[[], dict[str, float]]] = {}
        for kind in ("size", "bops"):
            for average in arguments.averages:
                parts[f"{average:g} bits by {kind}{after}"] = (
                    lambda kind=kind, average=average, tune=tune: comparison.decide(
                        kind, average, tune
                    )
                )
        for size in arguments.sizes:
            parts[f"steps, {size}{after}"] = lambda size=size, tune=tune: (
                comparison.decide_steps(size, tune)
            )
        for part, run in parts.items():
            keep(part, run())
            for name, value in result[part].items():
                print(f"{part}: {name:36} KL {value:.4f}", flush=True)


if __name__ == "__main__":
    main()
