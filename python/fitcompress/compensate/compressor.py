"""Put a model's weights where a plan wants them, without training."""

from __future__ import annotations

import copy
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fitcompress import _core
from fitcompress.compensate.activations import (
    check_activations,
    input_bits,
    quantize_activations,
)
from fitcompress.compensate.attempts import Attempts
from fitcompress.compensate.calibration import prepare
from fitcompress.compensate.dense_pass import DensePass, remembered
from fitcompress.compensate.lockstep import Lockstep, not_reached
from fitcompress.compensate.one_layer import Now, compensated
from fitcompress.compensate.options import Compensation
from fitcompress.compensate.outlets import find_outlets
from fitcompress.compensate.residual_search import find_residuals
from fitcompress.compensate.rounding import rounded
from fitcompress.compensate.shared import shared_inputs, shared_quantized
from fitcompress.compensate.size_fit import Pace, entropy_bits
from fitcompress.compensate.target import DRIFT
from fitcompress.compensate.trust import judge
from fitcompress.data.batches import batch_size, digest, join, part
from fitcompress.files import check_writable
from fitcompress.model import Layer, check_finite, compressible_layers, fingerprint
from fitcompress.model.copies import copy_of
from fitcompress.model.costs import overhead_bytes
from fitcompress.progress import Bar
from fitcompress.quantize import (
    WeightGrid,
    attach_grid,
    attach_plan,
    fold_norms_,
    norm_digits,
    remove,
    round_leftovers_,
    shorten_norms_,
)
from fitcompress.sensitivity.kept_filters import kept_filters
from fitcompress.sensitivity.mask_rules import check_rule, importance_of
from fitcompress.sensitivity.table import Grid
from fitcompress.threads import FIXED, threads
from fitcompress.versions import __version__

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from fitcompress.compensate.calibration import Calibration
    from fitcompress.compensate.dense_pass import Answer
    from fitcompress.compensate.residuals import Residual
    from fitcompress.compensate.sweep import Quantized
    from fitcompress.search.plan import Level, Plan
    from fitcompress.sensitivity.mask_rules import MaskRule

__all__ = ["Compressor"]


