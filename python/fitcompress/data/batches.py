"""Batches: what a loader may yield, and a small deterministic loader for arrays."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.errors import DataError, EmptyLoaderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Batches", "digest", "part", "split_batch", "take"]


def split_batch(batch: Any) -> tuple[torch.Tensor, Any]:
    """Return inputs and targets of a batch: a tensor, or (inputs, targets, …).

    Raises:
        DataError: The batch is something else.
    """
    if torch.is_tensor(batch):
        return batch, None
    if isinstance(batch, (tuple, list)) and batch and torch.is_tensor(batch[0]):
        return batch[0], batch[1] if len(batch) > 1 else None
    raise DataError(
        "a batch of the loader cannot be used",
        got=type(batch).__name__,
        wanted="a tensor of inputs, or a tuple (inputs, targets)",
        fix="wrap the loader so that it yields (inputs, targets)",
    )


def take(
    loader: Iterable[Any], samples: int | None
) -> Iterator[tuple[torch.Tensor, Any]]:
    """Yield (inputs, targets) until ``samples`` inputs have come, cutting the last.

    Raises:
        EmptyLoaderError: The loader yields nothing.
        DataError: A batch cannot be used, or ``samples`` is not positive.
    """
    if samples is not None and samples < 1:
        raise DataError("no sample may be used", got=samples, wanted="at least one")
    seen = 0
    for batch in loader:
        x, y = split_batch(batch)
        if samples is not None and seen + len(x) > samples:
            keep = samples - seen
            x, y = x[:keep], part(y, slice(keep))
        seen += len(x)
        if len(x):
            yield x, y
        if samples is not None and seen >= samples:
            return
    if not seen:
        raise EmptyLoaderError(
            "the loader yields no sample",
            got="0 batches",
            wanted="at least one batch of inputs",
            fix="check the data set, drop_last, and whether a generator was used up",
        )


def digest(x: torch.Tensor, start: int = 0) -> int:
    """Return the CRC-32 of the values of ``x``, continued from ``start``."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(
        flat.view(torch.uint8).numpy().tobytes() if len(flat) else b"", start
    )


def part(y: Any, keep: slice) -> Any:
    """Return the targets of some samples of a batch; containers are cut inside."""
    if isinstance(y, dict):
        return {key: part(value, keep) for key, value in y.items()}
    if isinstance(y, (tuple, list)) and any(torch.is_tensor(value) for value in y):
        cut = [part(value, keep) for value in y]
        return type(y)(*cut) if hasattr(y, "_fields") else type(y)(cut)
    return None if y is None else y[keep]


class Batches:
    """Batches of two tensors, the same for the same seed and epoch.

    Args:
        inputs: [N, …].
        targets: [N], or None.
        batch_size: Samples per batch; the last one may be shorter.
        shuffle: Draw a new order each epoch.
        augment: (inputs, generator) → inputs, applied to each batch.
        seed: Seeds order and augmentation together with the epoch.

    Attributes:
        epoch: Which epoch the next iteration yields; not advanced by iterating.
    """

    def __init__(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        batch_size: int = 128,
        shuffle: bool = False,
        augment: Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.inputs, self.targets = inputs, targets
        self.batch_size, self.shuffle = batch_size, shuffle
        self.augment, self.seed, self.epoch = augment, seed, 0

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(self.inputs)
        order = torch.arange(count)
        if self.shuffle:
            order = torch.randperm(count, generator=generator)
        for start in range(0, count, self.batch_size):
            index = order[start : start + self.batch_size]
            x = self.inputs[index]
            if self.augment is not None:
                x = self.augment(x, generator)
            yield x, None if self.targets is None else self.targets[index]
