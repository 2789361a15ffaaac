"""Where the samples of a batch lie in a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fitcompress.errors import UnsupportedLayerError

__all__ = ["EXPANDED", "SHARED", "SINGLE", "Layout", "close", "find_layout"]


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
        """Return ``tensor`` as [B, …, k, …], the sample first."""
        if self == SINGLE:
            return tensor[None]
        places = tensor.shape[self.dim] // batch
        split = (places, batch) if self.interleaved else (batch, places)
        shape = (*tensor.shape[: self.dim], *split, *tensor.shape[self.dim + 1 :])
        return tensor.reshape(shape).movedim(self.dim + int(self.interleaved), 0)


SINGLE = Layout(-1)  # a batch of one: everything belongs to it
EXPANDED = Layout(0, expanded=True)
SHARED = Layout(-2)  # the same for all samples at once: positions of a sequence, say


def find_layout(
    owner: str, what: str, a: torch.Tensor, b: torch.Tensor, both: torch.Tensor
) -> Layout:
    """Find where samples lie, from a tensor for each alone and for both together.

    Args:
        owner: Whose tensor it is, for the error.
        what: What it is, for the error.
        a: The tensor for a batch of sample a.
        b: The tensor for a batch of sample b.
        both: The tensor for a batch of samples a and b.

    Raises:
        UnsupportedLayerError: The samples are not found in the batch of two: the model
            mixes them.
    """
    if a.shape == b.shape == both.shape and close(a, both) and close(b, both):
        return SHARED
    if a.dim() == both.dim() and a.shape == b.shape:
        for dim in range(a.dim()):
            doubled = [n * (1 + (i == dim)) for i, n in enumerate(a.shape)]
            if list(both.shape) != doubled or not a.shape[dim]:
                continue
            for interleaved in (False, True):
                layout = Layout(dim, interleaved)
                parts = layout.by_sample(both, 2)
                if close(a, parts[0].reshape(a.shape)) and close(
                    b, parts[1].reshape(b.shape)
                ):
                    return layout
    raise UnsupportedLayerError(
        f"{owner} does not see the samples one by one",
        got=f"{what} of shape {tuple(a.shape)} for one sample and "
        f"{tuple(both.shape)} for two, that does not hold the same values again",
        wanted="every sample treated alike, whatever else is in the batch",
        fix="put norms and dropout into eval mode, and let no operation mix samples",
    )


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors differ by rounding only."""
    if not a.is_floating_point() or a.numel() == 0:
        return a.equal(b)
    same = a == b  # infinities, as in masks
    if bool(same.all()):
        return True
    tolerance = 1e-3 if a.dtype.itemsize > 2 else 3e-2
    finite = a.isfinite() & b.isfinite()
    largest = float(torch.where(finite, a, 0).abs().max())
    apart = torch.where(same | (a.isnan() & b.isnan()), 0, (a - b).abs())
    return bool((apart <= tolerance * largest).all())
