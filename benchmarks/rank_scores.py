"""How well sensitivities rank plans and choose one: numbers and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from fitcompress.search.optimum import solve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    Reals = NDArray[np.float64]
    Choice = NDArray[np.int64]

BITS = (6, 5, 4, 3, 2)
DRAWS = 1000  # of the bootstrap
Table = tuple[str, "Reals"]


def predicted(table: Reals, choice: Choice) -> float:
    """Return the sum over the layers."""
    return float(table[np.arange(len(table)), choice].sum())


def correlations(
    found: list[Table],
    choices: Choice,
    truth: Reals,
    guesses: dict[str, Reals] | None = None,
) -> list[dict[str, Any]]:
    """Return rank correlation, interval and ratios of every sensitivity.

    Args:
        found: Tables, [L, cells] each.
        choices: Plans, [P, L].
        truth: True loss rises, [P].
        guesses: Predictions, [P], that are no sums over layers.
    """
    draws = np.random.default_rng(0).integers(0, len(truth), (DRAWS, len(truth)))
    every = {
        name: np.array([predicted(table, choice) for choice in choices])
        for name, table in found
    } | (guesses or {})
    rows = []
    for name, guess in every.items():
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
                "predicted": [float(x) for x in guess],
            }
        )
        print(
            f"  {name:36} Spearman {rows[-1]['spearman']:.3f} [{low:.2f}, {high:.2f}], "
            f"true/predicted {np.median(ratio):.3g} ({ratio.min():.3g} … "
            f"{ratio.max():.3g})"
        )
    return rows


def decisions(
    found: list[Table],
    cost: Choice,
    average: float,
    true: Callable[[Choice], float],
) -> dict[str, float]:
    """Return the true loss rise of the plan that every sensitivity chooses.

    Args:
        found: The sensitivities, a column for each of `BITS`.
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


def draw_figure(result: dict[str, Any], regime: str, path: Path) -> None:
    """Draw predicted against true loss rises, log-log, a panel for each metric."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    found = result[regime]
    shown = [row for row in found["rows"] if min(row["predicted"]) > 0]
    columns = 4
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3 * columns, 2.6 * rows), sharey=True, squeeze=False
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, row in zip(axes.flat, shown, strict=False):
        axis.loglog(row["predicted"], found["true"], ".", markersize=3)
        ends = [min(row["predicted"]), max(row["predicted"])]
        axis.loglog(ends, ends, color="0.6", linewidth=0.8)
        axis.set_title(f"{row['sensitivity']}\nρ = {row['spearman']:.2f}", fontsize=7)
        axis.tick_params(labelsize=6)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(0.7 * min(found["true"]), 1.4 * max(found["true"]))
    for axis in axes[:, 0]:
        axis.set_ylabel("true KL, nats", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
