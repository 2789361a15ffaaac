"""What plans really do to a network: divergences on test images, kept on disk."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

import fitcompress as fc
from fitcompress.data.batches import take
from fitcompress.files import write_atomically
from fitcompress.model import compressible_layers
from fitcompress.model.copies import copy_of

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from fitcompress.data.dataset import Dataset

__all__ = ["Cell", "Outcome", "Outcomes", "plan_of"]

SAMPLES = 1024  # that compensate


class Cell(NamedTuple):
    """A level that any layer may have: indices into a sensitivity's table."""

    grid: int
    sparsity: int = 0
    activation: int = 0


@dataclass(frozen=True)
class Outcome:
    """KL from the dense network in nats, and accuracy in per cent, on test images."""

    divergence: float
    accuracy: float


def plan_of(
    table: fc.Sensitivity, cells: list[Cell], choice: NDArray[np.int64]
) -> fc.Plan:
    """Return the plan that gives layer l the cell ``cells[choice[l]]``."""
    levels = {}
    for i, (name, k) in enumerate(zip(table.names, choice, strict=True)):
        cell = cells[int(k)]
        levels[name] = fc.Level(
            table.grids[cell.grid],
            float(table.sparsity[i, cell.sparsity]),
            tuple(table.shapes[i]),
            activation_bits=table.activation_bits[cell.activation],
        )
    return fc.Plan(levels)


class Outcomes:
    """Applies plans and scores them; an outcome that is known is not computed again.

    Args:
        model: The dense network.
        source: Its data.
        images: Which test images score.
        cache: File that keeps outcomes, or None.
    """

    def __init__(
        self, model: nn.Module, source: Dataset, images: slice, cache: Path | None
    ) -> None:
        self.model, self.source, self._cache = model, source, cache
        self._x, self._y = (part[images] for part in source.test)
        self._dense = self._logits(model)
        known = cache is not None and cache.exists()
        self._known: dict[str, list[float]] = (
            json.loads(cache.read_text()) if known and cache else {}
        )
        self._images = f"{images.start}-{images.stop}"

    def of(
        self, plan: fc.Plan, errors: str, *, draw: int = 0, tune: int = 0
    ) -> Outcome:
        """Return what a plan does.

        Args:
            plan: Its levels; a bound on bytes is met.
            errors: ``"compensated"``, ``"rounded"``, or ``"renormed"``: rounded, batch
                norms estimated anew.
            draw: Which training images compensate.
            tune: Fine-tune on so many training images afterwards.
        """
        levels = [(n, str(x), x.sparsity) for n, x in plan.levels.items()]
        what = repr((levels, plan.limit_bytes, errors, draw, tune, self._images))
        key = f"{zlib.crc32(what.encode()):08x}-{errors}-{draw}-{tune}"
        if key not in self._known:
            small = self._made(plan, errors, draw)
            if tune:
                self._tune(small, tune)
            self._known[key] = [*self._score(small)]
            if self._cache is not None:
                write_atomically(self._cache, json.dumps(self._known).encode())
        return Outcome(*self._known[key])

    def _made(self, plan: fc.Plan, errors: str, draw: int) -> nn.Module:
        inputs = [x for x, _ in take(self.source.calibration(1000 * draw), SAMPLES)]
        if errors == "compensated":
            return fc.apply(self.model, plan, inputs, progress=False)
        small = fc.apply(self.model, replace(plan, limit_bytes=None), progress=False)
        return small if errors == "rounded" else _renormed(self.model, small, inputs)

    def _tune(self, small: nn.Module, count: int) -> None:
        batches = list(take(self.source.training(64, seed=5), count))
        fc.finetune(small, batches, teacher=self.model, epochs=1, progress=False)

    def _logits(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(x) for x in self._x.split(250)]).double()

    def _score(self, model: nn.Module) -> tuple[float, float]:
        out = self._logits(model)
        p, q = self._dense.log_softmax(-1), out.log_softmax(-1)
        right = (out.argmax(-1) == self._y).double().mean()
        return float((p.exp() * (p - q)).sum(-1).mean()), 100 * float(right)


def _renormed(
    dense: nn.Module, small: nn.Module, inputs: list[torch.Tensor]
) -> nn.Module:
    """Return the dense network with the weights of ``small`` and its own norms anew."""
    made = copy_of(dense)
    plain = fc.remove(copy_of(small))
    for layer in compressible_layers(made):
        layer.weight.data = plain.get_submodule(layer.name).weight.detach().clone()
    norms: list[Any] = [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for x in inputs:
            made(x)
    return made.eval()
