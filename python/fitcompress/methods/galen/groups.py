"""``ChannelGroup``: channels that go together, and networks without some of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn

__all__ = ["ChannelGroup", "kept_channels", "strongest", "without_channels"]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only go together: one decision.

    Attributes:
        layers: Layers that have them as outputs, in the order of the model.
        width: How many there are.
        owned: (module, side) → for every channel, its indices there; a channel of a
            convolution is many inputs of a Linear behind a flatten.
    """

    layers: tuple[str, ...]
    width: int
    owned: Mapping[tuple[str, str], Sequence[Sequence[int]]]

    def indices(self, channels: Iterable[int]) -> dict[tuple[str, str], list[int]]:
        """Return (module, side) → what belongs to these channels, rising."""
        chosen = sorted(channels)
        return {
            place: sorted(i for c in chosen for i in owned[c])
            for place, owned in self.owned.items()
        }


def kept_channels(
    groups: Sequence[ChannelGroup], kept: Sequence[Sequence[int]]
) -> dict[str, dict[str, list[int]]]:
    """Return the list for ``prune_channels`` that leaves these channels of groups.

    Groups that keep all channels are not in it.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for group, channels in zip(groups, kept, strict=True):
        if len(channels) == group.width:
            continue
        for (name, side), indices in group.indices(channels).items():
            found.setdefault(name, {})[side] = indices
    return found


@torch.no_grad()
def without_channels(
    model: nn.Module, group: ChannelGroup, removed: Iterable[int]
) -> nn.Module:
    """Return a copy of the same shapes that computes without these channels.

    What they own of weights, biases and norms is zero.
    """
    masked = copy.deepcopy(model)
    modules = dict(masked.named_modules())
    for (name, side), indices in group.indices(removed).items():
        module: Any = modules[name]
        index = torch.tensor(indices, dtype=torch.long, device=module.weight.device)
        module.weight.index_fill_(int(side == "in"), index, 0)
        if side == "out" and module.bias is not None:
            module.bias.index_fill_(0, index, 0)
    return masked


@torch.no_grad()
def strongest(model: nn.Module, group: ChannelGroup, count: int) -> list[int]:
    """Return the ``count`` channels of largest norm, rising.

        I_c = √ Σ_m ‖W_m[c]‖² / mean_c' ‖W_m[c']‖²

    with m over the layers that have the channel as an output or as an input, each
    relative to its mean, for norms may scale either; batch norms do not count. Ties go
    to the lower index. The channels of the smallest norms are those that are removed,
    so the kept ones are nested.
    """
    total = torch.zeros(group.width, dtype=torch.float64)
    for (name, side), owned in group.owned.items():
        module: Any = model.get_submodule(name)
        if isinstance(module, _BatchNorm):
            continue
        weight = module.weight.detach().double().cpu()
        squares = weight.transpose(0, int(side == "in")).flatten(1).square().sum(1)
        own = torch.stack([squares[list(indices)].sum() for indices in owned])
        total += own / own.mean().clamp_min(torch.finfo(torch.float64).tiny)
    order = torch.argsort(total, descending=True, stable=True)
    return sorted(order[:count].tolist())
