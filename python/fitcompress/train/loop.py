"""The loop over epochs and batches of a training that can be killed and resumed."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from fitcompress.errors import EmptyLoaderError, NonFiniteError
from fitcompress.progress import Bar
from fitcompress.train.evaluation import length_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from fitcompress.train.training_state import TrainingState

__all__ = ["count_batches", "finite_value", "one_pass", "run_steps"]


def count_batches(loader: Iterable[Any]) -> int:
    """Return how many batches a pass has, by counting if the loader does not tell.

    Raises:
        EmptyLoaderError: There is none.
    """
    counted = length_of(loader)
    batches = sum(1 for _ in loader) if counted is None else counted
    if not batches:
        raise EmptyLoaderError("the loader yields no batch", wanted="training data")
    return batches


def finite_value(loss: torch.Tensor, step: int) -> float:
    """Return the loss of a step as a number.

    Raises:
        NonFiniteError: It is NaN or infinite.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteError(
            "the training loss is not finite",
            got=f"{value} at step {step}",
            fix="lower the learning rate, or look for NaN in the data",
        )
    return value


def one_pass(loader: Iterable[Any], epoch: int) -> Iterable[Any]:
    """Return ``loader``, told which epoch it is if it wants to know."""
    if hasattr(loader, "epoch"):
        loader.epoch = epoch
    return loader


def run_steps(
    step: Callable[[int, Any], float],
    loader: Iterable[Any],
    *,
    epochs: int,
    batches: int,
    state: TrainingState | None,
    save_every: float,
    title: str,
    progress: bool,
) -> list[float]:
    """Call ``step`` for every batch of every epoch that is not done yet.

    Args:
        step: (number of the step, batch) → its loss.
        loader: Yields the same batches for the same epoch.
        epochs: Passes over it.
        batches: Of one pass; further ones of the last pass are not used.
        state: Where the run is kept on disk, or None. What it holds is restored first,
            and the batches of steps that are done are passed over.
        save_every: Seconds between two saves.
        title: Of the progress bar.
        progress: Show it.

    Returns:
        Mean loss of every epoch run in this call.
    """
    done, total = 0 if state is None else state.restore(), epochs * batches
    losses, saved = [], time.monotonic()
    with Bar(title, total, enabled=progress) as bar:
        for epoch in range(epochs):
            if done >= (epoch + 1) * batches:
                bar.advance(batches)
                continue
            loss, count = 0.0, 0
            for number, batch in enumerate(one_pass(loader, epoch)):
                current = epoch * batches + number
                if current < done:
                    bar.advance()
                    continue
                if current >= total:
                    break
                if state is not None and current == done:
                    state.restore_random()
                loss, count = loss + step(current, batch), count + 1
                bar.advance(note=f"loss {loss / count:.4f}")
                if state is not None and time.monotonic() - saved > save_every:
                    state.save(current + 1)
                    saved = time.monotonic()
            losses.append(loss / max(count, 1))
    return losses
