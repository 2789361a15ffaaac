"""Batches: what a loader may yield, and a small deterministic loader for arrays."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.errors import DataError, EmptyLoaderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = [
    "Batches",
    "batch_size",
    "digest",
    "floats",
    "join",
    "part",
    "sample_shapes",
    "split_batch",
    "take",
    "tensors",
    "with_tensors",
]


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets of a batch.

    Inputs are a tensor, or a mapping of named ones, as Hugging Face's data collators
    yield: :func:`fitcompress.model.forward.call_model` calls a model with either. A
    batch is inputs alone, or (inputs, targets, …). The ``labels`` of a mapping are its
    targets, so that the model does not compute a loss of its own. The first dimension
    is the sample; a sample of text is a whole sequence.

    Raises:
        DataError: The batch is something else.
    """
    x, y = batch, None
    if isinstance(batch, (tuple, list)) and batch:
        x, y = batch[0], batch[1] if len(batch) > 1 else None
    if torch.is_tensor(x):
        return x, y
    if isinstance(x, Mapping) and any(map(torch.is_tensor, x.values())):
        named = dict(x)
        labels = named.pop("labels", None)
        if named:
            return named, labels if y is None else y
    raise DataError(
        "a batch of the loader cannot be used",
        got=type(batch).__name__,
        wanted="a tensor of inputs, a dict of named ones, or a tuple (inputs, targets)",
        fix="wrap the loader so that it yields (inputs, targets)",
    )


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers, in their order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def floats(value: Any) -> list[torch.Tensor]:
    """Return the floating-point tensors in nested containers, in their order."""
    return [tensor for tensor in tensors(value) if tensor.is_floating_point()]


def with_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return nested containers, rebuilt, with what ``change`` makes of their tensors.

    All else stays.
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: with_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        made = [with_tensors(item, change) for item in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value


def sample_shapes(x: Any) -> tuple[Any, ...]:
    """Return the shapes and types of what belongs to one sample of inputs."""
    return tuple((tensor.shape[1:], tensor.dtype) for tensor in tensors(x))


def batch_size(x: Any) -> int:
    """Return the number of samples of inputs: the first dimension of all their tensors.

    Raises:
        DataError: There is no tensor with a dimension, or they differ.
    """
    if isinstance(x, torch.Tensor) and x.dim():
        return len(x)
    sizes = [len(tensor) for tensor in tensors(x) if tensor.dim()]
    if not sizes or min(sizes) != max(sizes):
        raise DataError(
            "the inputs of a batch have no common number of samples",
            got=f"first dimensions {sizes}" if sizes else type(x).__name__,
            wanted="tensors whose first dimension is the sample",
            fix="put samples first, and bind arguments that are the same for all of "
            "them to the model",
        )
    return sizes[0]


def take(
    loader: Iterable[Any],
    samples: int | None,
) -> Iterator[tuple[Any, Any]]:
    """Yield (inputs, targets) until ``samples`` inputs have come, cutting the last.

    Args:
        loader: Yields batches.
        samples: How many samples; None for all.

    Raises:
        EmptyLoaderError: The loader yields nothing.
        DataError: A batch cannot be used, or ``samples`` is not positive.
    """
    if samples is not None and samples < 1:
        raise DataError("no sample may be used", got=samples, wanted="at least one")
    seen = 0
    for batch in loader:
        x, y = split_batch(batch)
        count = batch_size(x)
        if samples is not None and seen + count > samples:
            count = samples - seen
            x, y = part(x, slice(count)), part(y, slice(count))
        seen += count
        if count:
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


def digest(x: Any, start: int = 0) -> int:
    """Return the CRC-32 of the values of all tensors, continued from ``start``."""
    for tensor in tensors(x):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if len(flat):
            start = zlib.crc32(flat.view(torch.uint8).numpy().data, start)
    return start


def join(parts: Sequence[Any]) -> Any:
    """Return inputs of several batches as those of one; the reverse of :func:`part`.

    What is no tensor with a dimension is taken from the first.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, dict):
        return {key: join([each[key] for each in parts]) for key in first}
    return torch.cat(list(parts)) if torch.is_tensor(first) and first.dim() else first


def part(y: Any, keep: slice | torch.Tensor) -> Any:
    """Return what belongs to some samples of a batch; containers are cut inside.

    Numbers and tensors without a dimension belong to all of them. Other sequences than
    tensors take slices only.
    """
    if isinstance(y, dict):
        return {key: part(value, keep) for key, value in y.items()}
    if isinstance(y, (bool, int, float, str)) or (torch.is_tensor(y) and y.dim() == 0):
        return y
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
