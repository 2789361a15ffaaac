"""``finetune``: train a compressed model on its grids, within the size of its file.

Weights are trained through the grids (straight-through); bits are priced so that the file
keeps its size (``rate_control``); the dense model's outputs are the targets (distillation, Hinton et al.
2015, arXiv 1503.02531).
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from fitcompress.data.batches import split_batch, take
from fitcompress.errors import DataError, EmptyLoaderError, NonFiniteError
from fitcompress.files import check_writable
from fitcompress.progress import Bar
from fitcompress.quantize import fold_norms_, plan_of, round_leftovers_
from fitcompress.quantize.leftovers import FOLDABLE, thaw_norms_
from fitcompress.storage.save_load import packed_bytes
from fitcompress.train.evaluation import divergence
from fitcompress.train.rate_control import RateControl
from fitcompress.train.training_state import TrainingState

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from torch import nn

__all__ = ["FinetuneResult", "finetune"]

CONTROL_EVERY = 10  # steps between two looks at the size
SAVE_EVERY = 30.0  # seconds between checkpoints
NORM_SAMPLES = 4096
WARM_UP, RAMP = 0.02, 0.3  # shares of all steps
TEMPERATURE = 4.0


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning did.

    Attributes:
        before: Divergence from the teacher on the validation data before, nats, or None.
        after: The same afterwards.
        kept: False if the start was restored, because it was better on the validation
            data or the trained weights would not fit into the file.
        losses: Mean training loss of every epoch run in this call.
    """

    before: float | None
    after: float | None
    kept: bool
    losses: list[float] = field(default_factory=list)


