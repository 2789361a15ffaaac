"""The weights that single layers have at their levels, all others being dense."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fitcompress.compensate.rounding import rounded
from fitcompress.compensate.statistics import Moments, gather
from fitcompress.compensate.sweep import quantize
from fitcompress.sensitivity.mask_rules import importance_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from fitcompress.compensate.options import Compensation
    from fitcompress.compensate.outlets import Outlet
    from fitcompress.compensate.sweep import Quantized
    from fitcompress.model import Layer
    from fitcompress.search.plan import Level
    from fitcompress.sensitivity.mask_rules import MaskRule

__all__ = ["level_weights", "swapped"]


def level_weights(
    layer: Layer,
    levels: Sequence[Level],
    inputs: Sequence[torch.Tensor],
    outlet: Outlet,
    options: Compensation | None,
    *,
    masks: MaskRule | None = None,
) -> list[Quantized]:
    """Return one layer at each of its levels.

    Args:
        layer: Of the dense network.
        levels: K levels.
        inputs: The layer's inputs there, one tensor a batch, to compensate with.
        outlet: What can take a shift of the outputs.
        options: What compensation does; there is no drift to correct. None: weights are
            rounded.
        masks: What a level's mask drops first, None: as ``apply`` does by itself.

    Returns:
        K sets of codes, in as few bytes as they need.

    Raises:
        PlanMismatchError: The rule is that of another model.
    """
    importance = None if masks is None else importance_of(masks, layer)
    if options is None or layer.rounded_alone:
        return [_packed(rounded(layer, level, importance)) for level in levels]
    moments = gather(layer, inputs, inputs)
    made = []
    for level in levels:
        own = Moments(moments.second.clone(), moments.cross.clone())  # is used up
        quantized = quantize(
            layer.matrix(),
            own,
            None,
            level,
            replace(options, drift=0.0),
            biased=outlet.module is not None,
            scalable=outlet.norm,
            importance=importance,
            name=layer.name,
        )
        made.append(_packed(quantized))
    return made


def _packed(made: Quantized) -> Quantized:
    largest = int(made.codes.abs().max()) if made.codes.numel() else 0
    kinds = ((2**7, torch.int8), (2**15, torch.int16), (2**31, torch.int32))
    kind = next(kind for bound, kind in kinds if largest < bound)
    return replace(made, codes=made.codes.to(kind))


@contextlib.contextmanager
def swapped(
    model: nn.Module, layer: Layer, made: Quantized, outlet: Outlet
) -> Iterator[None]:
    """Run a block with one layer of ``model`` on its level.

    Args:
        model: With folded norms.
        layer: The layer of that name is changed.
        made: What its weights become.
        outlet: What takes the shift of its outputs.
    """
    changed = [(layer.name, "weight")]
    if outlet.module is not None:
        changed += [(outlet.module, "bias")]
        changed += [(outlet.module, "weight")] if outlet.norm else []
    tensors = [model.get_parameter(".".join(parts)) for parts in changed]
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors[1:]:
            tensor.data = tensor.data.clone()
        matrix = made.codes.float() * made.scale.reshape(-1, 1)
        values = layer.view.weight_of(matrix, layer.shape)
        tensors[0].data = values.to(before[0].dtype).contiguous()
        outlet.adjust(model, made.shift, made.gain)
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data
