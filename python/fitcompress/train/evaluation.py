"""Accuracy, loss and divergence of a classifier."""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fitcompress.data.batches import take
from fitcompress.errors import DataError, NonFiniteError
from fitcompress.model.devices import device_of, to_device
from fitcompress.model.forward import call_model
from fitcompress.model.modes import evaluating
from fitcompress.model.positions import (
    NO_LABEL,
    aligned_labels,
    counted,
    output_rows,
)
from fitcompress.progress import track
from fitcompress.sensitivity.labels import check_logits

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__all__ = ["Score", "divergence", "evaluate", "length_of"]


@dataclass(frozen=True)
class Score:
    """How good a classifier is.

    Attributes:
        accuracy: Share of correct labels, per cent.
        loss: Mean cross-entropy, nats.
        samples: How many labels were scored: of sequences, positions.
    """

    accuracy: float
    loss: float
    samples: int


def evaluate(
    model: nn.Module, loader: Iterable[Any], *, progress: bool = True
) -> Score:
    """Return accuracy and loss of ``model`` on labelled batches.

    Means over labels: of sequences, over their positions without those labelled −100;
    a causal language model of Hugging Face is scored on the labels of next positions.
    Batches are moved to the device of the model's first parameter; the mode of every
    module is left as it was.

    Args:
        model: Its output are logits, classes along the last dimension.
        loader: Yields (inputs, labels), or mappings of named inputs and ``labels``.
        progress: Show a bar with the time left.

    Raises:
        EmptyLoaderError: The loader yields nothing.
        DataError: A batch has no labels, or labels that do not fit the output.
        NonFiniteError: The loss is NaN or infinite.
    """
    right, loss, samples = 0, 0.0, 0
    device, total = device_of(model), length_of(loader)
    with evaluating(model), torch.no_grad():
        for x, y in track(take(loader, None), "evaluate", total, enabled=progress):
            out = check_logits(call_model(model, to_device(x, device))).float()
            labels = _labels(aligned_labels(model, to_device(y, device)), out)
            out = out.flatten(0, -2)[labels != NO_LABEL]
            labels = labels[labels != NO_LABEL]
            right += int((out.argmax(-1) == labels).sum())
            loss += float(F.cross_entropy(out, labels, reduction="sum"))
            samples += len(labels)
    if not math.isfinite(loss):
        raise NonFiniteError(
            "the loss is not finite",
            got=loss,
            fix="look for NaN in the data and the weights",
        )
    if not samples:
        raise DataError("no position has a label", got=f"only {NO_LABEL}")
    return Score(100 * right / samples, loss / samples, samples)


def divergence(
    dense: nn.Module,
    small: nn.Module,
    loader: Iterable[Any],
    samples: int | None = None,
    *,
    progress: bool = False,
) -> float:
    """Return how far ``small``'s predictions are from ``dense``'s, in nats.

        mean over samples of KL(p ‖ q),  p = softmax(dense(x)), q = softmax(small(x))

    Of sequences, the mean over positions, without padding, by an ``attention_mask``,
    and without those labelled −100.
    Batches are moved to the devices of the models; the mode of every module is left as
    it was.

    Args:
        dense: The reference; its output are logits, classes along the last dimension.
        small: The model that is compared with it.
        loader: Yields inputs or (inputs, …), or mappings of named ones.
        samples: How many inputs to use; None for all.
        progress: Show a bar with the time left.

    Raises:
        EmptyLoaderError: The loader yields nothing.
        DataError: An output is no tensor, or the outputs differ in shape.
    """
    total, count, length = 0.0, 0, length_of(loader) if samples is None else None
    places = device_of(dense), device_of(small)
    with evaluating(dense), evaluating(small), torch.no_grad():
        for x, y in track(take(loader, samples), "compare", length, enabled=progress):
            p, q = (
                check_logits(call_model(each, to_device(x, place)))
                for each, place in ((dense, places[0]), (small, places[1]))
            )
            if q.shape != p.shape:
                raise DataError(
                    "the two models have different outputs",
                    got=tuple(q.shape),
                    wanted=tuple(p.shape),
                    fix="compare a compressed model with the one it was made from",
                )
            mask = counted(dense, x, y)
            p = output_rows(p, mask).to(q.device).float().log_softmax(-1)
            q = output_rows(q, mask).float().log_softmax(-1)
            total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
            count += len(p)
    return total / max(count, 1)


def _labels(y: Any, out: torch.Tensor) -> torch.Tensor:
    """Return the labels as one row of integers; raise unless they fit the logits."""
    classes = out.shape[-1]
    if not torch.is_tensor(y) or y.is_floating_point() or y.shape != out.shape[:-1]:
        got = tuple(y.shape) if torch.is_tensor(y) else type(y).__name__
        raise DataError(
            "evaluation needs labels",
            got="none" if y is None else got,
            wanted=f"(inputs, labels) with whole numbers {tuple(out.shape[:-1])}",
        )
    given = y[y != NO_LABEL]
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < classes:
        raise DataError(
            "a label is no class of the model",
            got=f"{int(given.min())} … {int(given.max())}",
            wanted=f"0 … {classes - 1}",
            fix="use the data set that the model was trained for",
        )
    return y.reshape(-1).long()


def length_of(loader: Iterable[Any]) -> int | None:
    """Return how many batches ``loader`` yields, if it tells."""
    return len(loader) if isinstance(loader, Sized) else None
