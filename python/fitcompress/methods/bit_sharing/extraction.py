"""From a searched network to a plan and a float network to apply it to."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fitcompress.model import compressible_layers
from fitcompress.model.costs import overhead_bytes
from fitcompress.model.forward import call_model
from fitcompress.quantize import remove
from fitcompress.search.plan import Level, Plan
from fitcompress.sensitivity.kept_filters import removed_share
from fitcompress.sensitivity.table import Grid

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from fitcompress.methods.bit_sharing.configuration import Configuration
    from fitcompress.methods.bit_sharing.network import SharedNetwork

__all__ = ["float_network", "make_plan"]


@torch.no_grad()
def float_network(
    model: nn.Module, network: SharedNetwork, inputs: Iterable[torch.Tensor]
) -> nn.Module:
    """Return a float copy of ``model`` with what the search has learnt.

    Weights lie within their ranges, removed filters are zeros, and batch norms have the
    statistics of these weights.

    Args:
        model: The network that the search started from.
        network: What became of it.
        inputs: Batches for the statistics.
    """
    dense = remove(copy.deepcopy(model), activations=True)
    learnt = network.model.state_dict()
    state = {key: learnt.get(key, value) for key, value in dense.state_dict().items()}
    for layer in network.layers:
        state[f"{layer.name}.weight"] = layer.weight.clipped(layer.latent)
    dense.load_state_dict(state)
    dense.eval()
    norms = [m for m in dense.modules() if isinstance(m, _BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        for x in inputs:
            call_model(dense, x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return dense.eval()


def make_plan(
    model: nn.Module,
    network: SharedNetwork,
    found: Configuration,
    details: dict[str, Any],
) -> Plan:
    """Return the plan of a configuration for ``model``.

    A layer that loses filters gets their share as its sparsity, and the plan lists the
    others in ``details["kept_filters"]``, from which ``apply`` makes its masks.

    Args:
        model: The float network.
        network: The searched one.
        found: Its configuration.
        details: What else to tell.
    """
    layers, levels, kept = compressible_layers(model), {}, {}
    shared = {layer.name: layer for layer in network.layers}
    for layer in layers:
        name, count = layer.name, len(found.kept[layer.name])
        if count < layer.rows:
            kept[name] = found.kept[name]
        bits = found.weight_bits[name]
        levels[name] = Level(
            grid=Grid(bits=bits),
            sparsity=removed_share(layer.rows, count, layer.columns),
            shape=layer.shape,
            size_bits=bits * count * layer.columns + 16 * layer.rows,
            bops=found.cost(shared[name]),
            activation_bits=found.input_bits.get(name),
        )
    size = sum(level.size_bits for level in levels.values())
    return Plan(
        levels=levels,
        method="bit_sharing",
        size_bytes=-(-size // 8) + overhead_bytes(model, layers),
        bops=found.bops(),
        details=details | {"kept_filters": kept, "moved_at_the_end": found.moved},
    )
