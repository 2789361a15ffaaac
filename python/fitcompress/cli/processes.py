"""Commands in several processes, as ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
import logging
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from fitcompress.cli.app import console, process_count
from fitcompress.errors import OptionError
from fitcompress.ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["joined"]

SILENCE = timedelta(minutes=10)  # after which a process that says nothing is given up


@contextlib.contextmanager
def joined(*, shareable: bool = True) -> Iterator[Ranks]:
    """Run a block in all processes that ``torchrun`` has started; one alone otherwise.

    The first one writes and shows; the others are silent.

    Args:
        shareable: Whether the work can be shared out.

    Raises:
        OptionError: There are several processes, and it cannot.
    """
    count = process_count()
    if count == 1 or dist.is_initialized():
        yield Ranks()
        return
    if not shareable:
        raise OptionError(
            "this cannot be shared out among processes",
            got=f"{count} of them",
            fix="run it without torchrun",
        )
    dist.init_process_group("gloo", timeout=SILENCE)
    ranks, quiet = Ranks(), console.quiet
    if not ranks.first:
        console.quiet = True
        logging.getLogger().setLevel(logging.ERROR)
    try:
        yield ranks
    finally:
        console.quiet = quiet
        dist.destroy_process_group()
