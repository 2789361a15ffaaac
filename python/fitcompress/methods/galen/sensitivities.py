"""How much the outputs change when one layer is compressed, at ten strengths."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from fitcompress.errors import NonFiniteError
from fitcompress.methods.galen.groups import strongest, without_channels
from fitcompress.methods.galen.ranges import Ranges
from fitcompress.model import compressible_layers
from fitcompress.progress import Bar
from fitcompress.quantize import (
    ActivationQuantizer,
    WeightGrid,
    attach_activation,
    detach_activation,
    row_scales,
)
from fitcompress.search.plan import Level
from fitcompress.sensitivity.labels import check_logits
from fitcompress.sensitivity.table import Grid

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from fitcompress.methods.galen.walk import Walk
    from fitcompress.model import Layer

__all__ = ["BITS", "SHARES", "Sensitivities", "measure_sensitivities"]

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of channels removed
LARGEST_KL = 1e4  # nats, of outputs that are not finite
BITS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12)


@dataclass(frozen=True)
class Sensitivities:
    """Mean KL(dense ‖ compressed) of the outputs in nats, one layer compressed.

    Attributes:
        channels: With shares of the channels of the group removed that the layer
            decides on, [L, 10]; 0 where it decides on none.
        weights: With its weights on b bits, rounded, [L, 10].
        inputs: With its inputs on b bits, [L, 10].
    """

    channels: NDArray[np.float64]
    weights: NDArray[np.float64]
    inputs: NDArray[np.float64]

    def of(self, number: int, *, prunes: bool, quantizes: bool) -> NDArray[np.float64]:
        """Return those of one layer, of the kinds that an agent decides on."""
        kinds = [self.channels] if prunes else []
        kinds += [self.weights, self.inputs] if quantizes else []
        found: NDArray[np.float64] = np.concatenate([kind[number] for kind in kinds])
        return found


@torch.no_grad()
def measure_sensitivities(
    model: nn.Module,
    walk: Walk,
    batches: Sequence[torch.Tensor],
    *,
    prunes: bool,
    quantizes: bool,
    progress: bool = True,
) -> Sensitivities:
    """Measure every layer of a walk at ten strengths of every kind.

    Args:
        model: The dense network, in eval mode; unchanged when this returns.
        walk: Its layers.
        batches: Inputs without augmentation, 256 in all, say.
        prunes: Whether to measure ``channels``.
        quantizes: Whether to measure ``weights`` and ``inputs``.
        progress: Show a bar with the time left.
    """
    probe = _Probe(model, walk, batches)
    count = len(walk.layers)
    found = {kind: np.zeros((count, 10)) for kind in ("channels", "weights", "inputs")}
    ranges = Ranges(model, walk.layers if quantizes else (), batches)
    with Bar("sensitivities", count, enabled=progress) as bar:
        for number, name in enumerate(walk.layers):
            if prunes and name in walk.leads:
                found["channels"][number] = [
                    probe.without(walk.leads[name], share) for share in SHARES
                ]
            if quantizes:
                found["weights"][number] = [probe.rounded(name, b) for b in BITS]
                found["inputs"][number] = [
                    probe.with_input(name, b, ranges) for b in BITS
                ]
            bar.advance(note=name)
    return Sensitivities(**found)


class _Probe:
    """Compresses a layer, looks at the outputs, and puts the layer back."""

    def __init__(
        self, model: nn.Module, walk: Walk, batches: Sequence[torch.Tensor]
    ) -> None:
        self.model, self.walk, self.batches = model, walk, batches
        self.layers = {layer.name: layer for layer in compressible_layers(model)}
        self.dense = [self._logs(model, x) for x in batches]
        if not all(bool(p.isfinite().all()) for p in self.dense):
            raise NonFiniteError(
                "the outputs of the dense network are NaN or infinite",
                wanted="finite logits",
                fix="look for NaN in the validation inputs and for overflow",
            )

    def divergence(self, model: nn.Module) -> float:
        total, count = 0.0, 0
        for x, p in zip(self.batches, self.dense, strict=True):
            q = self._logs(model, x)
            total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
            count += p.numel() // p.shape[-1]
        return max(0.0, total / count) if math.isfinite(total) else LARGEST_KL

    @staticmethod
    def _logs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return check_logits(model(x)).float().log_softmax(-1)

    def without(self, number: int, share: float) -> float:
        group = self.walk.groups[number]
        kept = strongest(self.model, group, max(1, round((1 - share) * group.width)))
        removed = set(range(group.width)) - set(kept)
        return self.divergence(without_channels(self.model, group, removed))

    def rounded(self, name: str, bits: int) -> float:
        layer = self.layers[name]
        rows, level = layer.matrix(), Level(Grid(bits=bits), 0.0, layer.shape)
        scale, most = row_scales(rows, level)
        codes = WeightGrid(scale, most).to(rows.device).round(rows)
        with _weight(layer, codes * scale.to(rows.device).reshape(-1, 1)):
            return self.divergence(self.model)

    def with_input(self, name: str, bits: int, ranges: Ranges) -> float:
        quantizer = ActivationQuantizer(bits)
        quantizer.set_range(ranges.of(name, bits))
        module = self.model.get_submodule(name)
        attach_activation(module, quantizer)
        try:
            return self.divergence(self.model)
        finally:
            detach_activation(module)


@contextlib.contextmanager
def _weight(layer: Layer, rows: torch.Tensor) -> Iterator[None]:
    """Run a block with another weight [rows, columns] in a layer."""
    before = layer.weight.data
    layer.weight.data = layer.weight_of(rows).to(before.dtype).contiguous()
    try:
        yield
    finally:
        layer.weight.data = before
