"""From a retrained network to a compressed model of this package, with its plan."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.model import compressible_layers
from fitcompress.quantize import (
    WeightGrid,
    activations,
    attach_grid,
    attach_plan,
    fold_norms_,
    grid_of,
    norm_digits,
    round_leftovers_,
    row_scales,
    shorten_norms_,
)
from fitcompress.search.plan import Level, Plan
from fitcompress.sensitivity.table import Grid
from fitcompress.storage.save_load import layer_bytes, packed_bytes

if TYPE_CHECKING:
    from torch import nn

    from fitcompress.methods.galen.policy import Policy
    from fitcompress.methods.galen.walk import Walk

__all__ = ["FLOAT_BITS", "attach_sizes_", "finish_"]

METHOD = "galen"
FLOAT_BITS = 16  # of the grid that weights of float layers are stored on


@torch.no_grad()
def finish_(small: nn.Module, walk: Walk, policy: Policy) -> None:
    """Fold and round what is on no grid, and attach the plan, in place.

    A packed file has codes of every layer. Weights that the policy leaves in float go
    to the widest grid there is, 16 bits with a step per output channel: an error of at
    most 1/65534 of a channel's largest weight. Their inputs stay in float, so runtimes
    compute them in float.

    Args:
        small: Retrained, its norms estimated.
        walk: Layers of the dense network, to count bit operations with.
        policy: What the network was made by.
    """
    small.eval()
    inputs = {name: quantizer.bits for name, quantizer in activations(small)}
    levels = {}
    for layer in compressible_layers(small):
        grid = grid_of(layer.module)
        bits = FLOAT_BITS if grid is None else (2 * grid.max_code).bit_length()
        level = Level(
            Grid(bits=bits),
            0.0,
            layer.shape,
            bops=walk.bops_of(layer.name, policy),
            activation_bits=inputs.get(layer.name),
        )
        if grid is None:
            made = WeightGrid(*row_scales(layer.matrix(), level))
            weight = layer.weight.detach().clone()
            attach_grid(layer.module, made.to(weight.device), weight)
        levels[layer.name] = level
    fold_norms_(small)
    scales = [quantizer.scale for _, quantizer in activations(small)]
    round_leftovers_(small, scales)
    total = sum(level.bops for level in levels.values())
    attach_plan(small, Plan(levels, method=METHOD, bops=total))


@torch.no_grad()
def attach_sizes_(small: nn.Module, plan: Plan, details: dict[str, Any]) -> Plan:
    """Shorten the norms as the size of the file allows; return the plan with sizes.

    Args:
        small: A finished network.
        plan: Its plan.
        details: What the plan is to tell.
    """
    sizes = layer_bytes(small)
    levels = {
        name: replace(level, size_bits=8 * sizes[name])
        for name, level in plan.levels.items()
    }
    plan = replace(plan, levels=levels)
    shorten_norms_(small, norm_digits(plan))
    plan = replace(plan, size_bytes=len(packed_bytes(small)), details=details)
    attach_plan(small, plan)
    return plan
