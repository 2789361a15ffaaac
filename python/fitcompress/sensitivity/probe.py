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
from fitcompress.sensitivity.layout import (
    EXPANDED,
    SHARED,
    Layout,
    close,
    find_layout,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from fitcompress.sensitivity.calls import Call
    from fitcompress.sensitivity.weights import Weight, WeightIndex

__all__ = ["Place", "Probe", "probe"]


@dataclass(frozen=True)
class Place:
    """Where a call finds the samples of a batch.

    Attributes:
        layout: How they lie in its input.
        shape: Shape of the input for one sample.
    """

    layout: Layout
    shape: tuple[int, ...]

    def fits(self, tensor: torch.Tensor, batch: int) -> bool:
        """Whether an input has the shape that a batch must give it."""
        wanted = list(self.shape)
        if self.layout.dim >= 0 and not self.layout.expanded:
            wanted[self.layout.dim] *= batch
        return list(tensor.shape) == wanted


@dataclass
class Probe:
    """How a model treats batches of samples of one shape.

    Attributes:
        places: Weight → where each of its calls finds the samples.
        bytes_per_sample: What autograd keeps of a sample for the backward pass.
        alone: Whether samples must run one by one: a layer gives one result for all
            of them, and the gradient of that is a sum over samples; or the rows that it
            sees depend on values, as those of an expert.
        copy_inputs: Whether something changes the input of a layer in place.
        single: Whether there was only one sample to look at.
    """

    places: dict[Weight, list[Place]] = field(default_factory=dict)
    bytes_per_sample: int = 0
    alone: bool = False
    copy_inputs: bool = False
    single: bool = False


@dataclass
class _Seen:
    """One forward pass: the inputs of all calls, its outputs, and what it keeps."""

    calls: dict[Weight, list[tuple[Call, torch.Tensor]]] = field(default_factory=dict)
    outputs: list[torch.Tensor] = field(default_factory=list)
    saved: dict[int, int] = field(default_factory=dict)  # address → bytes
    irregular: bool = False
    stale: bool = False


def probe(model: nn.Module, index: WeightIndex, x: Any, batch: int) -> Probe:
    """Run two samples, each alone and both together, and compare what layers see.

    Args:
        model: The network.
        index: The weights to look for.
        x: Inputs of a batch.
        batch: B.

    Raises:
        UnsupportedLayerError: The output of a sample depends on the others.
    """
    one = _look(model, index, part(x, slice(0, 1)))
    found = Probe(
        bytes_per_sample=sum(one.saved.values()),
        copy_inputs=one.stale,
        single=batch == 1,
    )
    if batch == 1:
        return found
    pair = _pair(x, batch)
    other = _look(model, index, part(x, slice(pair.stop - 1, pair.stop)))
    two = _look(model, index, part(x, pair))
    try:
        outputs = _independent(one, other, two)
    except UnsupportedLayerError:
        _places(one, other, two)  # names the first layer that sees it, if there is one
        raise
    found.alone = one.irregular or two.irregular
    try:
        found.places = _places(one, other, two)
    except UnsupportedLayerError:
        found.alone = True
    shared = [p for each in found.places.values() for p in each if p.layout == SHARED]
    if shared and not found.alone:
        found.alone = not _expand(model, index, part(x, pair), found, two, outputs)
    return found


def _pair(x: Any, batch: int) -> slice:
    """Select the first sample and the first other one that differs from it."""
    first = list(tensors(part(x, slice(0, 1))))
    for other in range(1, batch):
        second = list(tensors(part(x, slice(other, other + 1))))
        if any(not torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            return slice(0, other + 1, other)
    return slice(0, 2)


def _look(
    model: nn.Module,
    index: WeightIndex,
    x: Any,
    change: Callable[[Call, int, torch.Tensor], torch.Tensor] | None = None,
) -> _Seen:
    """Run the forward pass and note what the layers see.

    Args:
        model: The network.
        index: The weights to look for.
        x: Inputs.
        change: (call, its number among those of the weight, its result) → a result to
            go on with.
    """
    seen = _Seen()

    def caught(call: Call, out: torch.Tensor) -> torch.Tensor:
        assert call.input is not None
        calls = seen.calls.setdefault(call.part.weight, [])
        if change is not None:
            out = change(call, len(calls), out)
        calls.append((call, call.input.detach().clone()))
        keep(call.input)
        return capture.anchored(out)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        """Count what autograd saves; detached, or a result would hold itself."""
        if not any(isinstance(t, nn.Parameter) for t in (tensor, tensor._base)):
            storage = tensor.untyped_storage()
            seen.saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    capture = Capture(index, caught)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.enable_grad(), hooks, capturing(model, capture):
        out = call_model(model, x)
    capture.caught = lambda _, out: out  # no cycle: what was seen goes at once
    seen.irregular = capture.irregular
    seen.outputs = [tensor.detach() for tensor in tensors(out) if tensor.dim()]
    for calls in seen.calls.values():
        for call, before in calls:
            assert call.input is not None
            seen.stale |= not torch.equal(call.input.detach(), before)
            call.input = None  # its graph holds what counts its tensors
    return seen


def _independent(one: _Seen, other: _Seen, two: _Seen) -> list[Layout]:
    """Return where the samples are in the outputs, which must not depend on each other.

    Raises:
        UnsupportedLayerError: They do.
    """
    if not len(one.outputs) == len(other.outputs) == len(two.outputs):
        raise UnsupportedLayerError(
            "the number of the model's outputs depends on the batch",
            got=f"{len(one.outputs)} tensors for one sample and {len(two.outputs)} for "
            "two",
        )
    return [
        find_layout("the model", "an output", *each)
        for each in zip(one.outputs, other.outputs, two.outputs, strict=True)
    ]


def _places(one: _Seen, other: _Seen, two: _Seen) -> dict[Weight, list[Place]]:
    """Find where the samples are in the input of every call.

    Raises:
        UnsupportedLayerError: They are not there, or not as many times.
    """
    found: dict[Weight, list[Place]] = {}
    for weight in {**one.calls, **other.calls, **two.calls}:
        calls = [seen.calls.get(weight, []) for seen in (one, other, two)]
        if len({len(each) for each in calls}) > 1:
            raise UnsupportedLayerError(
                f"layer {weight.name!r} is called more often for some samples",
                got=f"{len(calls[0])} calls for one and {len(calls[2])} for two",
            )
        places = []
        for (call, a), (_, b), (_, both) in zip(*calls, strict=True):
            layout = find_layout(f"layer {weight.name!r}", "an input", a, b, both)
            if call.stride and layout.dim > 0:
                raise UnsupportedLayerError(
                    f"samples lie in a dimension that layer {weight.name!r} slides over"
                )
            places.append(Place(layout, tuple(a.shape)))
        found[weight] = places
    return found


def _expand(
    model: nn.Module,
    index: WeightIndex,
    pair: Any,
    found: Probe,
    two: _Seen,
    outputs: list[Layout],
) -> bool:
    """Try to give every sample a result of its own of layers that see all at once.

    Such a result, [1, …], is expanded to the samples. That is right if the output of
    each depends on its own copy only, which is tried by disturbing copies.
    """
    shared = {
        (weight, number)
        for weight, places in found.places.items()
        for number, place in enumerate(places)
        if place.layout == SHARED
    }
    seen = [two.calls[weight][number][1] for weight, number in shared]
    if any(each.dim() < 2 or len(each) != 1 for each in seen):
        return False

    def run(disturbed: tuple[int, ...]) -> list[torch.Tensor]:
        def change(call: Call, number: int, out: torch.Tensor) -> torch.Tensor:
            if (call.part.weight, number) not in shared:
                return out
            out = out.expand(2, *out.shape[1:])
            if disturbed:
                added = 0.5 * out.detach().roll(1, -1) + 0.1
                on = torch.zeros(2, *[1] * (out.dim() - 1), dtype=out.dtype)
                on[list(disturbed)] = 1
                out = out + added * on.to(out.device)
            return out

        return _look(model, index, pair, change).outputs

    try:
        none, first, second, both = run(()), run((0,)), run((1,)), run((0, 1))
    except (RuntimeError, ValueError, IndexError):  # shapes do not fit
        return False
    checked = 0
    for i, layout in enumerate(outputs):
        if layout == SHARED:
            continue
        plain = two.outputs[i]
        if not plain.shape == none[i].shape == both[i].shape or not close(
            plain, none[i]
        ):
            return False
        base, one, other, all_ = (
            layout.by_sample(t, 2) for t in (none[i], first[i], second[i], both[i])
        )
        checked += 1
        if not (
            close(one[0], all_[0])
            and close(one[1], base[1])
            and close(other[1], all_[1])
            and close(other[0], base[0])
        ):
            return False
    if not checked:
        return False
    for weight, number in shared:
        place = found.places[weight][number]
        found.places[weight][number] = Place(EXPANDED, place.shape)
    return True
