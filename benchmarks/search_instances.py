"""Multiple-choice knapsacks: generated ones, and tables of trained networks.

A generated layer has n weights, log-uniform between 10³ and 10⁷, normally distributed,
and 6 bits × 16 sparsities. Its distortion is ½ n F̄ σ² E(θ − θ̂)², computed by rounding
the quantiles of a normal distribution, times noise; F̄ σ² spreads over four orders of
magnitude. The first cost is the stored size in bits: entropy of the zeros, fixed-length
codes for the rest, scales. The second are bit operations, MACs · b · 8.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

import fitcompress as fc
from fitcompress.cli.models import trained_model
from fitcompress.data import load_dataset
from fitcompress.sensitivity.table import Grid

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Instance", "generated", "measured", "with_budget"]

BITS = (8, 6, 5, 4, 3, 2)
SPARSITIES = tuple(0.95 * i / 16 for i in range(16))
ACTIVATION_BITS = 8
NOISE = 0.05  # standard deviation of the logarithm of a distortion
SAMPLES = 256  # that the Fisher diagonal of a trained network is averaged over
TIGHTER = 0.8  # the second budget, of what a plan under the first alone spends
POINTS = 1024  # of the normal distribution
HALF = np.array(
    [NormalDist().inv_cdf(0.5 + (i + 0.5) / (2 * POINTS)) for i in range(POINTS)]
)


@dataclass(frozen=True)
class Instance:
    """Minimise Σ_l D_l(k_l) subject to Σ_l c^m_l(k_l) ≤ C^m for every m.

    Attributes:
        name: For the table.
        cost: c, [M, L, K], integer.
        value: D, [L, K].
        limits: C, M of them.
        reference: The value of some plan within the limits, not far from the best.
            Solvers may scale by it; finding it is not timed.
    """

    name: str
    cost: NDArray[np.int64]
    value: NDArray[np.float64]
    limits: tuple[int, ...]
    reference: float

    def spent(self, choice: NDArray[np.int64]) -> list[int]:
        """Return the costs of a plan, exactly."""
        layers = np.arange(len(choice))
        return [sum(map(int, cost[layers, choice])) for cost in self.cost]

    def objective(self, choice: NDArray[np.int64]) -> float:
        """Return the value of a plan."""
        return float(self.value[np.arange(len(choice)), choice].sum())


def relaxed(
    cost: NDArray[np.int64], value: NDArray[np.float64], limit: int
) -> NDArray[np.int64]:
    """Return the plan of the smallest multiplier, D + μ c, that meets one limit."""
    layers = np.arange(len(value))
    low, high = 0.0, 1e6 * value.sum() / max(int(cost.max()), 1)
    best = cost.argmin(1)
    for _ in range(200):
        middle = (low * high) ** 0.5 if low else high / 1e3
        chosen = (value + middle * cost).argmin(1)
        if cost[layers, chosen].sum() <= limit:
            best, high = chosen, middle
        else:
            low = middle
    return best


def with_budget(
    name: str,
    cost: NDArray[np.int64],
    value: NDArray[np.float64],
    fraction: float,
) -> Instance:
    """Return an instance that bounds the first cost to a fraction of its range.

    The second, if there is a second cost, is 80 % of the way from the least one to what
    a plan under the first limit alone spends, so that both bind.
    """
    layers = np.arange(len(value))
    least = [int(each.min(1).sum()) for each in cost]
    limit = least[0] + int(fraction * (int(cost[0].max(1).sum()) - least[0]))
    plan = relaxed(cost[0], value, limit)
    limits = [limit]
    if len(cost) > 1:
        spent = int(cost[1][layers, plan].sum())
        limits.append(least[1] + int(TIGHTER * (spent - least[1])))
        share = cost / np.array(limits, dtype=np.float64)[:, None, None]
        both = np.rint(1e6 * share.sum(0)).astype(np.int64)
        total = int(both[layers, plan].sum())
        while any(
            int(each[layers, plan].sum()) > bound
            for each, bound in zip(cost, limits, strict=True)
        ):
            total = int(0.97 * total)
            plan = relaxed(both, value, total)
    reference = float(value[layers, plan].sum())
    return Instance(name, cost, value, tuple(limits), reference)


def generated(layers: int, budgets: int, fraction: float, seed: int) -> Instance:
    """Return a made-up network of so many layers under one or two budgets."""
    random = np.random.default_rng([layers, seed])
    count = np.rint(10 ** random.uniform(3, 7, layers))
    positions = 4.0 ** random.integers(0, 6, layers)
    weight = 0.5 * count * 10 ** random.uniform(-4, 0, layers)
    error, nonzero = zip(*map(rounded, random.uniform(3, 5, layers)), strict=True)
    noise = np.exp(NOISE * random.standard_normal((layers, len(error[0]))))
    value = weight[:, None] * np.array(error) * noise
    bits = np.repeat(BITS, len(SPARSITIES)).astype(np.float64)
    share = np.clip(np.array(nonzero), 1e-9, 1 - 1e-9)
    entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    codes = share * np.log2(2**bits - 2)
    size = count[:, None] * (entropy + codes) + 32 * np.sqrt(count)[:, None]
    operations = (count * positions)[:, None] * bits * ACTIVATION_BITS
    cost = np.rint([size, operations][:budgets]).astype(np.int64)
    return with_budget(f"generated, seed {seed}", cost, value, fraction)


def rounded(reach: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean squared errors and shares of non-zeros of one normal layer, [K].

    Args:
        reach: Largest weight in standard deviations.
    """
    cuts = [int(s * POINTS) for s in SPARSITIES]
    error, nonzero = [], []
    for bits, cut in product(BITS, cuts):
        step = reach / (2 ** (bits - 1) - 1)
        codes = np.rint(HALF / step)
        codes[:cut] = 0
        error.append(np.square(HALF - codes * step).mean())
        nonzero.append((codes != 0).mean())
    return np.array(error), np.array(nonzero)


def measured(
    weights: Path, data: Path, budgets: int, fractions: list[float]
) -> list[Instance]:
    """Return the problems of a trained network, size first, then bit operations.

    The table is kept in the folder for temporary files.

    Args:
        weights: Checkpoint whose name starts with that of the network and a dash.
        data: Folder of CIFAR-10's binary files.
        budgets: 1 or 2.
        fractions: One problem each.
    """
    network = weights.stem.split("-")[0]
    name = f"fitcompress-search-{weights.stem}.safetensors"
    cache = Path(tempfile.gettempdir()) / name
    if not cache.exists():
        fc.measure(
            trained_model(network, weights),
            load_dataset("cifar10", data).calibration(),
            samples=SAMPLES,
            grids=[Grid(bits=b) for b in BITS],
            sparsities=SPARSITIES,
            progress=False,
        ).save(cache)
    table = fc.Sensitivity.load(cache)
    layers = len(table.names)
    costs = [table.size_bits, table.bops(0)][:budgets]
    cost = np.stack([each.reshape(layers, -1) for each in costs])
    value = table.distortion.reshape(layers, -1)
    return [
        with_budget(f"{network}, {fraction:g} of the range", cost, value, fraction)
        for fraction in fractions
    ]
