"""The copy of a network that the search trains: every layer shares bits."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fitcompress.data.batches import take
from fitcompress.errors import CalibrationError, OptionError
from fitcompress.methods.bit_sharing.layers import (
    SharedInput,
    SharedLayer,
    SharedWeight,
    share_layer,
)
from fitcompress.methods.bit_sharing.shared_bits import Ladder
from fitcompress.model import Layer, check_untied, compressible_layers
from fitcompress.model.costs import bops, count_macs
from fitcompress.model.devices import device_of, to_device
from fitcompress.model.forward import call_model
from fitcompress.model.modes import evaluating
from fitcompress.model.patches import layer_input
from fitcompress.quantize import MSEObserver, channel_of, remove

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["FIXED_BITS", "SharedNetwork", "build_network"]

FIXED_BITS = 8  # of the first and the last layer, weights and inputs
CALIBRATION_BATCHES = 4


@dataclass(frozen=True)
class SharedNetwork:
    """A network whose layers share bits, and what it costs in float.

    Attributes:
        model: The copy under training.
        layers: Its layers, in the order of the model.
        dense_bops: MACs · 32 · 32.
    """

    model: nn.Module
    layers: list[SharedLayer]
    dense_bops: int

    @property
    def free(self) -> list[SharedLayer]:
        """The layers whose bits are searched."""
        return [layer for layer in self.layers if not layer.fixed]


def build_network(
    model: nn.Module,
    loader: Iterable[Any],
    ladder: Ladder,
    prune_groups: Mapping[str, int],
    max_pruned: float,
) -> SharedNetwork:
    """Return a copy of ``model`` that shares bits; ``model`` stays as it is.

    The first and the last layer that the network calls have 8 bits. Ranges of inputs
    start where the squared error at the second rung is least, over four batches.

    Args:
        model: The trained network, in float32.
        loader: Yields inputs or (inputs, …).
        ladder: The bits of all other layers.
        prune_groups: Pattern of layer names → B, filters that go together.
        max_pruned: Largest share of a layer's groups that may go.

    Raises:
        OptionError: There is no layer to search, a pattern matches none, or a weight
            is not in float32.
        CalibrationError: A layer is never called.
        EmptyLoaderError: The loader yields nothing.
    """
    student = remove(copy.deepcopy(model), activations=True)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    layers = compressible_layers(student)
    check_untied(layers)
    _check_types(layers)
    device = device_of(student)
    inputs = [
        to_device(x, device) for x, _ in islice(take(loader, None), CALIBRATION_BATCHES)
    ]
    macs = count_macs(student, inputs[0])
    order, ranges = _observe(student, layers, inputs, ladder)
    fixed = {order[0], order[-1]}
    free = [name for name in order if name not in fixed]
    if not free:
        raise OptionError(
            "there are no bits to search: the first and the last layer have 8",
            got=f"layers {', '.join(order)}",
            wanted="a network with layers between them",
        )
    groups = _groups(prune_groups, free)
    shared = []
    for layer in layers:
        name = layer.name
        given = name in fixed or layer.one_hot
        own = Ladder((FIXED_BITS,)) if given else ladder
        weight = SharedWeight(
            own, layer.weight, layer.view, groups.get(name, 0), max_pruned
        )
        quantizer = None
        if not layer.one_hot:
            reach, signed = ranges[name]
            quantizer = SharedInput(own, reach, signed=signed)
        shared.append(share_layer(layer, weight, quantizer, macs[name], fixed=given))
    return SharedNetwork(student, shared, bops(sum(macs.values()), 32))


def _check_types(layers: list[Layer]) -> None:
    for layer in layers:
        if layer.weight.dtype != torch.float32:
            raise OptionError(
                f"the weight of {layer.name!r} cannot be trained",
                got=layer.weight.dtype,
                wanted="float32: thresholds move by less than 16 bits can tell apart",
                fix="call model.float() first",
            )


def _groups(patterns: Mapping[str, int], free: list[str]) -> dict[str, int]:
    """Return layer → B of the layers whose filters may go."""
    found: dict[str, int] = {}
    for pattern, size in patterns.items():
        names = [name for name in free if fnmatchcase(name, pattern)]
        if not names:
            raise OptionError(
                "no layer whose filters could go has such a name",
                got=repr(pattern),
                wanted=f"a pattern for one of {', '.join(free)}",
            )
        found |= dict.fromkeys(names, size)
    return found


def _observe(
    model: nn.Module, layers: list[Layer], inputs: list[torch.Tensor], ladder: Ladder
) -> tuple[list[str], dict[str, tuple[float, bool]]]:
    """Return the layers in the order of their calls; range and sign of their inputs."""
    bits = ladder.bits[min(1, len(ladder.bits) - 1)]
    seen: dict[str, MSEObserver] = {}
    signs: dict[str, bool] = {}
    handles = []
    for layer in layers:
        if layer.one_hot:
            continue
        channel_of(layer.module)

        def look(
            module: nn.Module,
            args: tuple[Any, ...],
            named: dict[str, Any],
            name: str = layer.name,
        ) -> None:
            x = layer_input(args, named)
            seen.setdefault(name, MSEObserver()).observe(x)
            signs[name] = signs.get(name, False) or bool((x < 0).any())

        hook = layer.module.register_forward_pre_hook(look, with_kwargs=True)
        handles.append(hook)
    try:
        with evaluating(model), torch.no_grad():
            for x in inputs:
                call_model(model, x)
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        if not layer.one_hot and layer.name not in seen:
            raise CalibrationError(
                f"layer {layer.name!r} is never called",
                got=f"{len(inputs)} batches",
                wanted="a network that calls every layer",
                fix="remove the layer, or use data that reach it",
            )
    ranges = {}
    for name, observer in seen.items():
        found = observer.range(bits, symmetric=signs[name])
        ranges[name] = float(found.scale.max()) * found.max_code, signs[name]
    return list(seen), ranges
