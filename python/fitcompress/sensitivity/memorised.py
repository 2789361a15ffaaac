"""Whether the sensitivity data are ones that the network has memorised."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fitcompress.data.batches import batch_size, take
from fitcompress.errors import MemorisedDataWarning, NonFiniteError
from fitcompress.model.devices import device_of, to_device
from fitcompress.model.forward import call_model
from fitcompress.model.modes import evaluating
from fitcompress.model.positions import NO_LABEL, aligned_labels, counted
from fitcompress.progress import Bar
from fitcompress.sensitivity.labels import check_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    Loss = Callable[[Any, Any], torch.Tensor]

__all__ = ["Mean", "compare_losses", "mean_losses"]

FAR_BELOW = 0.5
"""Share of the validation loss below which data count as memorised.

ResNet-20 / CIFAR-10, 1024 images: cross-entropy .015 on plain and .009 on augmented
training images against .38 on test images; mean entropy .028, .031 and .072.
"""
CERTAIN = 2.0  # standard errors


@dataclass
class Mean:
    """A mean over samples, with its standard error.

    Attributes:
        values: What was averaged: a value a sample, or the mean of a batch.
        weights: Samples behind each value.
    """

    values: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, value: float, weight: float = 1.0) -> None:
        """Add the mean of ``weight`` samples."""
        self.values.append(value)
        self.weights.append(weight)

    @property
    def mean(self) -> float:
        """The mean."""
        pairs = zip(self.values, self.weights, strict=True)
        return sum(v * w for v, w in pairs) / sum(self.weights)

    @property
    def error(self) -> float:
        """Its standard error, from the scatter of the values; 0 for one alone."""
        if len(self.values) < 2:
            return 0.0
        mean = self.mean
        pairs = zip(self.values, self.weights, strict=True)
        variance = sum(w * (v - mean) ** 2 for v, w in pairs) / sum(self.weights)
        return math.sqrt(variance / (len(self.values) - 1))


def compare_losses(
    model: nn.Module,
    loader: Iterable[Any],
    validation: Iterable[Any],
    loss_fn: Loss | None,
    samples: int | None,
    *,
    progress: bool = True,
) -> dict[str, float | str]:
    """Return the mean loss on sensitivity and validation data; warn if far apart.

    Args:
        model: The network; its modes are restored.
        loader: What the sensitivity is measured on.
        validation: Data that the network has not been trained on.
        loss_fn: As for :func:`fitcompress.measure`. None: the cross-entropy of the
            labels if both have labels that fit the outputs; else the entropy of the
            outputs, the loss expected for labels sampled from the model, which tells
            less.
        samples: How many of each to use at most, None for all.
        progress: Show a bar.

    Returns:
        ``loss``, ``loss_error``, ``validation_loss``, ``validation_loss_error``, nats,
        errors being standard errors; and ``labels``, ``"data"`` or ``"sampled"``.

    Warns:
        MemorisedDataWarning: The mean loss on the sensitivity data is less than half of
            that on validation data, two standard errors of the difference apart.

    Raises:
        EmptyLoaderError: One of them yields nothing.
        DataError: A batch or the output does not serve.
        NonFiniteError: A loss is NaN or infinite.
    """
    both = [
        mean_losses(model, data, loss_fn, samples, progress=progress)
        for data in (loader, validation)
    ]
    kind = "data" if all("data" in found for found in both) else "sampled"
    own, held = (found[kind] for found in both)
    for name, each in (("sensitivity", own), ("validation", held)):
        if not math.isfinite(each.mean):
            raise NonFiniteError(
                f"the mean loss on {name} data is NaN or infinite",
                got=each.mean,
                wanted="a finite loss",
                fix="look for NaN in the data and for overflow in half precision",
            )
    certain = held.mean - own.mean > CERTAIN * math.hypot(own.error, held.error)
    if own.mean < FAR_BELOW * held.mean and certain:
        warnings.warn(
            "the network seems to have memorised the sensitivity data: their mean loss "
            f"is {own.mean:.3g} ± {own.error:.1g} nats, that of validation data "
            f"{held.mean:.3g} ± {held.error:.1g}; loss rises will come out too small; "
            "measure on held-out data, or at least on augmented ones",
            MemorisedDataWarning,
            stacklevel=3,
        )
    return {
        "labels": kind,
        "loss": own.mean,
        "loss_error": own.error,
        "validation_loss": held.mean,
        "validation_loss_error": held.error,
    }


def mean_losses(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Loss | None,
    samples: int | None,
    *,
    progress: bool = True,
) -> dict[str, Mean]:
    """Return the mean losses for labels of the data, if there are, and sampled ones.

    Args:
        model: The network.
        loader: Yields inputs or (inputs, targets).
        loss_fn: Loss for the targets, averaged over a batch; None: cross-entropy, if
            all targets are labels that fit the outputs.
        samples: How many to use, None for all.
        progress: Show a bar.

    Returns:
        ``"data"``, unless there are no labels; without ``loss_fn`` also ``"sampled"``,
        the entropy of the outputs, mean over the positions of a sample that count.
    """
    found = {"data": Mean()} if loss_fn else {"data": Mean(), "sampled": Mean()}
    device = device_of(model)
    with (
        evaluating(model),
        torch.no_grad(),
        Bar("measure: losses", samples, enabled=progress) as bar,
    ):
        for x, y in take(loader, samples):
            output = call_model(model, to_device(x, device))
            target = to_device(y, device)
            if loss_fn is not None:
                found["data"].add(float(loss_fn(output, target)), batch_size(x))
            else:
                log = check_logits(output).double().log_softmax(-1)
                mask, target = counted(model, x, y), aligned_labels(model, target)
                entropy = -(log.exp() * log).sum(-1)
                for value in _sample_means(entropy, mask).tolist():
                    found["sampled"].add(value)
                if "data" in found and _are_labels(target, log):
                    losses = F.nll_loss(
                        log.flatten(0, -2),
                        target.flatten(),
                        ignore_index=NO_LABEL,
                        reduction="none",
                    ).reshape(target.shape)
                    given = target != NO_LABEL if target.dim() == 2 else None
                    for value in _sample_means(losses, given).tolist():
                        found["data"].add(value)
                else:
                    found.pop("data", None)
            bar.advance(batch_size(x))
    return found


def _are_labels(target: Any, log: torch.Tensor) -> bool:
    return (
        torch.is_tensor(target)
        and target.dtype == torch.int64
        and target.shape == log.shape[:-1]
        and bool(
            (((target >= 0) & (target < log.shape[-1])) | (target == NO_LABEL)).all()
        )
    )


def _sample_means(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of each sample over its positions that count, [B]."""
    if mask is None or mask.shape != values.shape:
        return values.reshape(len(values), -1).mean(1)
    kept = mask.to(values.device)
    return torch.where(kept, values, 0.0).sum(1) / kept.sum(1).clamp_min(1)
