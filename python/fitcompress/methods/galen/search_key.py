"""What a search is of."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.data.batches import digest, take, tensors
from fitcompress.model import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from fitcompress.latency.target import LatencyTarget
    from fitcompress.methods.galen.method import Galen

__all__ = ["search_key"]


def search_key(
    method: Galen,
    dense: nn.Module,
    seed: int,
    inputs: list[torch.Tensor],
    validation: Iterable[Any],
    example: torch.Tensor,
    target: LatencyTarget,
) -> str:
    """Return what two searches must share for one to go on with the other's file.

    How many episodes there are, and the training in the end, do not matter to the
    episodes that are done.
    """
    crc = 0
    for x in inputs:
        crc = digest(x, crc)
    held = 0
    with torch.random.fork_rng(devices=[]):
        for batch in take(validation, None):
            for each in tensors(batch):
                held = digest(each, held)
    options = replace(method, episodes=1, finetune_epochs=0)
    return (
        f"{options}-{seed}-{fingerprint(dense, [])}-{crc:08x}-{held:08x}-"
        f"{tuple(example.shape)}-{example.dtype}-{target.fingerprint}"
    )
