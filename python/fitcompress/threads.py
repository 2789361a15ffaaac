"""Keep results independent of the number of threads."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FIXED", "adopt_threads", "threads"]

FIXED = 2  # threads of everything that decides on a plan or a file


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with ``count`` torch threads and restore the former number.

    Products, gradients and factorisations split their sums by the number of threads, so
    their last bits, and with them now and then a code, would depend on it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def adopt_threads() -> None:
    """Let this new thread compute with torch's number of threads; call it first.

    Until a thread has asked for the number, OpenMP and BLAS give it one of their own,
    that of the machine.
    """
    torch.get_num_threads()