def finetune(
    small: nn.Module,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    *,
    epochs: int = 3,
    teacher: nn.Module | None = None,
    validation: Iterable[Any] | None = None,
    lr: float = 5e-4,
    norms: Literal["frozen", "batch"] = "batch",
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FinetuneResult:
    """Train a compressed model in place; it stays on its grids and within its budget.

    Adam with a short warm-up and a cosine schedule. The loss is

        T² KL(teacher ‖ small) at temperature T = 4, if there is a teacher, plus
        loss_fn(output, targets), if given.

    Args:
        small: What ``apply``, ``compress`` or ``load(trainable=True)`` returned.
        loader: Yields inputs or (inputs, targets), the same for the same epoch; if it has
            an attribute ``epoch``, that is set before each pass.
        loss_fn: (output, targets) → loss averaged over the batch.
        epochs: Passes over the loader.
        teacher: The dense model, whose outputs are the targets.
        validation: Held-out inputs. With a teacher: if the divergence from it has not
            fallen in the end, the start is restored.
        lr: Peak learning rate.
        norms: ``"frozen"`` trains the two numbers per channel that folded norms have;
            ``"batch"`` gives them their statistics back, trains with those of each batch
            and estimates them anew at the end.
        checkpoint: File to save progress to and resume from; removed at the end.
        seed: Recorded in the checkpoint; the loader draws, not this function.
        progress: Show a bar with the time left.

    Returns:
        What happened. The model is in eval mode and ready for :func:`fitcompress.save`.

    Raises:
        PlanMismatchError: ``small`` is not compressed.
        DataError: Neither a teacher nor a loss is given.
        EmptyLoaderError: The loader yields nothing.
        NonFiniteError: The loss is NaN or infinite.
        OutputError: The checkpoint cannot be written.
    """
    if teacher is None and loss_fn is None:
        raise DataError("nothing to train for", wanted="a teacher, a loss function, or both")
    plan = plan_of(small)
    if checkpoint is not None:
        check_writable(checkpoint)
    if teacher is not None:
        teacher = copy.deepcopy(teacher).eval()
    before = None
    if teacher is not None and validation is not None:
        before = divergence(teacher, small, validation)
    start = {key: value.clone() for key, value in small.state_dict().items()}
    limit = plan.limit_bytes or len(packed_bytes(small))
    trainer = _Trainer(small, loader, loss_fn, teacher, epochs, lr, norms, limit)
    losses = trainer.run(checkpoint, f"{seed}", progress=progress)
    after, kept = None, trainer.finish()
    if before is not None and teacher is not None and validation is not None:
        after = divergence(teacher, small, validation)
        kept = kept and after <= before
    if not kept:
        small.load_state_dict(start)
    if checkpoint is not None:
        check_writable(checkpoint).unlink(missing_ok=True)
    return FinetuneResult(before, after, kept, losses)


class _Trainer:
    """One fine-tuning run."""

    def __init__(
        self,
        small: nn.Module,
        loader: Iterable[Any],
        loss_fn: Callable[[Any, Any], torch.Tensor] | None,
        teacher: nn.Module | None,
        epochs: int,
        lr: float,
        norms: str,
        limit: int,
    ) -> None:
        self.small, self.loader, self.loss_fn, self.teacher = small, loader, loss_fn, teacher
        self.epochs, self.lr = epochs, lr
        self.batches = len(loader) if hasattr(loader, "__len__") else self._count()
        if not self.batches:
            raise EmptyLoaderError("the loader yields no batch", wanted="training data")
        self.total = epochs * self.batches
        self.rate = RateControl(small, limit)
        self.batch_norms = norms == "batch"
        if self.batch_norms:
            thaw_norms_(small, (x for x, _ in take(self._pass(0), NORM_SAMPLES)))
        parameters = [p for p in small.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr, betas=(0.9, 0.99))

    def _count(self) -> int:
        return sum(1 for _ in self.loader)

    def _pass(self, epoch: int) -> Iterable[Any]:
        if hasattr(self.loader, "epoch"):
            self.loader.epoch = epoch
        return self.loader

    def run(
        self, checkpoint: str | os.PathLike[str] | None, key: str, *, progress: bool
    ) -> list[float]:
        state = None
        if checkpoint is not None:
            key = f"{key}-{self.total}-{self.lr}-{self.rate.limit}"
            state = TrainingState(checkpoint, key, self.small, self.optimizer, self.rate)
        done = 0 if state is None else state.restore()
        losses, saved = [], time.monotonic()
        with Bar("fine-tune", self.total, enabled=progress) as bar:
            for epoch in range(self.epochs):
                if done >= (epoch + 1) * self.batches:
                    bar.advance(self.batches)
                    continue
                total, count = 0.0, 0
                for number, batch in enumerate(self._pass(epoch)):
                    step = epoch * self.batches + number
                    if step < done:
                        bar.advance()
                        continue
                    if step >= self.total:
                        break
                    total, count = total + self._step(step, batch), count + 1
                    bar.advance(note=f"loss {total / count:.4f}")
                    if state is not None and time.monotonic() - saved > SAVE_EVERY:
                        state.save(step + 1)
                        saved = time.monotonic()
                losses.append(total / max(count, 1))
        return losses

    def _step(self, step: int, batch: Any) -> float:
        share = step / self.total
        warm = min(1.0, (step + 1) / max(1.0, WARM_UP * self.total))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * warm * 0.5 * (1 + math.cos(math.pi * share))
        if step % CONTROL_EVERY == 0:
            self.rate.adjust(min(1.0, share / RAMP))
        x, y = split_batch(batch)
        self._train_mode()
        out = self.small(x)
        loss = torch.zeros(())
        if self.teacher is not None:
            with torch.no_grad():
                wanted = (self.teacher(x) / TEMPERATURE).log_softmax(-1)
            found = (out / TEMPERATURE).log_softmax(-1)
            soft = F.kl_div(found, wanted, log_target=True, reduction="batchmean")
            loss = loss + TEMPERATURE**2 * soft
        if self.loss_fn is not None:
            loss = loss + self.loss_fn(out, y)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(
                "the training loss is not finite",
                got=f"{value} at step {step}",
                fix="lower the learning rate, or look for NaN in the data",
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return value

    def _train_mode(self) -> None:
        self.small.train()
        if not self.batch_norms:
            for module in self.small.modules():
                if isinstance(module, FOLDABLE):
                    module.eval()

    def finish(self) -> bool:
        """Fold the norms, with statistics of the final weights, and meet the limit."""
        self.rate.adjust()
        if self.batch_norms:
            self._estimate_norms()
        self.small.eval()
        fold_norms_(self.small)
        round_leftovers_(self.small)
        return self.rate.finish()

    def _estimate_norms(self) -> None:
        norms = [m for m in self.small.modules() if isinstance(m, FOLDABLE)]
        averaging = [(norm, norm.momentum) for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
        self.small.train()
        with torch.no_grad():
            for x, _ in take(self._pass(self.epochs), NORM_SAMPLES):
                self.small(x)
        for norm, momentum in averaging:
            norm.momentum = momentum
