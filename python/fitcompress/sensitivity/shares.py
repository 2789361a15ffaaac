"""Which batches of a loader a process measures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import DistributedSampler

from fitcompress.data.batches import batch_size, take
from fitcompress.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fitcompress.ranks import Ranks

__all__ = ["Share", "distributed_sampler", "numbered", "shared_out"]


class Share(NamedTuple):
    """A batch that this process measures.

    Attributes:
        number: Seeds the labels that are drawn for it; no other batch has it, and it
            depends on the place of the samples in the data only.
        x: Inputs.
        y: Targets.
    """

    number: int
    x: Any
    y: Any


def numbered(batches: Iterable[tuple[Any, Any]]) -> Iterator[Share]:
    """Return all batches, for a process alone."""
    return (Share(i, x, y) for i, (x, y) in enumerate(batches))


def distributed_sampler(loader: Any, ranks: Ranks) -> DistributedSampler[Any] | None:
    """Return the sampler by which a loader takes the part of one process, if it does.

    Raises:
        OptionError: It takes the part of another process, or of another number.
    """
    if ranks.alone:
        return None
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        sampler = getattr(holder, "sampler", None)
        if not isinstance(sampler, DistributedSampler):
            continue
        if (sampler.rank, sampler.num_replicas) != (ranks.rank, ranks.count):
            raise OptionError(
                "the loader's DistributedSampler takes the part of another process",
                got=f"rank {sampler.rank} of {sampler.num_replicas}",
                wanted=f"rank {ranks.rank} of {ranks.count}",
                fix="make it without num_replicas and rank, or leave it out",
            )
        return sampler
    return None


def shared_out(
    batches: Iterable[Any],
    sampler: DistributedSampler[Any] | None,
    samples: int | None,
    ranks: Ranks,
) -> Iterator[Share]:
    """Yield the batches that this process measures.

    Of N processes, number r takes the batches r, r + N, … of the loader: each reads all
    of them, so they are those of one process alone, the last one cut to ``samples``
    included. If the loader has a ``DistributedSampler``, each takes all that it
    yields, up to ``samples`` in all processes together, but for the samples that this
    sampler repeats so that all processes have as many.

    Args:
        batches: What the loader yields.
        sampler: What :func:`distributed_sampler` returned.
        samples: How many samples all processes measure together; None for all.
        ranks: The processes.

    Raises:
        EmptyLoaderError: The loader yields nothing.
        DataError: A batch cannot be used.
    """
    if sampler is None:
        for share in numbered(take(batches, samples)):
            if share.number % ranks.count == ranks.rank:
                yield share
        return
    # Sample j of this process is number r + N j of all.
    total = min(len(sampler.dataset), sampler.total_size)  # type: ignore[arg-type]
    wanted = total if samples is None else min(total, samples)
    mine = len(range(ranks.rank, wanted, ranks.count))
    if total and not mine:
        return
    place = ranks.rank
    for x, y in take(batches, max(mine, 1)):
        yield Share(place, x, y)
        place += ranks.count * batch_size(x)
