"""Statistics of batch norms, estimated anew for weights that have changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fitcompress.model.forward import call_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["NORM_SAMPLES", "estimate_norms_", "whole_batches"]

NORM_SAMPLES = 4096


def estimate_norms_(
    model: nn.Module, norms: Sequence[_BatchNorm], batches: Iterable[Any]
) -> None:
    """Average the statistics of ``norms`` over batches, in place.

    All else is as in evaluation, and so is the whole model afterwards, but for the
    norms, which are left in training mode. A single sample after other batches, the
    rest of a pass, has no variance for a ``BatchNorm1d`` and is passed over.

    Args:
        model: The network.
        norms: Norms of it that keep running statistics.
        batches: Inputs from the training distribution, on the model's device.
    """
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    with torch.no_grad():
        for x in whole_batches(norms, batches):
            call_model(model, x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def whole_batches(
    norms: Iterable[nn.Module], batches: Iterable[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Yield batches, but no single sample after others if a norm is one-dimensional."""
    flat, first = any(isinstance(norm, nn.BatchNorm1d) for norm in norms), True
    for x in batches:
        if first or not flat or len(x) > 1:
            yield x
        first = False
