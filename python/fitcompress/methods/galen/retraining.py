"""Retraining of a compressed network on the outputs of the dense one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.data.batches import take
from fitcompress.model.devices import device_of
from fitcompress.model.forward import call_model
from fitcompress.quantize.activations import activations
from fitcompress.quantize.leftovers import FOLDABLE
from fitcompress.train.distillation import distillation_loss
from fitcompress.train.loop import count_batches, finite_value, one_pass, run_steps
from fitcompress.train.norms import estimate_norms_, whole_batches
from fitcompress.train.training_state import TrainingState

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Lessons", "estimate_all_norms_", "first_inputs", "retrain_"]

SAVE_EVERY = 30.0  # seconds between checkpoints
WARM_UP = 0.02  # share of all steps
NARROWEST = 1 / 16  # of its start, what a step of activations may shrink to


class Lessons:
    """Batches of (inputs, outputs of the dense network).

    Args:
        teacher: The dense network, in eval mode.
        loader: Yields inputs or (inputs, …), the same for the same epoch.
        samples: How many of a pass; None for all. A part is kept in memory with its
            outputs: every episode learns from the same.

    Attributes:
        epoch: Which pass comes next.
    """

    def __init__(
        self, teacher: nn.Module, loader: Iterable[Any], samples: int | None
    ) -> None:
        self._teacher, self._loader, self.epoch = teacher, loader, 0
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        if samples is not None:
            self._kept = list(self._taught(samples))
        self._count = len(self._kept) if self._kept else count_batches(loader)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self._kept) if self._kept is not None else self._taught(None)

    def inputs(self, samples: int) -> Iterator[torch.Tensor]:
        """Return so many inputs of the first pass."""
        return first_inputs(self._teacher, one_pass(self._loader, 0), samples)

    def _taught(
        self, samples: int | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        each = first_inputs(self._teacher, one_pass(self._loader, self.epoch), samples)
        for x in whole_batches(self._teacher.modules(), each):
            with torch.no_grad():
                wanted = self._teacher(x)
            yield x, wanted


def retrain_(
    small: nn.Module,
    lessons: Lessons,
    *,
    epochs: int,
    learning_rate: float,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    key: str = "",
    progress: bool = False,
) -> list[float]:
    """Train a network, in place; return the mean loss of the epochs run in this call.

    Adam with a short warm-up and a cosine to zero, on T² KL(dense ‖ small) at T = 4.
    Weights on grids are trained through them: the latent weights get the gradients,
    straight through the rounding. Steps of activations are learnt at a rate relative
    to themselves (LSQ). Norms use the statistics of the batches. Afterwards the network
    is in eval mode, and its norms are still to be estimated.

    Args:
        small: With live batch norms.
        lessons: What it learns from.
        epochs: Passes; 0 leaves it as it is.
        learning_rate: Peak.
        seed: Of dropout.
        checkpoint: File to save progress to and resume from; None for none.
        key: Settings that the checkpoint must have been made with.
        progress: Show a bar with the time left.

    Raises:
        DataError: An output is no tensor of logits.
        NonFiniteError: The loss is NaN or infinite.
    """
    small.eval()
    if not epochs:
        return []
    total = epochs * len(lessons)
    least = {
        q.scale: NARROWEST * q.scale.detach().clone()
        for _, q in activations(small)
        if q.learn and not q.dynamic
    }
    groups: list[dict[str, Any]] = [
        {
            "params": [p],
            "peak": learning_rate * (float(p.detach().mean()) if p in least else 1.0),
        }
        for p in small.parameters()
        if p.requires_grad
    ]
    optimizer = torch.optim.Adam(groups, learning_rate)

    def step(number: int, batch: Any) -> float:
        x, wanted = batch
        warm = min(1.0, (number + 1) / max(1.0, WARM_UP * total))
        rate = warm * 0.5 * (1 + math.cos(math.pi * number / total))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        small.train()
        loss = distillation_loss(call_model(small, x), wanted)
        value = finite_value(loss, number)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for scale, bound in least.items():
                scale.copy_(scale.maximum(bound))
        return value

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = None
        if checkpoint is not None:
            own = f"{key}-{total}-{learning_rate}-{seed}"
            state = TrainingState(checkpoint, own, small, optimizer)
        losses = run_steps(
            step,
            lessons,
            epochs=epochs,
            batches=len(lessons),
            state=state,
            save_every=SAVE_EVERY,
            title="retrain",
            progress=progress,
        )
    small.eval()
    return losses


def first_inputs(
    model: nn.Module, loader: Iterable[Any], samples: int | None
) -> Iterator[torch.Tensor]:
    """Yield the first inputs of a loader, where the model lies."""
    device = device_of(model)
    for x, _ in take(loader, samples):
        yield x.to(device)


def estimate_all_norms_(small: nn.Module, inputs: Iterable[torch.Tensor]) -> None:
    """Estimate the statistics of all batch norms anew, in place; then eval mode."""
    norms: list[_BatchNorm] = [
        module
        for module in small.modules()
        if isinstance(module, FOLDABLE) and module.running_mean is not None
    ]
    estimate_norms_(small, norms, inputs)
    small.eval()
