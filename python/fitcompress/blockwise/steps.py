"""Factors on the steps of a plan, so that the packed file uses its limit.

A decoder passes through memory once: there is no second attempt. What a layer's codes
take is told beforehand by coding some of its rows, merely rounded; what it took in the
end is made up for by the layers that follow, see ``Pace``.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import torch

from fitcompress import _core
from fitcompress.compensate.compressor import scaled
from fitcompress.compensate.rounding import rounded_matrix
from fitcompress.compensate.size_fit import TOLERANCE, WIDEST, Pace, entropy_bits
from fitcompress.errors import BudgetExceededError
from fitcompress.files import write_atomically
from fitcompress.model.costs import overhead_bytes
from fitcompress.progress import Bar

if TYPE_CHECKING:
    from pathlib import Path

    from fitcompress.blockwise.skeleton import Skeleton
    from fitcompress.blockwise.values import Values
    from fitcompress.model import Layer
    from fitcompress.search.plan import Level, Plan

__all__ = ["pace_for"]

SAMPLE = 1 << 17  # weights of a layer that are coded to learn its size
BISECTIONS = 16
CLEARLY = 1.2  # times the limit: no compensation makes up for that


def pace_for(
    plan: Plan, skeleton: Skeleton, values: Values, file: Path, *, progress: bool
) -> Pace:
    """Return what gives every layer its factor: 1 for all without a limit or steps.

    Args:
        plan: Levels and limit.
        skeleton: The model.
        values: Its weights: all are read once, unless ``file`` is there.
        file: Where what was learnt is kept, so that a resumed run goes on as it began.
        progress: Show a bar.

    Raises:
        BudgetExceededError: There are no steps, and the codes take clearly more.
    """
    limit = plan.limit_bytes
    if limit is None:
        return Pace("blocks", 1.0)
    if not file.exists():
        about = _learn(plan, limit, skeleton, values, progress=progress)
        write_atomically(file, json.dumps(about).encode())
    about = json.loads(file.read_bytes())
    return Pace("blocks", **about)


def _learn(
    plan: Plan, limit: int, skeleton: Skeleton, values: Values, *, progress: bool
) -> dict[str, object]:
    rows: dict[str, torch.Tensor] = {}
    with Bar(
        "compensate: sizes of layers", len(skeleton.layers), enabled=progress
    ) as bar:
        for layer in skeleton.layers:
            rows[layer.name] = _some_rows(values.dense(f"{layer.name}.weight"))
            bar.advance(note=layer.name)
    layers = {layer.name: layer for layer in skeleton.layers}

    def sizes(factor: float, *, coded: bool) -> dict[str, float]:
        return {
            name: _bytes(layers[name], scaled(level, factor), rows[name], coded=coded)
            for name, level in plan.levels.items()
        }

    overhead = overhead_bytes(skeleton.model, skeleton.layers)
    target = (1 - TOLERANCE / 2) * limit - overhead
    ratio = sum(sizes(1.0, coded=True).values())
    if all(level.grid.step is None for level in plan.levels.values()):
        _check(overhead + ratio, limit)
        return {"factor": 1.0}
    ratio /= max(sum(sizes(1.0, coded=False).values()), 1.0)
    low, high = -math.log(WIDEST), math.log(WIDEST)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        size = ratio * sum(sizes(math.exp(middle), coded=False).values())
        low, high = (middle, high) if size > target else (low, middle)
    factor = math.exp((low + high) / 2)
    here = sum(sizes(factor, coded=False).values())
    there = sum(sizes(1.05 * factor, coded=False).values())
    slope = math.log(max(here, 1.0) / max(there, 1.0)) / math.log(1.05)
    expected = sizes(factor, coded=True)
    return {"factor": factor, "expected": expected, "target": target, "slope": slope}


def _check(size: float, limit: int) -> None:
    """Raise if fixed-point codes cannot fit: there is nothing to scale then."""
    if size > CLEARLY * limit:
        raise BudgetExceededError(
            "the packed file would exceed the plan's budget; nothing was done",
            size_bytes=round(size),
            got=f"about {round(size)} bytes, by some rows of every layer",
            wanted=f"at most {limit} bytes",
            fix="search again with a smaller budget or with entropy-coded steps",
        )


def _some_rows(weight: torch.Tensor) -> torch.Tensor:
    """Return rows at equal distances, a copy."""
    count = min(len(weight), max(1, SAMPLE // weight.shape[1]))
    index = torch.arange(count) * len(weight) // count
    return weight[index]


def _bytes(layer: Layer, level: Level, rows: torch.Tensor, *, coded: bool) -> float:
    """Return the bytes of a layer's codes, by those of some of its rows."""
    codes = rounded_matrix(rows, level).codes
    size = len(_core.encode(codes.numpy())) if coded else entropy_bits(codes) / 8
    return size * layer.rows / len(rows)
