"""Weights that several modules share, compensated by what all of them read.

A shared weight is needed where it is used first, when what later uses will read in the
compressed network is not known yet. So its errors are spread by the inputs of the dense
network, summed over the uses:

    H = Σ_u E[x_u x_uᵀ] / tr H_u · columns   (+ I if a use looks rows up)

A tied embedding and head has both: the head multiplies by what the last norm leaves,
the embedding takes rows as they are, for which all errors are alike.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fitcompress import ops
from fitcompress.compensate.row_parts import ROWS, joined
from fitcompress.compensate.statistics import Moments
from fitcompress.compensate.sweep import quantize
from fitcompress.errors import NonFiniteError
from fitcompress.model.forward import call_model
from fitcompress.model.patches import layer_input
from fitcompress.model.positions import attention_masks, counted_rows

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fitcompress.compensate.options import Compensation
    from fitcompress.compensate.sweep import Quantized
    from fitcompress.model import Layer
    from fitcompress.search.plan import Level

__all__ = ["shared_inputs", "shared_quantized"]

KINDS = (nn.Linear, nn.Embedding)
ONE = (1, 1, 1)


def shared_inputs(
    model: nn.Module, layers: Iterable[Layer], batches: list[Any]
) -> dict[str, torch.Tensor]:
    """Return H of the layers that share a weight among linear layers, by name.

    Args:
        model: The dense network, in eval mode.
        layers: Its layers; those that share no weight, or share it among convolutions,
            are left out.
        batches: Inputs.

    Returns:
        Name → float64 [columns, columns].

    Raises:
        NonFiniteError: An input of such a layer is NaN or infinite.
    """
    uses = {
        layer.name: [m for m in layer.modules if isinstance(m, nn.Linear)]
        for layer in layers
        if layer.tied and all(isinstance(m, KINDS) for m in layer.modules)
    }
    uses = {name: modules for name, modules in uses.items() if modules}
    if not uses:
        return {}
    sums = {
        module: torch.zeros(
            1,
            module.in_features + 1,
            module.in_features + 1,
            dtype=torch.float64,
            device=module.weight.device,
        )
        for modules in uses.values()
        for module in modules
    }
    masks: list[torch.Tensor] = []

    def add(module: Any, args: Any, named: Any) -> None:
        x = counted_rows(module, layer_input(args, named), masks)
        _add(sums[module], x.detach().reshape(-1, x.shape[-1]).float())

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for module in sums:
            handle = module.register_forward_pre_hook(add, with_kwargs=True)
            hooks.callback(handle.remove)
        for x in batches:
            masks[:] = attention_masks(x)
            call_model(model, x)
    found = {}
    for layer in layers:
        if layer.name in uses:
            found[layer.name] = _joined(layer, [sums[m] for m in uses[layer.name]])
    return found


def shared_quantized(
    layer: Layer,
    inputs: torch.Tensor,
    level: Level,
    options: Compensation,
    *,
    importance: torch.Tensor | None = None,
    widen: float = 1.0,
) -> Quantized:
    """Return the compensated codes of a shared weight.

    Args:
        layer: Of the dense network.
        inputs: H.
        level: Where its weights are to lie.
        options: What compensation does. There is no drift to correct.
        importance: What the mask keeps the largest of, [rows, columns], or None.
        widen: Factor on the scales of fixed-point levels.
    """
    weight = layer.matrix()
    beam = options.paths(layer.rows, layer.columns)  # the same in all parts
    options = replace(options, drift=0.0, beam=beam)
    rows = len(weight) if level.sparsity else ROWS  # a mask is chosen for all rows
    return joined(
        [
            quantize(
                part,
                _moments(part, inputs),
                None,
                level,
                options,
                importance=importance,
                widen=widen,
                name=layer.name,
            )
            for part in torch.split(weight, rows)
        ]
    )


def _moments(weight: torch.Tensor, inputs: torch.Tensor) -> Moments:
    """Return H, and X = W H, as of one position."""
    rows, columns = weight.shape
    second = inputs.new_zeros(1, columns + 1, columns + 1)
    cross = inputs.new_zeros(1, rows, columns + 1)
    second[0, :-1, :-1], second[0, -1, -1] = inputs, 1.0
    torch.mm(weight.double(), inputs, out=cross[0, :, :-1])
    return Moments(second, cross)


def _add(second: torch.Tensor, x: torch.Tensor) -> None:
    """Add Σ x xᵀ over positions; the kernel wants outputs as well, one is enough."""
    cross = second.new_zeros(1, 1, second.shape[-1])
    y = x.new_zeros(len(x), 1, *ONE)
    x = x.reshape(*x.shape, *ONE)
    ops.input_moments_(second, cross, x, y, ONE, ONE, ONE, (0, 0, 0), ONE)


def _joined(layer: Layer, sums: list[torch.Tensor]) -> torch.Tensor:
    """Return H of all uses."""
    total = torch.zeros_like(sums[0][0, :-1, :-1])
    for second in sums:
        if not bool(torch.isfinite(second).all()):
            raise NonFiniteError(
                f"an input of layer {layer.name!r} is not finite",
                wanted="finite calibration inputs",
                fix="look for NaN in the calibration data",
            )
        energy = second[0, :-1, :-1].diagonal().mean()
        if energy > 0:
            total += second[0, :-1, :-1] / energy
    if any(isinstance(module, nn.Embedding) for module in layer.modules):
        total.diagonal().add_(1.0)
    return total
