"""Second moments of a layer's inputs, from forward passes that stop at the layer.

    H = E[x̂ x̂ᵀ],  C = E[x x̂ᵀ]

with x the inputs of the dense network and x̂ those of the network compressed so far, one
vector per position (or patch) of every calibration sample, groups apart. Products in
float32, sums in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.errors import CalibrationError, NonFiniteError
from fitcompress.model.patches import patches

if TYPE_CHECKING:
    from torch import nn

    from fitcompress.model import Layer

__all__ = ["InputCache", "execution_order", "layer_inputs", "second_moments"]

ENOUGH_ROWS = 131_072  # positions after which every other one is left out
CACHE_BYTES = 1 << 30
CHUNK_ROWS = 65_536  # rows of patches that exist at a time


class _StopForwardError(Exception):
    """Ends a forward pass once a layer's inputs are known."""


def execution_order(model: nn.Module, layers: list[Layer], x: torch.Tensor) -> dict[str, int]:
    """Return layer name → number of uses in one forward pass, in the order of first use.

    Raises:
        CalibrationError: A layer is not reached.
    """
    uses: dict[str, int] = {}
    handles = []
    for layer in layers:

        def count(_: Any, __: Any, name: str = layer.name) -> None:
            uses[name] = uses.get(name, 0) + 1

        handles.append(layer.module.register_forward_pre_hook(count))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    missing = [layer.name for layer in layers if layer.name not in uses]
    if missing:
        raise CalibrationError(
            f"the calibration data never reach layer {missing[0]!r}",
            got=f"{len(missing)} of {len(layers)} layers not reached",
            wanted="a forward pass that uses every compressible layer",
            fix="calibrate with inputs that exercise it, or remove the layer",
        )
    return uses


def layer_inputs(
    model: nn.Module, module: nn.Module, x: torch.Tensor, uses: int
) -> list[torch.Tensor]:
    """Return the inputs of each use of ``module`` in a forward pass of ``x``."""
    caught: list[torch.Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0].detach().clone())
        if len(caught) == uses:
            raise _StopForwardError

    handle = module.register_forward_pre_hook(catch)
    try:
        with torch.no_grad():
            model(x)
    except _StopForwardError:
        pass
    finally:
        handle.remove()
    return caught


@dataclass
class InputCache:
    """Inputs of the dense network's layers, kept while they fit into memory.

    They do not change while a plan is scaled to its budget, so each is computed once.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    uses: dict[str, int]
    batches: list[torch.Tensor]
    _kept: dict[tuple[str, int], list[torch.Tensor]] = field(default_factory=dict)
    _bytes: int = 0

    def get(self, name: str, batch: int) -> list[torch.Tensor]:
        """Return the inputs of each use of layer ``name`` for one batch."""
        key = (name, batch)
        if key in self._kept:
            return self._kept[key]
        found = layer_inputs(
            self.model, self.modules[name], self.batches[batch], self.uses[name]
        )
        size = sum(t.numel() * t.element_size() for t in found)
        if self._bytes + size <= CACHE_BYTES:
            self._kept[key] = found
            self._bytes += size
        return found


def second_moments(
    layer: Layer, dense: InputCache, compressed: nn.Module, module: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return H and C of one layer.

    Args:
        layer: The layer of the dense network.
        dense: Its inputs, batch by batch.
        compressed: The network compressed so far.
        module: The same layer in it.

    Returns:
        H and C, float64 [groups, columns, columns].

    Raises:
        NonFiniteError: An input of the layer is NaN or infinite.
    """
    shape = (layer.groups, layer.columns, layer.columns)
    h, c = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    rows, skip = 0, 0
    uses = dense.uses[layer.name]
    for number, batch in enumerate(dense.batches):
        now = layer_inputs(compressed, module, batch, uses)
        for x_dense, x_now in zip(dense.get(layer.name, number), now, strict=True):
            if not skip:
                skip = _skip(layer, x_dense, len(dense.batches) * uses)
            offset = number % skip
            for part in _parts(len(batch), x_dense, layer):
                a = patches(layer.module, x_dense[part].float(), skip=skip, offset=offset)
                b = patches(layer.module, x_now[part].float(), skip=skip, offset=offset)
                a, b = a.flatten(1, 2), b.flatten(1, 2)
                h += (b.transpose(1, 2) @ b).double()
                c += (a.transpose(1, 2) @ b).double()
                rows += a.shape[1]
    if not (torch.isfinite(h).all() and torch.isfinite(c).all()):
        raise NonFiniteError(
            f"an input of layer {layer.name!r} is not finite",
            wanted="finite calibration inputs",
            fix="look for NaN in the calibration data",
        )
    return h / rows, c / rows


def _skip(layer: Layer, x: torch.Tensor, batches: int) -> int:
    """Return 2, 4, … if every 2nd, 4th, … position per dimension is plenty, else 1."""
    if not hasattr(layer.module, "kernel_size"):
        return 1
    dims = x.dim() - 2
    strides = int(torch.tensor(layer.module.stride).prod())
    positions = len(x) * batches * x.shape[2:].numel() // strides
    skip = 1
    while positions // (2 * skip) ** dims >= max(ENOUGH_ROWS, 64 * layer.columns):
        skip *= 2
    return skip


def _parts(batch: int, x: torch.Tensor, layer: Layer) -> list[slice]:
    positions = x[0].numel() // max(x.shape[1] if hasattr(layer.module, "groups") else x.shape[-1], 1)
    step = max(1, CHUNK_ROWS // max(positions, 1))
    return [slice(i, i + step) for i in range(0, batch, step)]
