"""What tells one measurement from another, before it has begun."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from fitcompress.data.batches import digest, take
from fitcompress.errors import DistributedError
from fitcompress.model import fingerprint
from fitcompress.ranks import same

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from fitcompress.ranks import Ranks

__all__ = ["Key", "check_same", "estimate_key", "followed"]


class Key(NamedTuple):
    """What tells one measurement from another.

    Attributes:
        weights: Fingerprint of the model; of a sharded one, of this process's part.
        options: Labels, seed, number of samples.
        data: Checksum of the data that were looked at.
    """

    weights: str
    options: str
    data: str

    def __str__(self) -> str:
        return "-".join(self)


def estimate_key(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Any,
    samples: int | None,
    seed: int,
) -> tuple[Iterator[Any], Key]:
    """Return the loader's batches, and what must be equal to continue a checkpoint."""
    batches, crc = iter(loader), 0
    # What is in memory costs next to nothing to read; of the rest, the first batch.
    known: Iterable[Any] = loader
    if not isinstance(loader, (list, tuple)):
        known = first = list(itertools.islice(batches, 1))
        batches = followed(first, batches)
    for batch in take(known, samples):
        crc = digest(batch, crc)
    labels = "sampled" if loss_fn is None else getattr(loss_fn, "__qualname__", "data")
    weights = fingerprint(model, [])
    return batches, Key(weights, f"{labels}-{seed}-{samples}", f"{crc:08x}")


def check_same(ranks: Ranks, key: Key, *, weights: bool, data: bool) -> None:
    """Raise unless all processes measure the same.

    Args:
        ranks: The processes.
        key: Of this one.
        weights: Whether the weights must be the same.
        data: Whether the data must, as far as they were looked at.

    Raises:
        DistributedError: They do not.
    """
    keys = ranks.gather(key)
    for part, asked, fix in (
        ("weights", weights, "load the same checkpoint in all of them"),
        ("options", True, "call it with the same samples, seed and loss function"),
        (
            "data",
            data,
            "give all of them the same loader, in the same order: seed what shuffles "
            "or augments alike. Or let a DistributedSampler take the part of each",
        ),
    ):
        found = [getattr(each, part) for each in keys]
        if asked and not same(found):
            raise DistributedError(
                f"the processes measure with different {part}",
                got=", ".join(found),
                wanted="the same in all of them",
                fix=fix,
            )


def followed(first: list[Any], rest: Iterator[Any]) -> Iterator[Any]:
    """Yield what is in ``first``, which then is let go of, and ``rest``."""
    while first:
        yield first.pop(0)
    yield from rest
