"""Calibration inputs: cut to size, and checked before any work starts."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fitcompress.data.batches import (
    batch_size,
    floats,
    join,
    part,
    sample_shapes,
    take,
    tensors,
    with_tensors,
)
from fitcompress.errors import CalibrationError, NonFiniteError
from fitcompress.model.devices import device_of
from fitcompress.model.forward import call_model
from fitcompress.model.patches import layer_input
from fitcompress.progress import Bar
from fitcompress.quantize import is_folded

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__all__ = [
    "Calibration",
    "check_independent",
    "largest_input",
    "norm_divergence",
    "prepare",
]

logger = logging.getLogger(__name__)

LARGEST_BATCH = 128
BATCHES = 8  # at least so many, if there are as many samples
PASSES = 64  # at most so many: each is a thread
BATCH_BYTES = 2**26  # of the largest input of a layer
HELD_OUT = 4  # every so many-th batch chooses the drift
PILOT = 128  # samples that find the size of the file
FOREIGN = 0.01  # nats per channel between the data and the statistics of norms


@dataclass(frozen=True)
class Calibration:
    """Batches of calibration inputs.

    Attributes:
        batches: Inputs, on the model's device.
    """

    batches: list[Any]

    @property
    def samples(self) -> int:
        """How many there are in all."""
        return sum(map(batch_size, self.batches))

    @property
    def held_out(self) -> list[bool]:
        """Whether each batch is kept from the fit of corrections, to judge them."""
        return [n % HELD_OUT == HELD_OUT - 1 for n in range(len(self.batches))]

    def pilot(self) -> Calibration | None:
        """Return the first few batches, or None if those are most of them."""
        few: list[Any] = []
        samples = 0
        for x in self.batches:
            if samples >= PILOT and len(few) >= HELD_OUT:
                break
            few.append(x)
            samples += batch_size(x)
        return Calibration(few) if 2 * len(few) <= len(self.batches) else None


def prepare(
    model: nn.Module,
    layers: dict[str, nn.Module],
    loader: Iterable[Any],
    samples: int | None,
) -> Calibration:
    """Take inputs from a loader, check them, and cut them into batches of one size.

    Raises:
        EmptyLoaderError: The loader yields nothing.
        NonFiniteError: An input is NaN or infinite.
        CalibrationError: The outputs depend on what else is in the batch.
    """
    device = device_of(model)
    with Bar("apply: reading inputs", samples, enabled=False):
        given = [
            with_tensors(x, lambda tensor: tensor.detach().to(device))
            for x, _ in take(loader, samples)
        ]
    for x in floats(given):
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError(
                "a calibration input is NaN or infinite",
                wanted="finite inputs",
                fix="look for NaN in the calibration data",
            )
    check_independent(model, _first_few(given))
    if (found := sum(map(batch_size, given))) < HELD_OUT:
        logger.warning(
            "only %d calibration samples: too few to correct the drift of inputs; a "
            "thousand are plenty",
            found,
        )
    calibration = Calibration(_cut(given, largest_input(model, layers, given[0])))
    _compare_norms(model, calibration.pilot() or calibration)
    return calibration


@torch.no_grad()
def check_independent(model: nn.Module, x: Any) -> None:
    """Raise if the output for a sample depends on the other samples of the batch.

    Raises:
        CalibrationError: It does, so that batches cannot be cut.
    """
    if (samples := batch_size(x)) < 2:
        return
    half = samples // 2
    some = part(x, torch.arange(half, samples).flip(0))
    whole, alone = floats(call_model(model, x)), floats(call_model(model, some))
    for out, b in zip(whole, alone, strict=True):
        if out.dim() == 0 or len(out) != samples:
            continue
        a = out[half:].flip(0)
        if a.shape != b.shape or not bool(torch.isfinite(a).all()):
            continue
        change = float((a - b).double().norm() / a.double().norm().clamp_min(1e-30))
        if change > 1e-2:
            raise CalibrationError(
                "the model's output for a sample depends on the rest of its batch",
                got=f"outputs that change by {100 * change:.1f} % in another batch",
                wanted="samples along the first dimension, each on its own",
                fix="put the batch first, and switch off what mixes or draws at random",
            )


def norm_divergence(model: nn.Module, batches: list[Any]) -> float | None:
    """Return how far inputs are from those that the batch norms have seen.

    Mean over channels and norms of KL(N(μ̂, σ̂²) ‖ N(μ, σ²)) in nats, with μ̂ and σ̂² of
    these inputs and the norms' running μ and σ², less what as many values scatter by
    (2 / their number). About .0005 for a thousand inputs of
    the training distribution, .015 for the same without its augmentation, .4 for inputs
    that were not normalised (measured on ResNet-20). None without batch norms.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm)
        and m.running_mean is not None
        and not is_folded(m)  # it has forgotten what it saw
    ]
    sums: dict[nn.Module, list[torch.Tensor | float]] = {}

    def add(norm: nn.Module, args: Any, named: Any) -> None:
        x = layer_input(args, named).double().transpose(0, 1).flatten(1)
        total = sums.setdefault(norm, [0.0, 0.0, 0.0])
        total[0] += x.shape[1]
        total[1] = total[1] + x.sum(1)
        total[2] = total[2] + x.square().sum(1)

    if not norms:
        return None
    handles = [norm.register_forward_pre_hook(add, with_kwargs=True) for norm in norms]
    try:
        with torch.no_grad():
            for x in batches:
                call_model(model, x)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for norm in norms:
        if norm not in sums:
            continue
        count, first, second = sums[norm]
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean = torch.as_tensor(first) / count
        known = norm.running_var.double() + norm.eps
        variance = torch.as_tensor(second) / count - mean.square() + norm.eps
        ratio = variance.clamp_min(1e-12) / known
        shift = (mean - norm.running_mean.double()).square() / known
        excess = float((ratio + shift - 1 - ratio.log()).mean()) / 2 - 2 / float(count)
        found.append(max(excess, 0.0))
    return sum(found) / len(found) if found else None


