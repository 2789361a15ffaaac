"""From trained ternary weights to a compressed model of this package."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fitcompress.methods.pruning_ternary.ternary import TernaryWeight, ternary_codes
from fitcompress.model import compressible_layers
from fitcompress.model.costs import bops, count_macs
from fitcompress.quantize import (
    WeightGrid,
    attach_grid,
    attach_plan,
    fold_norms_,
    grid_of,
    half_up,
    norm_digits,
    plan_of,
    round_leftovers_,
    shorten_norms_,
)
from fitcompress.search.plan import Level, Plan
from fitcompress.sensitivity.table import Grid
from fitcompress.storage.save_load import layer_bytes, packed_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["compressed_copy", "finish_", "two_bit_bytes"]

METHOD = "pruning-ternary"
HELD = ".parametrizations.weight."


def compressed_copy(dense: nn.Module, trained: nn.Module) -> nn.Module:
    """Return a copy of ``dense`` with the weights of ``trained`` on grids.

    A ternary filter has the codes t and the step s/√nnz, rounded up to 16 bits as it is
    stored; other layers keep their grid. Norms and biases are those of ``trained``.

    Args:
        dense: The network as it was.
        trained: A copy of it with parametrized weights.
    """
    small = copy.deepcopy(dense)
    state = {k: v for k, v in trained.state_dict().items() if HELD not in f".{k}"}
    small.load_state_dict(state, strict=False)
    for layer in compressible_layers(small):
        module = trained.get_submodule(layer.name)
        chain = module.get_submodule("parametrizations.weight")
        held, latent = chain[0], chain.original.detach()  # type: ignore[index,operator]
        if isinstance(held, TernaryWeight):
            codes = ternary_codes(layer.matrix_of(latent), held.mask)
            nonzeros = codes.count_nonzero(1)
            step = held.scale / nonzeros.clamp_min(1).sqrt()
            step = half_up(torch.where(nonzeros > 0, step, torch.zeros_like(step)))
            grid = WeightGrid(step, 1, codes != 0)
            rows = codes * step.unsqueeze(1)
        else:
            assert isinstance(held, WeightGrid)
            grid = WeightGrid(held.scale, held.max_code)
            rows = layer.matrix_of(held(latent).detach())
        attach_grid(layer.module, grid.to(latent.device), rows)
    return small


@torch.no_grad()
def finish_(small: nn.Module, x: Any, details: Mapping[str, Any]) -> None:
    """Fold and round what is on no grid, and attach the plan, in place.

    Args:
        small: What :func:`compressed_copy` returned, its norms estimated anew.
        x: One input, to count bit operations with.
        details: What the plan is to tell.
    """
    small.eval()
    fold_norms_(small)
    round_leftovers_(small)
    macs, levels = count_macs(small, x), {}
    for layer in compressible_layers(small):
        grid = grid_of(layer.module)
        assert grid is not None
        bits = (2 * grid.max_code).bit_length()
        zeros = 1 - int(layer.weight.count_nonzero()) / layer.size
        levels[layer.name] = Level(
            Grid(bits=bits),
            zeros if grid.mask is not None else 0.0,
            layer.shape,
            bops=bops(macs[layer.name], bits),
        )
    attach_plan(small, Plan(levels, method=METHOD))
    sizes = layer_bytes(small)
    levels = {
        name: Level(
            level.grid,
            level.sparsity,
            level.shape,
            size_bits=8 * sizes[name],
            bops=level.bops,
        )
        for name, level in levels.items()
    }
    plan = Plan(levels, method=METHOD)
    shorten_norms_(small, norm_digits(plan))
    plan = Plan(
        levels,
        method=METHOD,
        size_bytes=len(packed_bytes(small)),
        bops=sum(level.bops for level in levels.values()),
        details={**details, "two_bit_bytes": two_bit_bytes(small)},
    )
    attach_plan(small, plan)


def two_bit_bytes(model: nn.Module) -> int:
    """Return the bytes of a compressed model whose codes are not entropy-coded.

        Σ_l ⌈b_l · n_l / 8⌉ + 2 · scales_l,   b = 2 for ternary codes,

    and two bytes for every other parameter (norms are folded to two numbers per
    channel): what it takes in memory, where each code is to be found by its index. The
    packed file is smaller.

    Args:
        model: What ``PruningTernary`` returned, or another model on fixed-point grids.

    Raises:
        PlanMismatchError: The model is not compressed.
    """
    plan, modules, total = plan_of(model), dict(model.named_modules()), 0
    for name in plan.levels:
        grid = grid_of(modules[name])
        if grid is None or not grid.max_code:
            continue
        bits = (2 * grid.max_code).bit_length()
        count = modules[name].weight.numel()
        total += -(-bits * count // 8) + 2 * grid.scale.numel()
    held = {
        id(p)
        for module in modules.values()
        if is_parametrized(module, "weight")
        for p in module.get_submodule("parametrizations.weight").parameters()
    }
    return total + 2 * sum(p.numel() for p in model.parameters() if id(p) not in held)
