"""What dropping a weight of the dense network adds to its layer's output error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fitcompress.compensate.calibration import prepare
from fitcompress.compensate.lockstep import Lockstep
from fitcompress.compensate.options import Compensation
from fitcompress.compensate.statistics import gather
from fitcompress.compensate.target import Normal, solve
from fitcompress.errors import CalibrationError
from fitcompress.model import check_finite, compressible_layers
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from fitcompress.model import Layer

__all__ = ["output_saliency"]


def output_saliency(
    model: nn.Module, loader: Iterable[Any], samples: int | None
) -> dict[str, torch.Tensor]:
    """Return θ_j² / [(H + δ)⁻¹]_jj of every layer, float32 [rows, columns].

    Args:
        model: In eval mode.
        loader: Calibration inputs.
        samples: How many to use.
    """
    check_finite(model)
    layers = {layer.name: layer for layer in compressible_layers(model)}
    modules = {name: layer.module for name, layer in layers.items()}
    found: dict[str, torch.Tensor] = {}
    with threads(FIXED), torch.no_grad():
        batches = prepare(model, modules, loader, samples).batches
        with Lockstep(model, modules, batches) as passes:
            for _ in layers:
                reached = passes.advance()
                if reached is None:
                    missing = next(name for name in layers if name not in found)
                    raise CalibrationError(
                        f"the inputs never reach layer {missing!r}",
                        got=f"{len(found)} of {len(layers)} layers reached",
                        wanted="a forward pass that uses every compressible layer",
                        fix="give inputs that exercise it",
                    )
                name, inputs = reached
                found[name] = _saliency(layers[name], inputs)
    return found


def _saliency(layer: Layer, inputs: list[torch.Tensor]) -> torch.Tensor:
    weight = layer.matrix().detach().float()
    if layer.one_hot:  # H is diagonal, and alike for all columns
        return weight.square()
    moments = gather(layer, inputs, inputs)
    groups = weight.reshape(layer.groups, -1, weight.shape[1])
    parts = []
    for g, own in enumerate(groups):
        normal = Normal.of(moments, g, centered=True)
        damping = Compensation().damping
        target = solve(
            own, normal, None, normal, damping=damping, drift=0.0, name=layer.name
        )
        parts.append(target.unsorted(target.weight.square() / target.inverse))
    return torch.cat(parts).float()
