"""``apply``: put a model's weights where a plan wants them, without training."""

from __future__ import annotations

import copy
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fitcompress import _core
from fitcompress.compensate.attempts import Attempts
from fitcompress.compensate.lockstep import Lockstep
from fitcompress.compensate.masks import magnitude_mask
from fitcompress.compensate.size_fit import entropy_bits, fit
from fitcompress.compensate.statistics import check_reached, second_moments
from fitcompress.compensate.sweep import compensated_codes
from fitcompress.data.batches import take
from fitcompress.errors import NonFiniteError
from fitcompress.files import check_writable
from fitcompress.model import Layer, check_finite, compressible_layers, fingerprint
from fitcompress.model.costs import overhead_bytes
from fitcompress.progress import Bar
from fitcompress.quantize import (
    WeightGrid,
    attach_grid,
    attach_plan,
    fold_norms_,
    remove,
    round_leftovers_,
    row_scales,
)
from fitcompress.sensitivity.table import Grid
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn

    from fitcompress.search.plan import Level, Plan

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
    weights and by the layers that follow (see ``compensate.sweep``); without, weights
    are rounded to the nearest level, which costs far more accuracy. Norms are folded to
    two numbers per channel and, like biases, rounded to 16 bits.

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
        model,
        plan,
        calibrate,
        samples=samples,
        checkpoint=checkpoint,
        progress=progress,
    )
    with threads(FIXED):
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
        if checkpoint is not None:
            check_writable(checkpoint)
        self.model = remove(copy.deepcopy(model)).eval()  # it may be compressed already
        self.plan, self.progress = plan, progress
        self.layers = compressible_layers(self.model)
        self.batches = None if calibrate is None else _inputs(calibrate, samples)
        key = fingerprint(self.model, self.layers) + f"-{_digest(plan, self.batches)}"
        self.attempts = Attempts(checkpoint, key)
        if self.batches is not None:
            check_reached(self.model, self.layers, self.batches[0][:2])

    def at(self, factor: float) -> nn.Module:
        """Return the compressed model with every step multiplied by ``factor``."""
        small = copy.deepcopy(self.model)
        fold_norms_(small)
        round_leftovers_(small)
        levels = {n: scaled(level, factor) for n, level in self.plan.levels.items()}
        with Bar("apply: layers", len(self.layers), enabled=self.progress) as bar:
            if self.batches is None:
                for layer in self.layers:
                    codes = self.codes(layer, levels[layer.name])
                    self._attach(small, layer, levels[layer.name], codes)
                    bar.advance(note=layer.name)
            else:
                self._compensate(small, levels, factor, bar)
        distortion = sum(level.distortion for level in levels.values())
        attach_plan(small, replace(self.plan, levels=levels, distortion=distortion))
        return small

    def _compensate(
        self, small: nn.Module, levels: dict[str, Level], factor: float, bar: Bar
    ) -> None:
        """Walk dense and compressed network side by side, layer by layer."""
        assert self.batches is not None
        layers = {layer.name: layer for layer in self.layers}
        modules = dict(small.named_modules())
        dense = Lockstep(
            self.model, {n: x.module for n, x in layers.items()}, self.batches
        )
        now = Lockstep(small, {n: modules[n] for n in layers}, self.batches)
        with dense, now:
            for _ in layers:
                reached, reached_now = dense.advance(), now.advance()
                assert reached is not None
                assert reached_now is not None
                name, inputs = reached
                level, layer = levels[name], layers[name]
                codes = self.attempts.get(factor, name)
                if codes is None:
                    h, c = second_moments(layer, inputs, reached_now[1])
                    matrix = layer.matrix()
                    scale, q = row_scales(matrix, level)
                    mask = magnitude_mask(matrix, level.sparsity)
                    codes = compensated_codes(
                        matrix, h, c, scale, mask=mask, max_code=q, name=name
                    )
                    self.attempts.put(factor, name, codes)
                self._attach(small, layer, level, codes)
                bar.advance(note=name)

    def _attach(
        self, small: nn.Module, layer: Layer, level: Level, codes: torch.Tensor
    ) -> None:
        matrix = layer.matrix()
        scale, q = row_scales(matrix, level)
        mask = magnitude_mask(matrix, level.sparsity)
        shaped = None if mask is None else mask.reshape(layer.shape)
        weight = codes.float() * scale.reshape(-1, 1)
        attach_grid(
            small.get_submodule(layer.name), WeightGrid(scale, q, shaped), weight
        )

    def overhead_bytes(self) -> int:
        """Return about what the file takes besides the codes."""
        return overhead_bytes(self.model, self.layers)

    def coded_bits(self, factor: float) -> float:
        """Return the bits that the coder needs for codes that were merely rounded."""
        levels = self.plan.levels
        return 8.0 * sum(
            len(
                _core.encode(
                    self.codes(layer, scaled(levels[layer.name], factor)).numpy()
                )
            )
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


def scaled(level: Level, factor: float) -> Level:
    """Return ``level`` with its step multiplied by ``factor``; fixed-point stays.

    The predicted loss rise grows with the square of the step.
    """
    if level.grid.step is None:
        return level
    step = float(torch.tensor(level.grid.step * factor, dtype=torch.float32))
    return replace(level, grid=Grid(step=step), distortion=level.distortion * factor**2)


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
        crc = zlib.crc32(
            x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), crc
        )
    return f"{crc:08x}"
