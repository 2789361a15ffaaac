"""The processes of a ``torch.distributed`` group that work on one thing together."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fitcompress.errors import DistributedError, OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["ALONE", "Ranks"]

ALONE: Any = object()
"""In place of a process group: this process without others."""
LOST = ("gloo", "connection closed", "connection reset", "timed out", "broken pipe")


class Ranks:
    """This process among those of a group; alone where none is initialised.

    Every method that talks to the others must be called by all of them, in the same
    order. What one of them raises, all get to know, so that none waits for ever; one
    that dies is noticed when its connection breaks, one that hangs when the group's
    time is up (``torch.distributed.init_process_group(timeout=…)``).

    Args:
        group: The process group; None for the default one, if there is one; or ALONE.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.

    Raises:
        OptionError: This process is not in the group.
    """

    def __init__(self, group: Any = None) -> None:
        active = group is not ALONE and dist.is_available() and dist.is_initialized()
        self.group = group if active else None
        self.rank = dist.get_rank(group) if active else 0
        self.count = dist.get_world_size(group) if active else 1
        if self.rank < 0:
            raise OptionError(
                "this process is not in the process group",
                fix="call this in the processes of the group only",
            )

    @classmethod
    def single(cls) -> Ranks:
        """Return this process without others, whatever is initialised."""
        return cls(ALONE)

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """Return for every flag whether a process has set it."""
        if self.alone:
            return list(flags)
        numbers = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
        with self.reaching():
            there = self._there(numbers)
            dist.all_reduce(there, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in there.tolist()]

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.alone:
            return
        with self.reaching():
            there = self._there(tensor)
            dist.all_reduce(there, group=self.group)
        if there is not tensor:
            tensor.copy_(there)

    def gather(self, value: Any) -> list[Any]:
        """Return what every process gave, in the order of ranks."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.count
        with self.reaching():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Return what one process gave."""
        if self.alone:
            return value
        values = [value if self.rank == source else None]
        with self.reaching():
            dist.broadcast_object_list(values, group=self.group, group_src=source)
        return values[0]

    def agree(self, error: Exception | None, *flags: bool) -> list[bool]:
        """Raise if any process has an error; else return as :meth:`any` does.

        Raises:
            Exception: ``error``, where there is one.
            DistributedError: Another process has one.
        """
        if self.alone:
            if error is not None:
                raise error
            return list(flags)
        failed, *found = self.any(error is not None, *flags)
        if not failed:
            return found
        told = None if error is None else f"{type(error).__name__}: {error}"
        texts = self.gather(told)
        if error is not None:
            raise error
        source = next(i for i, text in enumerate(texts) if text is not None)
        raise DistributedError(
            f"process {source} of {self.count} failed",
            got=texts[source],
            fix="look at what that process says",
        )

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block; what it raises in one process, raises in all.

        If it talks to others it must have done so when it raises, or they wait for it.

        Raises:
            DistributedError: It has raised in another process.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if self.alone or isinstance(caught, DistributedError):
                raise
            error = caught
        self.agree(error)

    @contextlib.contextmanager
    def reaching(self) -> Iterator[None]:
        """Run a block that talks to others; say so if they cannot be reached.

        Raises:
            DistributedError: A connection is broken, or the group's time is up.
        """
        try:
            yield
        except RuntimeError as error:
            if self.alone or isinstance(error, DistributedError) or not _lost(error):
                raise
            raise DistributedError(
                "another process of the group is gone or does not answer",
                got=" ".join(str(error).split())[:200],
                wanted=f"{self.count} processes that do the same",
                fix="look for the first error of another process; if one is slow, set "
                "a longer timeout in torch.distributed.init_process_group; then start "
                "all of them again",
            ) from error

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor where the group's backend can read it."""
        backend = str(dist.get_backend(self.group))
        gpu = "nccl" in backend and "gloo" not in backend
        return tensor.cuda() if gpu and not tensor.is_cuda else tensor


def same(values: Sequence[Any]) -> bool:
    """Whether all values are equal."""
    return all(value == values[0] for value in values)


def _lost(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(each in text for each in LOST)