def _compare_norms(model: nn.Module, calibration: Calibration) -> None:
    divergence = norm_divergence(model, calibration.batches)
    allowed = FOREIGN + 0.5 / calibration.samples  # what few samples scatter by
    if divergence is not None and divergence > allowed:
        logger.warning(
            "the calibration inputs do not look like the training data: their means "
            "and variances differ from those that the batch norms have stored by "
            "%.3g nats per channel, expected below %.2g; check normalisation, "
            "augmentation and padding",
            divergence,
            allowed,
        )


def _first_few(given: list[Any]) -> Any:
    """Return up to four samples of one shape."""
    shapes = sample_shapes(given[0])
    alike = [part(x, slice(4)) for x in given if sample_shapes(x) == shapes]
    return part(join(alike[:4]), slice(4))


@torch.no_grad()
def largest_input(model: nn.Module, layers: dict[str, nn.Module], x: Any) -> int:
    """Return the bytes of the largest input or output of a layer for one sample."""
    one = part(x, slice(1))
    largest = [t.numel() * t.element_size() for t in tensors(one)]

    def look(_: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        for t in (*args, out):
            if torch.is_tensor(t):
                largest.append(t.numel() * t.element_size())

    handles = [module.register_forward_hook(look) for module in layers.values()]
    try:
        call_model(model, one)
    finally:
        for handle in handles:
            handle.remove()
    return max(largest, default=1)


def _cut(given: list[Any], sample_bytes: int) -> list[Any]:
    """Cut inputs into batches that do not depend on how the loader cut them.

    Where a batch lies within one of the loader's, no copy is made.
    """
    samples = sum(map(batch_size, given))
    size = min(LARGEST_BATCH, max(1, BATCH_BYTES // max(sample_bytes, 1)))
    size = max(min(size, math.ceil(samples / BATCHES)), math.ceil(samples / PASSES))
    shapes: dict[Any, list[Any]] = {}
    for x in given:
        shapes.setdefault(sample_shapes(x), []).append(x)
    batches = [cut for alike in shapes.values() for cut in _regrouped(alike, size)]
    if len(batches) > 2 * PASSES:
        every = math.ceil(len(batches) / (2 * PASSES))
        logger.warning(
            "%d shapes of calibration inputs: only every %dth batch is used; pad them "
            "to few lengths to use all",
            len(shapes),
            every,
        )
        batches = batches[::every]
    return batches


def _regrouped(given: list[Any], size: int) -> list[Any]:
    """Cut inputs of one shape into batches of one size."""
    batches: list[Any] = []
    parts: list[Any] = []
    missing = size
    for x in given:
        samples, start = batch_size(x), 0
        while start < samples:
            stop = min(start + missing, samples)
            parts.append(part(x, slice(start, stop)))
            missing -= stop - start
            start = stop
            if not missing:
                batches.append(join(parts))
                parts, missing = [], size
    if parts:
        batches.append(join(parts))
    return batches
