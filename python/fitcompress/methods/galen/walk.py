"""The layers in the order in which an agent decides on them, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fitcompress.errors import OptionError
from fitcompress.latency.networks import layers_in_order
from fitcompress.methods.galen.channels import channel_groups
from fitcompress.model import compressible_layers
from fitcompress.model.costs import bops, count_macs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from fitcompress.methods.galen.groups import ChannelGroup
    from fitcompress.methods.galen.policy import ActionMap, Policy

__all__ = ["Walk", "make_walk"]


@dataclass(frozen=True)
class Walk:
    """One episode's way through the network.

    Attributes:
        layers: Layers that are decided on, in the order in which they run: all of them
            where bits are chosen, else those that decide on a group.
        groups: What can be removed.
        leads: Layer → number of the group that is decided on there: at the first of its
            layers.
        macs: Every compressible layer → multiply-accumulates of one sample, dense.
        left_out: Layer → why it keeps its channels.
    """

    layers: tuple[str, ...]
    groups: tuple[ChannelGroup, ...]
    leads: Mapping[str, int]
    macs: Mapping[str, int]
    left_out: Mapping[str, str]

    def remaining(self, layer: str, side: str, channels: Sequence[int]) -> float:
        """Return the share of a layer's outputs or inputs that is left.

        Args:
            layer: Its name.
            side: ``"out"`` or ``"in"``.
            channels: Channels kept by each group.
        """
        for group, kept in zip(self.groups, channels, strict=True):
            if (layer, side) in group.owned:
                return kept / group.width
        return 1.0

    def macs_of(self, layer: str, channels: Sequence[int]) -> float:
        """Return a layer's multiply-accumulates when groups keep these channels."""
        outputs = self.remaining(layer, "out", channels)
        return self.macs[layer] * outputs * self.remaining(layer, "in", channels)

    def bops_of(self, layer: str, policy: Policy) -> int:
        """Return MACs · weight bits · activation bits of a layer, float as 32 · 32."""
        found = {name: (w, a) for name, w, a in policy.bits}
        macs = self.macs_of(layer, policy.channels)
        return bops(round(macs), *found.get(layer, (32, 32)))


def make_walk(model: nn.Module, example: Any, actions: ActionMap) -> Walk:
    """Return the walk through a network.

    Raises:
        DataError: The model does not run on the example.
        OptionError: Nothing can be decided on.
    """
    order = layers_in_order(model, example)
    groups, left_out = _decidable(model, example, actions)
    rank = {name: number for number, name in enumerate(order)}
    leads = {}
    for number, group in enumerate(groups):
        run = [name for name in group.layers if name in rank]
        if run:
            leads[min(run, key=rank.__getitem__)] = number
    layers = order if actions.quantizes else [name for name in order if name in leads]
    if not layers:
        raise OptionError(
            "no layer of the network can lose channels",
            got="; ".join(f"{k}: {why}" for k, why in list(left_out.items())[:4]),
            wanted="two layers, one after the other",
            fix='use agent="quantization", or lower round_to',
        )
    macs = {layer.name: 0 for layer in compressible_layers(model)}
    macs |= count_macs(model, example)
    return Walk(tuple(layers), tuple(groups), leads, macs, left_out)


def _decidable(
    model: nn.Module, example: Any, actions: ActionMap
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups that can lose channels in steps of ``round_to``, and why not.

    Groups of at most so many channels keep all of them whatever the action.
    """
    if not actions.prunes:
        return [], {}
    found, left_out = channel_groups(model, example)
    groups = []
    for group in found:
        if group.width > actions.round_to:
            groups.append(group)
            continue
        for name in group.layers:
            left_out[name] = f"{group.width} channels, round_to={actions.round_to}"
    return groups, left_out
