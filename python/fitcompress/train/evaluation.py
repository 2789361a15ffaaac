"""Accuracy, loss and divergence of a classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fitcompress.data.batches import take
from fitcompress.errors import DataError, NonFiniteError
from fitcompress.progress import track

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__all__ = ["Score", "divergence", "evaluate"]


@dataclass(frozen=True)
class Score:
    """How good a classifier is.

    Attributes:
        accuracy: Share of correct labels, per cent.
        loss: Mean cross-entropy, nats.
        samples: How many were scored.
    """

    accuracy: float
    loss: float
    samples: int


def evaluate(model: nn.Module, loader: Iterable[Any], *, progress: bool = True) -> Score:
    """Return accuracy and loss of ``model`` on labelled batches.

    Raises:
        EmptyLoaderError: The loader yields nothing.
        DataError: A batch has no labels.
        NonFiniteError: The loss is NaN or infinite.
    """
    right, loss, samples = 0, 0.0, 0
    training = model.training
    model.eval()
    total = len(loader) if hasattr(loader, "__len__") else None
    try:
        with torch.no_grad():
            for x, y in track(take(loader, None), "evaluate", total, enabled=progress):
                if y is None:
                    raise DataError("evaluation needs labels", wanted="(inputs, labels)")
                out = model(x).float()
                right += int((out.argmax(-1) == y).sum())
                loss += float(F.cross_entropy(out, y, reduction="sum"))
                samples += y.numel()
    finally:
        model.train(training)
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise NonFiniteError(
            "the loss is not finite", got=loss, fix="look for NaN in the data and the weights"
        )
    return Score(100 * right / samples, loss / samples, samples)


def divergence(
    dense: nn.Module, small: nn.Module, loader: Iterable[Any], samples: int | None = None
) -> float:
    """Return the mean KL divergence of ``small``'s predictions from ``dense``'s, nats."""
    total, count = 0.0, 0
    dense.eval()
    small.eval()
    with torch.no_grad():
        for x, _ in take(loader, samples):
            p, q = dense(x).float().log_softmax(-1), small(x).float().log_softmax(-1)
            total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
            count += p.numel() // p.shape[-1]
    return total / count
