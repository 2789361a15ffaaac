"""What two samples, run alone and together, tell about a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fitcompress.data.batches import part, tensors
from fitcompress.errors import UnsupportedLayerError
from fitcompress.model.forward import call_model
from fitcompress.sensitivity.capture import Capture, capturing
from fitcompress.sensitivity.layout import EXPANDED, SHARED, Layout, find_layout

if TYPE_CHECKING:
    from fitcompress.sensitivity.calls import Call
    from fitcompress.sensitivity.weights import Weight, WeightIndex

__all__ = ["Probe", "probe"]


@dataclass
class Probe:
    """How a model treats a batch.

    Attributes:
        layouts: Weight → where the samples are in the input of each of its calls.
        bytes_per_sample: What autograd keeps of a sample for the backward pass.
        alone: Whether samples must run one by one: a layer gives one result for all
            of them, and the gradient of that is a sum over samples; or the rows that it
            sees depend on values, as those of an expert.
        single: Whether there was only one sample to look at.
    """

    layouts: dict[Weight, list[Layout]] = field(default_factory=dict)
    bytes_per_sample: int = 0
    alone: bool = False
    single: bool = False

    def layout(self, weight: Weight, number: int) -> Layout:
        """Return where the samples are in the input of the ``number``-th call."""
        known = self.layouts.get(weight, [])
        return known[min(number, len(known) - 1)] if known else Layout(0)


@dataclass
class _Seen:
    """One forward pass: the inputs of all calls, its outputs, and what it keeps."""

    calls: dict[Weight, list[torch.Tensor]] = field(default_factory=dict)
    outputs: list[torch.Tensor] = field(default_factory=list)
    saved: dict[int, int] = field(default_factory=dict)  # address → bytes
    irregular: bool = False


def probe(model: nn.Module, index: WeightIndex, x: Any, batch: int) -> Probe:
    """Run a sample alone and together with another one, and compare what layers see.

    Args:
        model: The network.
        index: The weights to look for.
        x: Inputs of a batch.
        batch: B.

    Raises:
        UnsupportedLayerError: A layer mixes samples.
    """
    one = _look(model, index, part(x, slice(0, 1)))
    found = Probe(bytes_per_sample=sum(one.saved.values()), single=batch == 1)
    if batch == 1:
        return found
    pair = part(x, _pair(x, batch))
    two = _look(model, index, pair)
    found.alone = one.irregular or two.irregular
    try:
        found.layouts = _layouts(one, two)
    except UnsupportedLayerError:
        if not _independent(one, two):
            raise
        found.alone = True
    if not found.alone and any(SHARED in each for each in found.layouts.values()):
        found.alone = not _expand(model, index, pair, found, two)
    return found


def _layouts(one: _Seen, two: _Seen) -> dict[Weight, list[Layout]]:
    """Find where the samples are in the input of every call."""
    found: dict[Weight, list[Layout]] = {}
    for weight in {**one.calls, **two.calls}:
        inputs, others = (seen.calls.get(weight, []) for seen in (one, two))
        if len(inputs) != len(others):
            raise UnsupportedLayerError(
                f"layer {weight.name!r} is called more or less often for more samples",
                got=f"{len(inputs)} calls for one and {len(others)} for two",
            )
        found[weight] = [
            find_layout(weight.name, *both) for both in zip(inputs, others, strict=True)
        ]
    return found


def _independent(one: _Seen, two: _Seen) -> bool:
    """Whether a sample's output is the same, whatever else is in the batch."""
    if len(one.outputs) != len(two.outputs):
        return False
    try:
        for both in zip(one.outputs, two.outputs, strict=True):
            find_layout("the output", *both)
    except UnsupportedLayerError:
        return False
    return True


def _pair(x: Any, batch: int) -> slice:
    """Select the first sample and the first other one that differs from it."""
    first = list(tensors(part(x, slice(0, 1))))
    for other in range(1, batch):
        second = list(tensors(part(x, slice(other, other + 1))))
        if any(not torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            return slice(0, other + 1, other)
    return slice(0, 2)


def _look(
    model: nn.Module, index: WeightIndex, x: Any, layouts: Probe | None = None
) -> _Seen:
    """Run the forward pass and note what the layers see."""
    seen = _Seen()

    def caught(call: Call, out: torch.Tensor) -> torch.Tensor:
        assert call.input is not None
        inputs = seen.calls.setdefault(call.part.weight, [])
        if layouts and layouts.layout(call.part.weight, len(inputs)) == EXPANDED:
            out = out.expand(2, *out.shape[1:])
        inputs.append(call.input.detach().clone())
        keep(call.input)
        return capture.anchored(out)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if any(isinstance(t, nn.Parameter) for t in (tensor, tensor._base)):
            return tensor  # is there anyway
        storage = tensor.untyped_storage()
        seen.saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    capture = Capture(index, caught)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.enable_grad(), hooks, capturing(model, capture):
        out = call_model(model, x)
    seen.irregular = capture.irregular
    seen.outputs = [tensor.detach() for tensor in tensors(out)]
    return seen


def _expand(
    model: nn.Module, index: WeightIndex, pair: Any, found: Probe, two: _Seen
) -> bool:
    """Try to give every sample a result of its own of layers that see all at once."""
    before = dict(found.layouts)
    for weight, layouts in before.items():
        for layout, seen in zip(layouts, two.calls[weight], strict=True):
            if layout == SHARED and (seen.dim() < 2 or len(seen) != 1):
                return False
        found.layouts[weight] = [
            EXPANDED if layout == SHARED else layout for layout in layouts
        ]
    try:
        outputs = _look(model, index, pair, found).outputs
    except (RuntimeError, ValueError):  # shapes do not fit, or it is changed in place
        outputs = []
    same = len(outputs) == len(two.outputs) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, equal_nan=True)
        for a, b in zip(outputs, two.outputs, strict=True)
    )
    if not same:
        found.layouts = before
    return same
