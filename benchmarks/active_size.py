"""FITCompress with a static metric: measuring and path search to an active size.

    python benchmarks/active_size.py --data DIR --weights resnet20-12fca82f.th
        [--goal 0.0296] [--plan THEIRS.safetensors]

The active size is that of the paper: kept weights · bits, over 32 bits for every
weight; masks and scales are not counted. Seconds are CPU time of one thread for the
whole ``measure`` and ``search``. The FIT distance Σ F (θ − θ̂)² is taken with a Fisher
diagonal that no plan was made with (other samples); with `--plan`, also for the weights
that another tool found (``pquant_search.py --plan``).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file

import fitcompress as fc
from fitcompress import ops
from fitcompress.cli.models import trained_model
from fitcompress.data import load_dataset
from fitcompress.methods import Optimal, PathSearch

if TYPE_CHECKING:
    from torch import Tensor

GRIDS = [fc.Grid(bits=bits) for bits in (8, 7, 6, 5, 4, 3, 2)]
SPARSITIES = tuple(float(s) for s in 1 - np.logspace(0, -2, 40))
JUDGE = 512  # samples of the Fisher diagonal that plans are judged by


def active(table: fc.Sensitivity) -> fc.Sensitivity:
    """Return the table with kept weights · bits as the size."""
    bits = np.array([grid.bits for grid in table.grids])
    count = table.sizes[:, None]
    kept = count - np.floor(table.sparsity * count).astype(np.int64)
    return dataclasses.replace(
        table,
        size_bits=bits[None, :, None] * kept[:, None, :],
        overhead_bytes=0,
        dense_bytes=4 * int(table.sizes.sum()),
    )


def rounded(weight: Tensor, level: fc.Level) -> Tensor:
    """Return the weights of a level: masked by magnitude, then rounded."""
    rows = weight.flatten(1)
    table = ops.distortion_table(rows, None, [level.grid.bits], [], [level.sparsity])
    mask = ops.pack_mask(ops.level_mask(table, 0, rows))
    largest = 2 ** (level.grid.bits - 1) - 1
    scale = table.range / largest
    return ops.fake_quantize_prune(rows, scale, mask, largest).view(weight.shape)


def main() -> None:
    """Search, judge and print."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--data", required=True, type=Path, help="CIFAR-10, binary")
    options.add_argument("--weights", required=True, type=Path, help="of a ResNet-20")
    options.add_argument("--goal", type=float, default=0.0296, help="active share")
    options.add_argument("--plan", type=Path, help="weights by layer to compare with")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    model = trained_model("resnet20", arguments.weights)
    source = load_dataset("cifar10", arguments.data)
    weights = {
        name.removesuffix(".weight"): value.detach()
        for name, value in model.named_parameters()
    }
    judge = fc.measure_fisher(
        model, source.calibration(1), diagonal=True, samples=JUDGE, progress=False
    )

    def distance(values: dict[str, Tensor]) -> float:
        return sum(
            float(
                (
                    judge.diagonal(name).view(value.shape).double()
                    * (weights[name] - value).double().square()
                ).sum()
            )
            for name, value in values.items()
        )

    begin = time.process_time()
    table = active(
        fc.measure(
            model,
            source.calibration(),
            grids=GRIDS,
            sparsities=SPARSITIES,
            progress=False,
        )
    )
    measured = time.process_time() - begin
    print(f"measure: {measured:.1f} s of CPU time")
    budget = fc.Budget(size=f"{100 * arguments.goal}%")
    for method in (PathSearch(), PathSearch(mode="greedy"), Optimal()):
        begin = time.process_time()
        plan = fc.search(table, budget, method=method, family="bits", masks=True)
        seconds = time.process_time() - begin
        found = {n: rounded(weights[n], level) for n, level in plan.levels.items()}
        share = 8 * plan.size_bytes / (32 * int(table.sizes.sum()))
        print(
            f"{plan.method}: {seconds:.3f} s, {measured + seconds:.1f} s with measure, "
            f"active share {share:.5f}, FIT distance {distance(found):.4f}"
        )
    if arguments.plan:
        theirs = load_file(arguments.plan)
        print(f"{arguments.plan.name}: FIT distance {distance(theirs):.4f}")


if __name__ == "__main__":
    main()
