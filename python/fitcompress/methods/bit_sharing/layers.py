"""Layers whose weights and inputs share bits, while their bits are being learnt.

Weights go through a parametrization, inputs through a child that a pre-hook calls: the
types of modules, and how the model is called, stay as they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from fitcompress.methods.bit_sharing.gates import (
    filter_gate,
    group_norms,
    highest_threshold,
    indicator,
)
from fitcompress.methods.bit_sharing.shared_bits import Ladder, Shared, share_bits

if TYPE_CHECKING:
    from fitcompress.model import Layer
    from fitcompress.model.matrix_view import MatrixView

__all__ = ["SharedInput", "SharedLayer", "SharedWeight", "share_layer"]

CHILD = "shared_input"
NARROWEST = 1 / 16  # of its start, what a range may shrink to
CANDIDATES = 32  # ranges tried for the start of a weight's


class _Sharing(nn.Module):
    """Range v and thresholds τ of one tensor.

    Args:
        ladder: Its bits; a ladder of one rung is fixed and has no gates.
        reach: v at the start.

    Attributes:
        reach: v, a parameter.
        threshold: τ of every rung above the first, a parameter; starts at 0.
        found: What the last forward pass shared, or None.
    """

    def __init__(self, ladder: Ladder, reach: float) -> None:
        super().__init__()
        self.ladder = ladder
        self.least = NARROWEST * reach
        self.reach = nn.Parameter(torch.tensor(float(reach)))
        self.threshold = nn.Parameter(torch.zeros(len(ladder.bits) - 1))
        self.found: Shared | None = None

    def share(self, z: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Return ẑ, and remember what the gates did."""
        threshold = self.threshold

        def gate(rung: int, measure: torch.Tensor) -> torch.Tensor:
            return indicator(measure, threshold[rung])

        self.found = share_bits(z, self.ladder, gate, kept)
        return self.found.values

    def range_for(self, count: int) -> torch.Tensor:
        """Return v with the gradient scaled by 1/√count, the values that share it."""
        held = self.reach.detach()
        return held + (self.reach - held) * (1 / math.sqrt(count))

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep τ ≥ 0 and v away from 0."""
        self.threshold.clamp_(min=0)
        self.reach.clamp_(min=self.least)


class SharedWeight(_Sharing):
    """Parametrization of a weight whose values share bits.

        w̃ = (w − μ)/σ,  z = (clip(w̃/v, −1, 1) + 1)/2,  ŵ = g_c · (μ + σ v (2ẑ − 1)),

    with the detached mean μ and deviation σ of the kept filters, and the gate g_c of
    the filter's group. Grids of this form have no zero: a filter goes by its gate only.

    Args:
        ladder: Its bits.
        weight: To choose the first v by: least squared error at the second rung.
        view: How the weight is a matrix.
        group: B, filters that go together; 0 keeps all.
        share: Largest share of the groups that may go.

    Attributes:
        filter_threshold: τ_p, a parameter, or None.
        kept: Gates of the filters in the last forward pass, [rows], or None.
    """

    def __init__(
        self,
        ladder: Ladder,
        weight: torch.Tensor,
        view: MatrixView,
        group: int = 0,
        share: float = 0.0,
    ) -> None:
        rows = view.matrix_of(weight.detach())
        super().__init__(ladder, _least_error(rows, ladder))
        self.view, self.group, self.share_removed = view, group, share
        self.filter_threshold = nn.Parameter(torch.zeros(())) if group else None
        self.kept: torch.Tensor | None = None

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the quantized weight without the filters that are gone."""
        rows = self.view.matrix_of(weight)
        self.kept = None
        if self.filter_threshold is not None:
            self.kept = filter_gate(rows, self.group, self.filter_threshold)
        mask = None if self.kept is None else self.kept.detach()[:, None]
        mean, deviation = _statistics(rows.detach(), mask)
        reach = self.range_for(rows.numel())
        u = ((rows - mean) / deviation / reach).clamp(-1, 1)
        signed = 2 * self.share((u + 1) / 2, mask) - 1
        quantized = mean + deviation * reach * signed
        if self.kept is not None:
            quantized = quantized * self.kept[:, None]
        return self.view.weight_of(quantized, weight.shape)

    @torch.no_grad()
    def clipped(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the float weight within its range, filters that are gone as zeros."""
        rows = self.view.matrix_of(weight)
        kept = self.filters(weight)[:, None].to(rows.dtype)
        mean, deviation = _statistics(rows, kept)
        reach = self.reach.detach() * deviation
        inside = rows.maximum(mean - reach).minimum(mean + reach)
        return self.view.weight_of(inside * kept, weight.shape)

    @torch.no_grad()
    def filters(self, weight: torch.Tensor) -> torch.Tensor:
        """Return which filters stay, bool [rows]."""
        rows = self.view.matrix_of(weight)
        if self.filter_threshold is None:
            return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        return filter_gate(rows, self.group, self.filter_threshold) > 0

    @torch.no_grad()
    def clamp_filters_(self, weight: torch.Tensor) -> None:
        """Keep τ_p ≥ 0, and so low that at most the allowed share of groups goes."""
        if self.filter_threshold is not None:
            norms = group_norms(self.view.matrix_of(weight), self.group)
            most = highest_threshold(norms, self.share_removed)
            self.filter_threshold.clamp_(min=0).clamp_(max=most)


class SharedInput(_Sharing):
    """Quantizer of a layer's input: z = clip(x/v, 0, 1), x̂ = v ẑ.

    For inputs that are negative as well z = (clip(x/v, −1, 1) + 1)/2, x̂ = v (2ẑ − 1).

    Args:
        ladder: Its bits.
        reach: v at the start.
        signed: Whether inputs may be negative.
    """

    def __init__(self, ladder: Ladder, reach: float, *, signed: bool) -> None:
        super().__init__(ladder, reach)
        self.signed = signed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the quantized input."""
        reach = self.range_for(x.numel())
        if not self.signed:
            return reach * self.share((x / reach).clamp(0, 1))
        u = (x / reach).clamp(-1, 1)
        return reach * (2 * self.share((u + 1) / 2) - 1)


@dataclass(frozen=True)
class SharedLayer:
    """A layer of the network under search.

    Attributes:
        name: Of its module.
        module: The module.
        weight: Its parametrization.
        inputs: The quantizer of its input; None for an embedding.
        macs: Multiply-accumulates of one sample.
        rows: Number of filters.
        fixed: Whether its bits are given: the first and the last layer.
    """

    name: str
    module: nn.Module
    weight: SharedWeight
    inputs: SharedInput | None
    macs: int
    rows: int
    fixed: bool

    @property
    def latent(self) -> torch.Tensor:
        """The float weight under training."""
        chain = cast("nn.ModuleDict", self.module.parametrizations)["weight"]
        return cast("torch.Tensor", chain.original)

    def clamp_(self) -> None:
        """Bring thresholds and ranges back to where they may be."""
        self.weight.clamp_()
        self.weight.clamp_filters_(self.latent)
        if self.inputs is not None:
            self.inputs.clamp_()


def share_layer(
    layer: Layer,
    weight: SharedWeight,
    inputs: SharedInput | None,
    macs: int,
    *,
    fixed: bool,
) -> SharedLayer:
    """Let a layer's weight and input go through their quantizers from now on."""
    module, rows = layer.module, layer.rows
    place = layer.weight.device
    # unsafe: shape and dtype stay, a trial call would cost a pass.
    parametrize.register_parametrization(
        module, "weight", weight.to(place), unsafe=True
    )
    if inputs is not None:
        module.add_module(CHILD, inputs.to(place))
        module.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    return SharedLayer(layer.name, module, weight, inputs, macs, rows, fixed)


def _quantize_input(
    module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantizer = cast("SharedInput", getattr(module, CHILD))
    if args:
        return (quantizer(args[0]), *args[1:]), named
    return args, {**named, "input": quantizer(named["input"])}


def _statistics(
    rows: torch.Tensor, kept: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation over the kept rows; 1 for a deviation of 0."""
    if kept is None:
        mean = rows.mean()
        square = (rows - mean).square().mean()
    else:
        count = (kept.sum() * rows.shape[1]).clamp_min(1)
        mean = (rows * kept).sum() / count
        square = ((rows - mean).square() * kept).sum() / count
    return mean, torch.where(square > 0, square.sqrt(), 1.0)


@torch.no_grad()
def _least_error(rows: torch.Tensor, ladder: Ladder) -> float:
    """Return the v of least squared error at the ladder's second rung."""
    mean, deviation = _statistics(rows, None)
    values = (rows - mean) / deviation
    levels = ladder.levels[min(1, len(ladder.levels) - 1)]
    widest = float(values.abs().max()) or 1.0
    tried = [widest * (n + 1) / CANDIDATES for n in range(CANDIDATES)]

    def error(reach: float) -> float:
        z = ((values / reach).clamp(-1, 1) + 1) / 2
        wrong = values - reach * (2 * (z * levels).round() / levels - 1)
        return float(wrong.square().sum())

    return min(tried, key=error)
