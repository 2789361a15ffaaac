"""Where the samples of a batch lie in the input of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fitcompress.errors import UnsupportedLayerError

if TYPE_CHECKING:
    import torch

__all__ = ["EXPANDED", "SHARED", "SINGLE", "Layout", "find_layout"]


@dataclass(frozen=True)
class Layout:
    """The dimension that grows with the number of samples, and how.

    Attributes:
        dim: The dimension. It holds k places of each sample: 1, or windows, time steps
            or heads that the model folds into the batch.
        interleaved: Whether the samples alternate within it, place by place, instead of
            following each other.
        expanded: Whether the input is the same for all samples, with a dimension of 1
            that can be expanded to them, as the positions [1, T] of a sequence.
    """

    dim: int
    interleaved: bool = False
    expanded: bool = False

    def by_sample(self, tensor: torch.Tensor, batch: int) -> torch.Tensor:
        """Return ``tensor`` as [B, …, k, …], the sample first.

        Raises:
            UnsupportedLayerError: The dimension is no multiple of the batch.
        """
        if self == SINGLE:
            return tensor[None]
        size = tensor.shape[self.dim] if self.dim < tensor.dim() else 0
        if size % batch or not size:
            raise UnsupportedLayerError(
                "a layer does not see the samples one by one",
                got=f"an input of shape {tuple(tensor.shape)}",
                wanted=f"{batch} samples, or a multiple, in dimension {self.dim}",
                fix="let every sample be treated alike",
            )
        places = size // batch
        split = (places, batch) if self.interleaved else (batch, places)
        shape = (*tensor.shape[: self.dim], *split, *tensor.shape[self.dim + 1 :])
        return tensor.reshape(shape).movedim(self.dim + int(self.interleaved), 0)


SINGLE = Layout(-1)  # a batch of one: everything belongs to it
EXPANDED = Layout(0, expanded=True)
SHARED = Layout(-2)  # the same for all samples at once: positions of a sequence, say


def find_layout(name: str, one: torch.Tensor, two: torch.Tensor) -> Layout:
    """Find where a sample lies, from the inputs of a layer for it alone and for two.

    Args:
        name: The weight, for the error.
        one: Input of the layer in a batch of sample a.
        two: Input of the layer in a batch of samples a and b.

    Raises:
        UnsupportedLayerError: Sample a is not found in the batch of two: the model
            mixes samples.
    """
    if one.shape == two.shape and _close(one, two):
        return SHARED
    if one.dim() == two.dim():
        for dim, (n, m) in enumerate(zip(one.shape, two.shape, strict=True)):
            others = [i for i in range(one.dim()) if i != dim]
            if m != 2 * n or any(one.shape[i] != two.shape[i] for i in others):
                continue
            for interleaved in (False, True):
                layout = Layout(dim, interleaved)
                if _close(one, layout.by_sample(two, 2)[0].reshape(one.shape)):
                    return layout
    raise UnsupportedLayerError(
        f"layer {name!r} does not see the samples one by one",
        got=f"an input of shape {tuple(one.shape)} for one sample and "
        f"{tuple(two.shape)} for two, that does not hold the first again",
        wanted="every sample treated alike, whatever else is in the batch",
        fix="put norms into eval mode, and let no operation mix samples",
    )


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two inputs differ by rounding only."""
    if not a.is_floating_point():
        return a.equal(b)
    if a.numel() == 0:
        return True
    tolerance = 1e-3 if a.dtype.itemsize > 2 else 3e-2
    largest = float(a.abs().max())
    return not float((a - b).abs().max()) > tolerance * largest