class Compressor:
    """Compresses one model by one plan at any factor on its steps.

    Args:
        model: The dense network.
        plan: Its plan.
        calibrate: Calibration batches, or None for plain rounding.
        samples: How many to use.
        compensation: What compensation does.
        masks: What masks drop, None: see :func:`apply`.
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
        compensation: Compensation | None = None,
        masks: MaskRule | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        self.layers = compressible_layers(model)
        plan.check({layer.name: layer.shape for layer in self.layers})
        check_finite(model)
        self._input_bits = input_bits(plan)
        check_activations(model, self._input_bits, calibrated=calibrate is not None)
        if checkpoint is not None:
            check_writable(checkpoint)
        # It may be compressed already.
        self.model = remove(copy_of(model), activations=True).eval()
        self.plan, self.progress = plan, progress
        self.options = compensation or Compensation()
        self.layers = compressible_layers(self.model)
        masks = kept_filters(plan.details) if masks is None else masks
        self._masks = masks
        if masks is not None:
            check_rule(masks, self.layers)
        self._folded = copy_of(self.model)
        fold_norms_(self._folded)
        round_leftovers_(self._folded, [layer.weight for layer in self.layers])
        self.calibration: Calibration | None = None
        self._kept: dict[str, list[Answer]] | None = None
        if calibrate is not None:
            modules = {layer.name: layer.module for layer in self.layers}
            with threads(FIXED):
                self.calibration = prepare(self.model, modules, calibrate, samples)
                few = part(self.calibration.batches[0], slice(16))
                self._look_around(few)
        self.attempts = Attempts(checkpoint, self._key())
        self._judging = True

    def _look_around(self, few: Any) -> None:
        """Learn what follows layers, is added to them, and reads shared weights."""
        assert self.calibration is not None
        batches, options = self.calibration.batches, self.options
        self._outlets = find_outlets(self._folded, self.layers, few)
        self._residuals: dict[str, Residual] = {}
        if options.residual:
            two = part(few if batch_size(few) > 1 else join([few, few]), slice(2))
            self._residuals = find_residuals(
                self._folded, self.layers, self._outlets, two
            )
        self._shared_inputs: dict[str, torch.Tensor] = {}
        if options.shared:
            self._shared_inputs = shared_inputs(self.model, self.layers, batches)

    def with_plan(self, plan: Plan) -> Compressor:
        """Return one for another plan that shares model, inputs and options.

        It keeps no attempts, and what can be said of the inputs has been said before.
        """
        plan.check({layer.name: layer.shape for layer in self.layers})
        check_activations(
            self.model, input_bits(plan), calibrated=self.calibration is not None
        )
        other = copy.copy(self)
        other.plan, other._input_bits = plan, input_bits(plan)
        other.attempts, other._judging = Attempts(None, ""), False
        return other

    def twin(self) -> Compressor:
        """Return one that may work at the same time as this one, in another thread.

        It has a dense network of its own; the inputs are shared.
        """
        other = copy.copy(self)
        other.model = copy_of(self.model)
        other.layers = compressible_layers(other.model)
        return other

    def remember_dense(self, limit: int) -> None:
        """Keep what the dense layers answer, for all plans, if it fits in ``limit``."""
        assert self.calibration is not None
        layers = {layer.name: layer for layer in self.layers if not layer.tied}
        batches = self.calibration.batches
        self._kept = remembered(self.model, layers, batches, limit, self._residuals)

    def _key(self) -> str:
        made_by = (__version__, torch.__version__)
        about = f"{self.plan.to_json()}{self.options}{made_by}"
        crc = zlib.crc32(about.encode())
        for x in self.calibration.batches if self.calibration else []:
            crc = digest(x, crc)
        key = f"{fingerprint(self.model, self.layers)}-{crc:08x}"
        return key if self._masks is None else f"{key}-{self._masks.digest()}"

    def at(self, pace: Pace, *, pilot: bool = False) -> nn.Module:
        """Return the compressed model with steps multiplied by the factors of ``pace``.

        Args:
            pace: Gives each layer's factor, and is told the bytes of its codes.
            pilot: On a few samples and by the plain sweep, to learn the size.
        """
        small = copy_of(self._folded)
        self._digits = norm_digits(self.plan)
        shorten_norms_(small, self._digits)
        levels: dict[str, Level] = {}
        with Bar(
            f"apply: {pace.label}", len(self.layers), enabled=self.progress
        ) as bar:
            if self.calibration is None:
                for layer in self.layers:
                    made = self._rounded_at_pace(layer, levels, pace)
                    self._attach(small, layer, made)
                    bar.advance(note=layer.name)
            else:
                self._compensate(small, levels, pace, bar, pilot=pilot)
        if self.calibration is not None:
            few = self.calibration.pilot() if pilot else None
            batches = (few or self.calibration).batches
            quantize_activations(small, self._input_bits, batches)
        levels = {name: levels[name] for name in self.plan.levels}
        distortion = sum(level.distortion for level in levels.values())
        attach_plan(small, replace(self.plan, levels=levels, distortion=distortion))
        return small

    def _compensate(
        self,
        small: nn.Module,
        levels: dict[str, Level],
        pace: Pace,
        bar: Bar,
        *,
        pilot: bool,
    ) -> None:
        """Walk dense and compressed network side by side, layer by layer."""
        assert self.calibration is not None
        calibration = (self.calibration.pilot() if pilot else None) or self.calibration
        options = self.options
        if pilot:  # what is cheap tells the size as well
            drift = DRIFT if options.drift is None else options.drift
            options = replace(options, beam=1, drift=drift)
        for layer in self.layers:
            if layer.tied:  # used in several places, the first of which comes first
                shared = self._shared(layer, levels, pace, options)
                self._attach(small, layer, shared)
                pace.spent(layer.name, _coded_bytes(shared.codes))
                bar.advance(note=layer.name)
        layers = {layer.name: layer for layer in self.layers if not layer.tied}
        modules = dict(small.named_modules())
        inputs, residuals = calibration.batches, self._residuals
        dense = DensePass(self.model, layers, inputs, residuals, self._kept)
        now = Lockstep(small, {n: modules[n] for n in layers}, inputs, residuals)
        trusts = []
        with dense, now:
            for _ in layers:
                answers, reached = dense.advance(), now.advance()
                if answers is None or reached is None:
                    raise not_reached(layers, levels)
                name, layer = reached.name, layers[reached.name]
                factor = pace.factor(name)
                level = levels[name] = scaled(self.plan.levels[name], factor)
                made = self.attempts.get(pace.label, name, layer.weight.device)
                if made is None:
                    made = self._quantized(
                        layer,
                        level,
                        Now(layer, answers[1], reached, residuals.get(name)),
                        calibration,
                        options,
                        self._widening(factor),
                    )
                    self.attempts.put(pace.label, name, made)
                self._attach(small, layer, made)
                self._outlets[name].adjust(small, made.shift, made.gain, self._digits)
                pace.spent(name, _coded_bytes(made.codes))
                trusts.append(made.trust)
                bar.advance(note=name)
        if self._judging and not pilot:
            judge(trusts, calibration.samples)

    def _quantized(
        self,
        layer: Layer,
        level: Level,
        now: Now,
        calibration: Calibration,
        options: Compensation,
        widen: float,
    ) -> Quantized:
        """Compensate one layer, or round an embedding."""
        if layer.rounded_alone:
            return self._rounded(layer, level, widen)
        return compensated(
            layer,
            level,
            now,
            calibration.held_out,
            options,
            self._outlets[layer.name],
            importance=self._importance(layer, level),
            widen=widen,
        )

    def _shared(
        self,
        layer: Layer,
        levels: dict[str, Level],
        pace: Pace,
        options: Compensation,
    ) -> Quantized:
        """Compensate a shared weight at the factor of ``pace``, and note its level."""
        inputs = self._shared_inputs.get(layer.name)
        if inputs is None:
            return self._rounded_at_pace(layer, levels, pace)
        factor = pace.factor(layer.name)
        level = levels[layer.name] = scaled(self.plan.levels[layer.name], factor)
        made = self.attempts.get(pace.label, layer.name, layer.weight.device)
        if made is None:
            made = shared_quantized(
                layer,
                inputs,
                level,
                options,
                importance=self._importance(layer, level),
                widen=self._widening(factor),
            )
            self.attempts.put(pace.label, layer.name, made)
        return made

    def _rounded_at_pace(
        self, layer: Layer, levels: dict[str, Level], pace: Pace
    ) -> Quantized:
        """Round a layer at the factor of ``pace``, and note its level."""
        factor = pace.factor(layer.name)
        level = scaled(self.plan.levels[layer.name], factor)
        levels[layer.name] = level
        return self._rounded(layer, level, self._widening(factor))

    def _rounded(self, layer: Layer, level: Level, widen: float = 1.0) -> Quantized:
        return rounded(layer, level, self._importance(layer, level), widen)

    def _widening(self, factor: float) -> float:
        """Return the factor on fixed-point scales: theirs only where no step is there.

        They are the best there are, so they only ever grow, and only for the size.
        """
        levels = self.plan.levels.values()
        if any(level.grid.step is not None for level in levels):
            return 1.0
        return max(factor, 1.0)

    def _codes(self, factor: float) -> Iterator[torch.Tensor]:
        """Yield the codes of all layers if they were merely rounded."""
        for layer in self.layers:
            level = scaled(self.plan.levels[layer.name], factor)
            yield self._rounded(layer, level, self._widening(factor)).codes

    def _importance(self, layer: Layer, level: Level) -> torch.Tensor | None:
        """Return what the rule for masks makes of a layer, if it is needed."""
        if self._masks is None or not level.sparsity:
            return None
        return importance_of(self._masks, layer)

    def _attach(self, small: nn.Module, layer: Layer, made: Quantized) -> None:
        weight = made.codes.float() * made.scale.reshape(-1, 1)
        q = _largest_code(self.plan.levels[layer.name])
        module = small.get_submodule(layer.name)
        # Not shared with the dense network, but among the same modules as there.
        module.weight = nn.Parameter(torch.empty_like(layer.weight))
        tied = [small.get_submodule(name) for name, _ in layer.tied]
        attach_grid(module, WeightGrid(made.scale, q, made.mask), weight, tied)

    def overhead_bytes(self) -> int:
        """Return about what the file takes besides the codes."""
        return overhead_bytes(self.model, self.layers)

    def coded_bits(self, factor: float) -> float:
        """Return the bits that the coder needs for codes that were merely rounded."""
        return 8.0 * sum(map(_coded_bytes, self._codes(factor)))

    def rounded_bits(self, factor: float) -> float:
        """Return the bits of all codes by their entropy if they were merely rounded."""
        return sum(map(entropy_bits, self._codes(factor)))


def scaled(level: Level, factor: float) -> Level:
    """Return ``level`` with its step multiplied by ``factor``; fixed-point stays.

    The predicted loss rise grows with the square of the step.
    """
    if level.grid.step is None:
        return level
    step = float(torch.tensor(level.grid.step * factor, dtype=torch.float32))
    return replace(level, grid=Grid(step=step), distortion=level.distortion * factor**2)


def _largest_code(level: Level) -> int:
    return 0 if level.grid.bits is None else 2 ** (level.grid.bits - 1) - 1


def _coded_bytes(codes: torch.Tensor) -> int:
    return len(_core.encode(codes.cpu().numpy()))
