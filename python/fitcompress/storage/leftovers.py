"""What of a compressed model the file holds besides codes: the rest of its state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fitcompress.errors import FormatError
from fitcompress.quantize import grid_of
from fitcompress.quantize.leftovers import FOLDABLE, is_folded
from fitcompress.storage.activations import activation_keys
from fitcompress.storage.sections import Leftovers

if TYPE_CHECKING:
    from torch import nn

__all__ = ["grid_prefixes", "leftovers_of"]


def leftovers_of(model: nn.Module) -> Leftovers:
    """Return what of the state of a compressed model is on no grid and no quantizer's.

    Raises:
        FormatError: An extra state is no tensor.
    """
    norms, skip = {}, set()
    for prefix, module in model.named_modules():
        if isinstance(module, FOLDABLE) and is_folded(module) and prefix:
            if module.weight.dtype != torch.float32:
                continue
            counted = module.num_batches_tracked is not None
            norms[prefix] = (
                module.weight.detach(),
                module.bias.detach(),
                module.eps,
                counted,
            )
            own = (
                "weight",
                "bias",
                "running_mean",
                "running_var",
                "num_batches_tracked",
            )
            skip |= {f"{prefix}.{key}" for key in own}
    tensors: dict[str, torch.Tensor] = {}
    aliases = _other_names(model)
    owners: dict[tuple[Any, ...], str] = {}
    held = grid_prefixes(model)
    skip |= activation_keys(model)
    for key, tensor in model.state_dict(keep_vars=True).items():
        module, found, _ = key.partition("parametrizations.weight.")
        if key in skip or f"{module}{found}" in held:
            continue
        if not torch.is_tensor(tensor):
            raise FormatError(
                f"{key!r} cannot be stored",
                got=f"extra state of type {type(tensor).__name__}",
                wanted="tensors only",
                fix="drop the module's get_extra_state, or store it beside the file",
            )
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in owners:
            aliases[key] = owners[identity]
            continue
        owners[identity] = key
        tensors[key] = tensor.detach()
    return Leftovers(tensors, norms, aliases)


def _other_names(model: nn.Module) -> dict[str, str]:
    """Return the keys of coded weights under further names.

    Of modules that have several, or that share the weight.
    """
    first: dict[nn.Module, str] = {}
    others = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (grid := grid_of(module)) is None:
            continue
        key = f"{name}.weight" if name else "weight"
        if first.setdefault(grid, key) != key:
            others[key] = first[grid]
    return others


def grid_prefixes(model: nn.Module) -> set[str]:
    """Return what the keys of grids and their latent weights begin with."""
    return {
        f"{name}.parametrizations.weight.".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if grid_of(module) is not None
    }
