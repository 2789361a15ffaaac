"""``apply``: put a model's weights where a plan wants them, without training."""

from __future__ import annotations

import copy
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fitcompress import _core
from fitcompress.compensate.attempts import Attempts
from fitcompress.compensate.fit import entropy_bits, fit
from fitcompress.compensate.masks import magnitude_mask
from fitcompress.compensate.statistics import InputCache, execution_order, second_moments
from fitcompress.compensate.sweep import compensated_codes
from fitcompress.data.batches import take
from fitcompress.errors import NonFiniteError
from fitcompress.model import Layer, check_finite, compressible_layers, fingerprint
from fitcompress.model.costs import overhead_bytes
from fitcompress.progress import Bar
from fitcompress.quantize import (
    WeightGrid,
    attach_grid,
    attach_plan,
    fold_norms_,
    round_leftovers_,
    row_scales,
)
from fitcompress.search.plan import Level, Plan
from fitcompress.sensitivity.table import Grid

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn

__all__ = ["Compressor", "apply"]


def apply(
    model: nn.Module,
    plan: Plan,
    calibrate: Iterable[Any] | None = None,
    *,
    samples: int | None = 1024,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Return a compressed copy of ``model`` with every layer at its level of ``plan``.

    With calibration data, each layer's rounding errors are compensated by its later
    weights and by the layers that follow (see ``compensate.sweep``); without, weights are
    rounded to the nearest level, which costs far more accuracy. Norms are folded to two
    numbers per channel and, like biases, rounded to 16 bits.

    If the plan bounds the bytes of the file, all entropy-coded steps are scaled by one
    factor until the packed file uses the budget and does not exceed it.

    Args:
        model: The trained network; unchanged.
        plan: For this model.
        calibrate: Yields inputs or (inputs, …) from the training distribution, without
            labels; a thousand are plenty.
        samples: How many to use, None for all.
        checkpoint: File to save progress to and resume from; removed at the end.
        progress: Show a bar with the time left.

    Returns:
        A copy with the same module types in eval mode, its weights on their grids.

    Raises:
        PlanMismatchError: The plan is for another model.
        BudgetExceededError: The packed file cannot meet the plan's budget.
        NonFiniteError: A weight or input is NaN or infinite.
        EmptyLoaderError: ``calibrate`` yields nothing.
        CalibrationError: A layer is never reached.
    """
    compressor = Compressor(
        model, plan, calibrate, samples=samples, checkpoint=checkpoint, progress=progress
    )
    small = fit(compressor, plan)
    compressor.attempts.forget()
    return small


class Compressor:
    """Compresses one model by one plan at any common factor on its steps.

    Args:
        model: The dense network.
        plan: Its plan.
        calibrate: Calibration batches, or None for plain rounding.
        samples: How many to use.
        checkpoint: Where finished layers are saved.
        progress: Show a bar.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        calibrate: Iterable[Any] | None,
        *,
        samples: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        self.layers = compressible_layers(model)
        plan.check({layer.name: layer.shape for layer in self.layers})
        check_finite(model)
        self.model, self.plan, self.progress = copy.deepcopy(model).eval(), plan, progress
        self.layers = compressible_layers(self.model)
        self.batches = None if calibrate is None else _inputs(calibrate, samples)
        key = fingerprint(self.model, self.layers) + f"-{_digest(plan, self.batches)}"
        self.attempts = Attempts(checkpoint, key)
        self.uses = {layer.name: 1 for layer in self.layers}
        if self.batches is not None:
            self.uses = execution_order(self.model, self.layers, self.batches[0])
            modules = dict(self.model.named_modules())
            self.inputs = InputCache(self.model, modules, self.uses, self.batches)

    def at(self, factor: float) -> nn.Module:
        """Return the compressed model with every step multiplied by ``factor``."""
        small = copy.deepcopy(self.model)
        fold_norms_(small)
        round_leftovers_(small)
        own = {layer.name: layer for layer in self.layers}
        modules = dict(small.named_modules())
        levels: dict[str, Level] = {}
        with Bar("apply: layers compensated", len(own), enabled=self.progress) as bar:
            for name in self.uses:
                level = scaled(self.plan.levels[name], factor)
                self._compress(own[name], small, modules[name], level, factor)
                levels[name] = level
                bar.advance(note=name)
        ordered = {name: levels[name] for name in self.plan.levels}
        attach_plan(small, replace(self.plan, levels=ordered))
        return small

    def overhead_bytes(self) -> int:
        """Return about what the file takes besides the codes."""
        return overhead_bytes(self.model, self.layers)

    def coded_bits(self, factor: float) -> float:
        """Return the bits that the coder needs for codes that were merely rounded."""
        levels = self.plan.levels
        return 8.0 * sum(
            len(_core.encode(self.codes(layer, scaled(levels[layer.name], factor)).numpy()))
            for layer in self.layers
        )

    def rounded_bits(self, factor: float) -> float:
        """Return the bits of all codes by their entropy if they were merely rounded."""
        levels = self.plan.levels
        return sum(
            entropy_bits(self.codes(layer, scaled(levels[layer.name], factor)))
            for layer in self.layers
        )

    def codes(self, layer: Layer, level: Level) -> torch.Tensor:
        """Return the codes of plain rounding, int32 [rows, columns]."""
        matrix = layer.matrix()
        scale, q = row_scales(matrix, level)
        safe = torch.where(scale > 0, scale, torch.inf).reshape(-1, 1)
        codes = (matrix / safe).round()
        codes = codes.clamp(-q, q) if q else codes
        mask = magnitude_mask(matrix, level.sparsity)
        return (codes if mask is None else codes * mask).int()

    def _compress(
        self, layer: Layer, small: nn.Module, module: nn.Module, level: Level, factor: float
    ) -> None:
        matrix = layer.matrix()
        scale, q = row_scales(matrix, level)
        mask = magnitude_mask(matrix, level.sparsity)
        codes = self.attempts.get(factor, layer.name)
        if codes is None:
            if self.batches is None:
                codes = self.codes(layer, level)
            else:
                h, c = second_moments(layer, self.inputs, small, module)
                codes = compensated_codes(
                    matrix, h, c, scale, mask=mask, max_code=q, name=layer.name
                )
            self.attempts.put(factor, layer.name, codes)
        shaped = None if mask is None else mask.reshape(layer.shape)
        weight = codes.float() * scale.reshape(-1, 1)
        attach_grid(module, WeightGrid(scale, q, shaped), weight)


def scaled(level: Level, factor: float) -> Level:
    """Return ``level`` with its step multiplied by ``factor``; fixed-point stays."""
    if level.grid.step is None:
        return level
    step = float(torch.tensor(level.grid.step * factor, dtype=torch.float32))
    return replace(level, grid=Grid(step=step))


def _inputs(loader: Iterable[Any], samples: int | None) -> list[torch.Tensor]:
    batches = [x.detach() for x, _ in take(loader, samples)]
    for x in batches:
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise NonFiniteError(
                "a calibration input is NaN or infinite",
                wanted="finite inputs",
                fix="look for NaN in the calibration data",
            )
    return batches


def _digest(plan: Plan, batches: list[torch.Tensor] | None) -> str:
    crc = zlib.crc32(plan.to_json().encode())
    for x in batches or []:
        crc = zlib.crc32(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), crc)
    return f"{crc:08x}"
