"""From a searched network to a plan and a float network to apply it to."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fitcompress.methods.bit_sharing.expected_cost import real_bops
from fitcompress.methods.bit_sharing.network import FIXED_BITS
from fitcompress.model import compressible_layers
from fitcompress.model.costs import overhead_bytes
from fitcompress.quantize import remove
from fitcompress.search.plan import Level, Plan
from fitcompress.sensitivity.kept_filters import removed_share
from fitcompress.sensitivity.table import Grid

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from fitcompress.methods.bit_sharing.layers import SharedLayer
    from fitcompress.methods.bit_sharing.network import SharedNetwork

__all__ = ["Configuration", "configuration", "float_network", "make_plan", "smallest"]


@dataclass
class Configuration:
    """Bits of weights and inputs, and kept filters, of every layer.

    Attributes:
        weight_bits: Layer → bits.
        input_bits: Layer → bits; None for an embedding.
        kept: Layer → numbers of the filters that stay.
        closed: Gates closed by :meth:`fit`, "layer weight" or "layer input", in order.
    """

    weight_bits: dict[str, int]
    input_bits: dict[str, int | None]
    kept: dict[str, list[int]]
    closed: list[str] = field(default_factory=list)

    def cost(self, layer: SharedLayer) -> int:
        """Return the bit operations of a layer."""
        name, bits = layer.name, self.input_bits[layer.name]
        if bits is None:
            return 0
        kept = len(self.kept[name])
        return real_bops(layer.macs, layer.rows, kept, self.weight_bits[name], bits)

    def bops(self, network: SharedNetwork) -> int:
        """Return the bit operations of the network."""
        return sum(self.cost(layer) for layer in network.layers)

    def fit(self, network: SharedNetwork, limit: int) -> None:
        """Close gates until the bit operations are within the limit.

        The next one is the gate whose measure A is the least share of itself above its
        threshold, 1 − τ/A; of equals the first in the order of the model, the weight
        before the input.
        """
        while self.bops(network) > limit:
            best = min(self._open_gates(network), key=lambda item: item[0])
            _, name, of_weight, bits = best
            (self.weight_bits if of_weight else self.input_bits)[name] = bits
            self.closed.append(f"{name} {'weight' if of_weight else 'input'}")

    def _open_gates(
        self, network: SharedNetwork
    ) -> Iterable[tuple[float, str, bool, int]]:
        """Yield (1 − τ/A, layer, whether of its weight, bits without the gate)."""
        for layer in network.free:
            for sharing, table in (
                (layer.weight, self.weight_bits),
                (layer.inputs, self.input_bits),
            ):
                bits = table[layer.name]
                if sharing is None or bits is None:
                    continue
                rung = sharing.ladder.bits.index(bits)
                if not rung:
                    continue
                assert sharing.found is not None
                measure = float(sharing.found.measures[rung - 1])
                threshold = float(sharing.threshold[rung - 1])
                share = 1 - threshold / max(measure, 1e-30)
                of_weight = sharing is layer.weight
                yield share, layer.name, of_weight, sharing.ladder.bits[rung - 1]


@torch.no_grad()
def configuration(
    network: SharedNetwork, votes: dict[str, dict[int, int]]
) -> Configuration:
    """Return what the gates decided: those of inputs by a majority of the batches.

    Args:
        network: After the search and a forward pass.
        votes: Layer → bits → batches; of equals the more bits win.
    """
    weights, inputs, kept = {}, {}, {}
    for layer in network.layers:
        name = layer.name
        assert layer.weight.found is not None
        weights[name] = int(layer.weight.found.bits)
        inputs[name] = None if layer.inputs is None else FIXED_BITS
        if name in votes:
            inputs[name] = max(votes[name], key=lambda b: (votes[name][b], b))
        kept[name] = layer.weight.filters(layer.latent).nonzero().flatten().tolist()
    return Configuration(weights, inputs, kept)


def smallest(network: SharedNetwork) -> int:
    """Return the fewest bit operations that gates can reach: all closed."""
    total = 0
    for layer in network.layers:
        if layer.inputs is None:
            continue
        kept = layer.rows
        if layer.weight.group:
            sizes = [
                min(layer.weight.group, layer.rows - start)
                for start in range(0, layer.rows, layer.weight.group)
            ]
            # Which groups will go is not known: the smallest, to promise no more.
            gone = int(layer.weight.share_removed * len(sizes))
            kept -= sum(sorted(sizes)[:gone])
        bits = layer.weight.ladder.bits[0], layer.inputs.ladder.bits[0]
        total += real_bops(layer.macs, layer.rows, kept, *bits)
    return total


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
            dense(x)
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
            activation_bits=found.input_bits[name],
        )
    size = sum(level.size_bits for level in levels.values())
    return Plan(
        levels=levels,
        method="bit_sharing",
        size_bytes=-(-size // 8) + overhead_bytes(model, layers),
        bops=found.bops(network),
        details=details | {"kept_filters": kept, "closed_at_the_end": found.closed},
    )
