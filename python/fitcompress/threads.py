"""Keep results independent of the number of threads."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["threads"]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with ``count`` torch threads and restore the former number.

    Float64 factorisations split their sums by the number of threads, so the last bits
    of a Cholesky factor, and with them now and then a code, would depend on it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
