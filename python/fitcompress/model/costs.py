"""What a layer costs: multiply-accumulates, bit operations, bytes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from fitcompress.data.batches import batch_size
from fitcompress.model.forward import call_model
from fitcompress.model.layers import Layer, compressible_layers
from fitcompress.model.matrix_view import TRANSPOSED
from fitcompress.model.modes import evaluating
from fitcompress.model.patches import layer_input

__all__ = ["bops", "count_macs", "dense_bytes", "overhead_bytes"]


def count_macs(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Return the multiply-accumulates of every compressible layer for *one* sample.

    A convolution costs P·O·I (P output positions, O output channels, I inputs of one
    output), a transposed one as many products as it really does: every value of its
    input meets the kernel once for each output channel of its group; an embedding
    none. A layer that is used twice counts twice, and so does a weight that layers
    share.

    Args:
        model: The network.
        inputs: Those of one batch, the samples along the first dimension.

    Returns:
        Layer name → multiply-accumulates of one sample.
    """
    layers = compressible_layers(model)
    macs = {layer.name: 0 for layer in layers}
    handles = []
    for layer in layers:

        def count(
            module: nn.Module,
            args: tuple[Any, ...],
            named: dict[str, Any],
            out: torch.Tensor,
            layer: Layer = layer,
        ) -> None:
            if isinstance(module, TRANSPOSED):
                x = layer_input(args, named)
                macs[layer.name] += x.numel() * math.prod(layer.shape[1:])
            elif not isinstance(module, nn.Embedding):
                macs[layer.name] += out.numel() * layer.columns

        handles += [
            module.register_forward_hook(count, with_kwargs=True)
            for module in layer.modules
        ]
    try:
        with evaluating(model), torch.no_grad():
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: count // batch_size(inputs) for name, count in macs.items()}


def bops(macs: int, weight_bits: float, activation_bits: float = 32) -> int:
    """Return MACs · weight bits · activation bits; float32 is 32 · 32."""
    return round(macs * weight_bits * activation_bits)


def dense_bytes(model: nn.Module) -> int:
    """Return the float32 bytes of all parameters of ``model``, shared ones once.

    The reference of every size in per cent: 4 · number of parameters. Buffers such as
    running means do not count here, but they do in the packed file.
    """
    return 4 * sum(p.numel() for p in model.parameters())


def overhead_bytes(model: nn.Module, layers: list[Layer]) -> int:
    """Return about what a packed file holds besides codes.

    Two 16-bit numbers per channel of a batch norm, 16 bits for every other parameter,
    buffers as they are, unless the state dict leaves them out; 4 bytes checksum per
    layer; about 13 bytes of index per tensor.
    """
    coded = {id(layer.weight) for layer in layers}
    held = [layer.module for layer in layers if is_parametrized(layer.module, "weight")]
    chains = [module.get_submodule("parametrizations.weight") for module in held]
    grids = {id(module) for chain in chains for module in chain.modules()}
    total, tensors, seen = 0, 0, set()
    for module in model.modules():
        if id(module) in grids:
            continue
        norm = isinstance(module, _BatchNorm) and module.running_mean is not None
        if isinstance(module, _BatchNorm) and norm and module.weight is not None:
            total, tensors = total + 4 * module.weight.numel(), tensors + 1
            continue
        own = [*module.parameters(recurse=False), *_stored_buffers(module)]
        for tensor in own:
            if id(tensor) in coded or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            rounded = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
            width = 2 if rounded else tensor.element_size()
            total, tensors = total + width * tensor.numel(), tensors + 1
    return total + 420 + 4 * len(layers) + 13 * (tensors + len(layers))


def _stored_buffers(module: nn.Module) -> list[torch.Tensor]:
    left_out = module._non_persistent_buffers_set
    named = module.named_buffers(recurse=False)
    return [buffer for name, buffer in named if name not in left_out]
