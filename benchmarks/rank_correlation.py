"""Which sensitivity ranks plans as the true loss rise does, and chooses the best one?

    python benchmarks/rank_correlation.py --data DIR --weights resnet20-12fca82f.th
        [--network resnet20] [--plans 50] [--averages 3 2.5] [--rounded] [--json F]

Fixed-point grids of 6 to 2 bits a layer. Random plans give the rank correlation of the
predicted with the true loss rise, with its 95 % bootstrap interval, and the ratio of
the two; then every sensitivity chooses a plan for an average number of bits, by weights
(size) and by operations (bops), with the same exact solver. The true loss rise is the
KL divergence from the dense network on test images that nothing else has seen; plans
are compensated with 1024 augmented training images, or rounded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

import fitcompress as fc
from fitcompress import ops
from fitcompress.cli.models import trained_model
from fitcompress.data import load_dataset
from fitcompress.model import compressible_layers
from fitcompress.model.costs import count_macs
from fitcompress.progress import track
from fitcompress.search.optimum import solve
from fitcompress.train.evaluation import divergence

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import nn

    from fitcompress.data.dataset import Dataset

BITS = (6, 5, 4, 3, 2)
GRIDS = [fc.Grid(bits=bits) for bits in BITS]
HELD_OUT = 2000  # of the test images, for sensitivities measured on them
SAMPLES = 2048  # of a refinement: half of them compensate, half are measured on
DRAWS = 1000  # of the bootstrap

Table = tuple[str, "NDArray[np.float64]"]


def tables(model: nn.Module, source: Dataset, *, compensated: bool) -> list[Table]:
    """Return the sensitivities to compare, [L, bits] each."""
    fisher = fc.measure(
        model, source.calibration(), grids=GRIDS, sparsities=(0.0,), samples=512
    )
    weights = [layer.matrix() for layer in compressible_layers(model)]
    error = [ops.distortion_table(w, None, BITS, [], [0.0]) for w in weights]
    share = fisher.sizes / fisher.sizes.sum()
    found = [
        ("average bits", share[:, None] * -np.array(BITS, dtype=np.float64)),
        ("squared error", np.stack([e.distortion.numpy()[:, 0] for e in error])),
        ("Fisher", fisher.distortion[:, :, 0]),
    ]
    compensation = fc.Compensation() if compensated else None
    held_out = [source.test[0][i : i + 128] for i in range(0, HELD_OUT, 128)]
    for images, loader in (
        ("training", source.calibration(99)),
        ("held out", held_out),
    ):
        for temperature in (1.0, 4.0):
            options = fc.Refinement(
                samples=SAMPLES,
                grids=len(BITS),
                sparsities=0,
                temperature=temperature,
                compensation=compensation,
            )
            refined = fc.refine(fisher, model, loader, refinement=options)
            name = f"single layers, τ={temperature:g}, {images}"
            found.append((name, refined.distortion[:, :, 0]))
    return found


def plan_of(model: nn.Module, choice: NDArray[np.int64]) -> fc.Plan:
    """Return the plan that gives layer l its choice[l]-th number of bits."""
    layers = compressible_layers(model)
    return fc.Plan(
        {
            layer.name: fc.Level(GRIDS[int(k)], 0.0, tuple(layer.shape))
            for layer, k in zip(layers, choice, strict=True)
        }
    )


def predicted(table: NDArray[np.float64], choice: NDArray[np.int64]) -> float:
    """Return the sum over the layers."""
    return float(table[np.arange(len(table)), choice].sum())


def correlations(
    found: list[Table],
    choices: NDArray[np.int64],
    truth: NDArray[np.float64],
) -> list[dict[str, Any]]:
    """Return rank correlation, interval and ratios of every sensitivity."""
    draws = np.random.default_rng(0).integers(0, len(truth), (DRAWS, len(truth)))
    rows = []
    for name, table in found:
        guess = np.array([predicted(table, choice) for choice in choices])
        resampled = [spearmanr(guess[i], truth[i]).statistic for i in draws]
        low, high = np.nanquantile(resampled, [0.025, 0.975])
        ratio = truth / guess
        rows.append(
            {
                "sensitivity": name,
                "spearman": float(spearmanr(guess, truth).statistic),
                "interval": [float(low), float(high)],
                "true_over_predicted": [
                    float(x) for x in np.quantile(ratio, [0, 0.5, 1])
                ],
            }
        )
        print(
            f"{name:36} Spearman {rows[-1]['spearman']:.3f} [{low:.2f}, {high:.2f}], "
            f"true/predicted {np.median(ratio):.3g} ({ratio.min():.3g} … "
            f"{ratio.max():.3g})"
        )
    return rows


def decisions(
    found: list[Table],
    cost: NDArray[np.int64],
    average: float,
    true: Callable[[NDArray[np.int64]], float],
) -> dict[str, float]:
    """Return the true loss rise of the plan that every sensitivity chooses.

    Args:
        found: The sensitivities.
        cost: Weights or operations of every layer, [L].
        average: Bits, on average over the cost.
        true: Plan → true loss rise.
    """
    result = {}
    if average in BITS:
        result["uniform"] = true(np.full(len(cost), BITS.index(int(average))))
    table = cost[:, None] * np.array(BITS)
    for name, value in found:
        choice = solve(table[None], value, [int(average * cost.sum())]).choice
        result[name] = true(choice)
    return result


def main() -> None:
    """Measure, compare and print."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--data", required=True, type=Path, help="CIFAR-10, binary")
    options.add_argument("--weights", required=True, type=Path)
    options.add_argument("--network", default="resnet20")
    options.add_argument("--plans", type=int, default=50)
    options.add_argument("--averages", type=float, nargs="*", default=[3.0, 2.5])
    options.add_argument("--rounded", action="store_true", help="do not compensate")
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    model = trained_model(arguments.network, arguments.weights)
    source = load_dataset("cifar10", arguments.data)
    images = source.test[0][HELD_OUT:]
    test = [images[i : i + 500] for i in range(0, len(images), 500)]
    calibrate = None if arguments.rounded else source.calibration()
    known: dict[tuple[int, ...], float] = {}

    def true(choice: NDArray[np.int64]) -> float:
        key = tuple(int(k) for k in choice)
        if key not in known:
            plan = plan_of(model, choice)
            small = fc.apply(model, plan, calibrate, progress=False)
            known[key] = divergence(model, small, test)
        return known[key]

    found = tables(model, source, compensated=not arguments.rounded)
    result: dict[str, Any] = {"network": arguments.network}
    layers = len(found[0][1])
    if arguments.plans > 2:
        random = np.random.default_rng(0)
        choices = random.integers(0, len(BITS), (arguments.plans, layers))
        truth = np.array([true(c) for c in track(choices, "plans", len(choices))])
        result["random"] = correlations(found, choices, truth)
    macs = count_macs(model, source.test[0][:1])
    whole = compressible_layers(model)
    costs = {
        "size": np.array([layer.size for layer in whole]),
        "bops": np.array([macs[layer.name] for layer in whole]),
    }
    for kind, cost in costs.items():
        for average in arguments.averages:
            chosen = decisions(found, cost, average, true)
            result[f"{kind} {average:g}"] = chosen
            for name, value in chosen.items():
                print(f"{average:g} bits by {kind}, {name:36} KL {value:.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
