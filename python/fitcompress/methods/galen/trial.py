"""Whether channels can go: tried on the network, not believed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.methods.galen.groups import kept_channels, without_channels
from fitcompress.methods.galen.surgery import prune_channels
from fitcompress.model.forward import call_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from fitcompress.methods.galen.groups import ChannelGroup

__all__ = ["Trial"]

CLOSE = 1e-3  # of the largest change of an output: how exact a trial is
ROUNDING = 32  # times the precision of floats: what outputs differ by anyway


class Trial:
    """Removes half of the channels of groups, one group after the other.

    In float64 if the network runs in it: outputs may be large and what channels
    contribute small.

    Args:
        dense: The network, in eval mode; unchanged.
        example: As it takes it. Floats are drawn anew, as zeros tell nothing: from a
            normal distribution or, where that gives outputs that are not finite, the
            positive half of it; else the example itself is tried on.
    """

    @torch.no_grad()
    def __init__(self, dense: nn.Module, example: Any) -> None:
        self._dense, self._example = dense, example
        self._outputs: list[torch.Tensor] = []
        self.failure = ""
        for network, x in _settings(dense, example):
            try:
                found = outputs_of(call_model(network, x))
            except Exception as error:  # a model's own, an assert say
                self.failure = " ".join(str(error).split()) or type(error).__name__
                continue
            if all(bool(y.isfinite().all()) for y in found):
                self._dense, self._example, self._outputs = network, x, found
                self.failure = ""
                return
            self.failure = "its outputs are not finite"

    @torch.no_grad()
    def why_not(self, group: ChannelGroup) -> str:
        """Remove channels of a group; return why that fails, or nothing."""
        if self.failure:
            return f"the network cannot be tried: {self.failure[:100]}"
        # Not a regular pattern, which a shift of channels could leave as it is.
        generator = torch.Generator().manual_seed(group.width)
        order = torch.randperm(group.width, generator=generator).tolist()
        half = -(-group.width // 2)
        kept, removed = sorted(order[:half]), sorted(order[half:])
        masked = without_channels(self._dense, group, removed)
        try:
            wanted = outputs_of(call_model(masked, self._example))
            small = prune_channels(self._dense, kept_channels([group], [kept]))
            found = outputs_of(call_model(small, self._example))
        except Exception:  # a model's own, an assert say
            return "the network does not run without some of its channels"
        for before, a, b in zip(self._outputs, found, wanted, strict=True):
            if a.shape != b.shape:
                return "its channels are those of the output"
            if not _close(a, b, before):
                return "what follows mixes up its channels when some are missing"
        return ""


def outputs_of(out: Any) -> list[torch.Tensor]:
    """Return the tensors of an output."""
    if torch.is_tensor(out):
        return [out]
    values = out.values() if hasattr(out, "values") else out
    return [x for x in values if torch.is_tensor(x)]


def drawn(example: Any, *, positive: bool = False) -> Any:
    """Return an example of the same shapes, floats drawn anew."""
    generator = torch.Generator().manual_seed(0)

    def draw(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: draw(value) for key, value in x.items()}
        if isinstance(x, (tuple, list)):
            return type(x)(draw(value) for value in x)
        if torch.is_tensor(x) and x.is_floating_point():
            noise = torch.randn(x.shape, generator=generator)
            return (noise.abs() if positive else noise).to(x)
        return x

    return draw(example)


def _settings(dense: nn.Module, example: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Yield networks and inputs to try on, the best first."""
    inputs = [drawn(example), drawn(example, positive=True), example]
    double = copy.deepcopy(dense).double()
    for x in inputs:
        yield double, _double(x)
        yield dense, x


def _double(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _double(value) for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(_double(value) for value in x)
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


def _close(a: torch.Tensor, b: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether an output is as wanted, measured by how much it changed."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    change = (b - before).abs().max() if b.numel() else b.new_zeros(())
    largest = b.abs().max() if b.numel() else b.new_zeros(())
    allowed = CLOSE * change + ROUNDING * torch.finfo(b.dtype).eps * largest
    return bool(((a - b).abs() <= allowed).all())  # NaN is not close to anything
