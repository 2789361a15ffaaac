"""Weights that make up for the input channels that are gone, by least squares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fitcompress.compensate.statistics import gather
from fitcompress.methods.galen.surgery import CONVOLUTIONS
from fitcompress.model import compressible_layers
from fitcompress.model.patches import layer_input

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fitcompress.methods.galen.groups import ChannelGroup
    from fitcompress.model import Layer

__all__ = ["Reconstruction"]

LARGE = 2400  # columns, above which second moments take too much memory
RIDGE = 0.01  # of the mean diagonal


class Reconstruction:
    """Second moments of the inputs of all layers whose inputs may go.

    With x the inputs of a layer in the dense network (patches, for convolutions), K
    those that stay and H = Σ x xᵀ over calibration data,

        W′ = (W H_{·K} + δ W_K)(H_KK + δ)⁻¹ = argmin Σ‖W x − W′ x_K‖² + δ ‖W′ − W_K‖²,

    δ 1 % of the mean of diag H_KK: those that stay take over what they tell of those
    that go. Where the layer has a bias, a constant 1 is among the inputs and its weight
    goes there; elsewhere the batch norm that follows is to be estimated anew. Measured
    once, solved for every network that loses channels.

    Args:
        model: The dense network, in eval mode.
        groups: What may go.
        batches: Calibration inputs.

    Source: the least squares of He, Zhang and Sun 2017 (arXiv 1707.06168), here in
    closed form for all weights of the layer.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        batches: Sequence[torch.Tensor],
    ) -> None:
        consumers = {
            name for group in groups for name, side in group.owned if side == "in"
        }
        self._layers: dict[str, Layer] = {
            layer.name: layer
            for layer in compressible_layers(model)
            if layer.name in consumers and _solvable(layer)
        }
        self._moments: dict[str, torch.Tensor] = {}
        handles = []
        for layer in self._layers.values():

            def add(
                _: nn.Module,
                args: tuple[Any, ...],
                named: dict[str, Any],
                layer: Layer = layer,
            ) -> None:
                x = layer_input(args, named).detach().float()
                found = gather(layer, [x], [x]).second[0]
                seen = self._moments.get(layer.name)
                self._moments[layer.name] = found if seen is None else seen + found

            handle = layer.module.register_forward_pre_hook(add, with_kwargs=True)
            handles.append(handle)
        try:
            for x in batches:
                model(x)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def apply_(
        self, small: nn.Module, kept: Mapping[str, Mapping[str, Sequence[int]]]
    ) -> None:
        """Give the layers of a pruned copy these weights, in place.

        Args:
            small: What ``prune_channels(model, kept)`` returned.
            kept: The list of channels.
        """
        for name, sides in kept.items():
            if "in" not in sides or name not in self._moments:
                continue
            layer, module = self._layers[name], small.get_submodule(name)
            weight, shift = self._solved(layer, list(sides["in"]))
            if "out" in sides:
                index = torch.tensor(list(sides["out"]), device=weight.device)
                weight, shift = weight[index], shift[index]
            target: Any = module
            target.weight.copy_(weight.reshape(target.weight.shape))
            if target.bias is not None:
                target.bias.add_(shift)

    def _solved(
        self, layer: Layer, inputs: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight [rows, kept columns] and what to add to the bias."""
        moments = self._moments[layer.name]
        rows = layer.matrix().double()
        channels = int(layer.shape[1])
        places = layer.columns // channels  # of the kernel
        first = torch.tensor(inputs, device=rows.device) * places
        columns = (first[:, None] + torch.arange(places, device=rows.device)).flatten()
        biased = getattr(layer.module, "bias", None) is not None
        if biased:
            constant = columns.new_tensor([layer.columns])
            columns = torch.cat([columns, constant])
        inner = moments[columns][:, columns].clone()
        cross = rows @ moments[: layer.columns][:, columns]
        count = len(first) * places
        own = inner.diagonal()[:count]
        ridge = RIDGE * own.mean() + torch.finfo(torch.float64).tiny
        own += ridge
        cross[:, :count] += ridge * rows[:, columns[:count]]
        solved = torch.linalg.solve(inner, cross.T).T
        shift = solved[:, -1] if biased else solved.new_zeros(len(solved))
        weight = solved[:, :-1] if biased else solved
        return weight.float(), shift.float()


def _solvable(layer: Layer) -> bool:
    plain = isinstance(layer.module, (nn.Linear, *CONVOLUTIONS)) and layer.groups == 1
    return plain and layer.columns <= LARGE
