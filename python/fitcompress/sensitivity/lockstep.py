"""Sharded models: all processes take the same steps, and each holds some rows of F.

A layer of such a model runs only if all processes run it, since each holds a part of
its weight. So they measure batches of equal shapes side by side, and others one after
the other, all of them together; what a process finds out about the model on the way,
the others must know as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fitcompress.data.batches import batch_size, sample_shapes
from fitcompress.model.devices import device_of, to_device
from fitcompress.ranks import same
from fitcompress.sensitivity.shares import Share

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fitcompress.ranks import Ranks
    from fitcompress.sensitivity.fisher import FisherEstimator
    from fitcompress.sensitivity.weights import Weight

__all__ = ["Lockstep"]


class Lockstep:
    """What the processes that hold a model together agree on while they measure it.

    Of the squares of a weight, Σ_i G_i ∘ G_i [rows, columns], process r of N holds the
    rows from ⌊rows · r / N⌋ to ⌊rows · (r + 1) / N⌋. Those of one weight and one
    micro-batch at a time are whole, and are then added up over the processes.

    Args:
        ranks: The processes.
        model: The network.
    """

    def __init__(self, ranks: Ranks, model: nn.Module) -> None:
        self.ranks, self.model = ranks, model
        self.counted = True  # whether this process counts the samples that it runs

    def rows(self, rows: int) -> slice:
        """Return the rows of a weight that this process holds."""
        rank, count = self.ranks.rank, self.ranks.count
        return slice(rows * rank // count, rows * (rank + 1) // count)

    def keep(
        self, held: dict[str, torch.Tensor], weight: Weight, squares: torch.Tensor
    ) -> None:
        """Add the squares of one micro-batch in every process to the rows held."""
        if not self.counted:
            squares.zero_()
        self.ranks.add_up(squares)
        mine = squares[self.rows(weight.rows)]
        if weight.name not in held:
            held[weight.name] = torch.zeros_like(mine)
        held[weight.name] += mine

    def gather(self, mine: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the whole of a tensor of which every process holds some rows."""
        found = torch.zeros((rows, *mine.shape[1:]), dtype=mine.dtype)
        found = found.to(mine.device)
        found[self.rows(rows)] = mine
        self.ranks.add_up(found)
        return found

    def run(
        self,
        estimator: FisherEstimator,
        share: Share | None,
        update: Callable[[Share], None],
    ) -> None:
        """Measure a batch of every process that has one.

        Args:
            estimator: Of this process.
            share: Its batch.
            update: Measures a batch.
        """
        shapes = self.ranks.gather(None if share is None else _shapes(share))
        if share is not None and same(shapes):
            x = share.x
            if estimator.unknown(x):  # all must look at the same samples
                x = self._brought(self.ranks.broadcast(_sent(share), 0)).x
            estimator.look_at(x)
            update(share)
            return
        for source, found in enumerate(shapes):
            if found is None:
                continue
            own = source == self.ranks.rank
            sent = self.ranks.broadcast(_sent(share) if own else None, source)
            self.counted = own
            try:
                update(share if own and share is not None else self._brought(sent))
            finally:
                self.counted = True

    def _brought(self, sent: Any) -> Share:
        number, x, y = to_device(tuple(sent), device_of(self.model))
        return Share(number, x, y)


def _sent(share: Share | None) -> Any:
    return None if share is None else to_device(tuple(share), torch.device("cpu"))


def _shapes(share: Share) -> Any:
    return batch_size(share.x), sample_shapes(share.x), sample_shapes(share.y)
