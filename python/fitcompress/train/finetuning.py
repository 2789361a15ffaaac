"""``finetune``: train a compressed model on its grids, within the size of its file.

Weights are trained through the grids (straight-through); bits are priced so that the
file keeps its size (``rate_control``); the dense model's outputs are the targets
(distillation, Hinton et al. 2015, arXiv 1503.02531).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from fitcompress.data.batches import digest, split_batch, take
from fitcompress.errors import (
    BudgetExceededError,
    DataError,
    OptionError,
)
from fitcompress.files import check_writable
from fitcompress.model.costs import dense_bytes
from fitcompress.model.devices import device_of, to_device
from fitcompress.model.forward import call_model
from fitcompress.model.layers import fingerprint
from fitcompress.model.positions import counted
from fitcompress.quantize import (
    activations,
    attach_plan,
    fold_norms_,
    norm_digits,
    plan_of,
    round_leftovers_,
    shorten_norms_,
)
from fitcompress.quantize.leftovers import FOLDABLE, is_folded, thaw_norms_
from fitcompress.search import Budget
from fitcompress.storage.save_load import packed_bytes
from fitcompress.threads import FIXED, threads
from fitcompress.train.distillation import distillation_loss
from fitcompress.train.evaluation import divergence
from fitcompress.train.loop import count_batches, finite_value, one_pass, run_steps
from fitcompress.train.norms import NORM_SAMPLES, estimate_norms_
from fitcompress.train.rate_control import RateControl
from fitcompress.train.schedule import warm_cosine
from fitcompress.train.training_state import TrainingState

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from torch import nn

__all__ = ["FinetuneResult", "finetune"]

CONTROL_EVERY = 25  # steps between two looks at the size
SAVE_EVERY = 30.0  # seconds between checkpoints
SPREAD = 0.45  # how far from the middle of its cell a weight may start, in steps
RAMP = 0.3  # share of all steps
NARROWEST = 1 / 16  # of its start, what a step of activations may shrink to


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning did; ``str()`` says it in one line.

    Attributes:
        before: Divergence from the teacher on the validation data, nats, or None.
        after: The same of the trained weights, whether they were kept or not.
        kept: False if the start was restored, because it was better on the validation
            data or the trained weights would not fit into the file.
        losses: Mean training loss of every epoch run in this call.
    """

    before: float | None
    after: float | None
    kept: bool
    losses: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            if self.kept:
                return "trained; not validated"
            return "the start was kept: the trained weights do not fit into the file"
        text = (
            f"divergence from the dense model {self.before:.4g} ⇒ {self.after:.4g} nats"
        )
        if self.kept:
            return text
        worse = self.after > self.before
        why = (
            "training made it worse"
            if worse
            else "the weights do not fit into the file"
        )
        return f"{text}; the start was kept, because {why}"


def finetune(
    small: nn.Module,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    *,
    epochs: int = 3,
    teacher: nn.Module | None = None,
    validation: Iterable[Any] | None = None,
    size: int | float | str | None = None,
    lr: float = 0.0025,
    float_lr: float = 5e-4,
    norms: Literal["frozen", "batch"] = "batch",
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    thread_count: int = FIXED,
    progress: bool = True,
) -> FinetuneResult:
    """Train a compressed model in place; it stays on its grids and within its budget.

    Adam with a short warm-up and a cosine schedule. The loss is

        T² KL(teacher ‖ small) at temperature T = 4, if there is a teacher, plus
        loss_fn(output, targets), if given.

    A sample of text is a whole sequence, and has the mean over its positions; padding,
    by an ``attention_mask``, and what is labelled −100 teach nothing.

    Steps of quantized activations are learnt along with the weights (LSQ).

    Weights in 16 bits are trained as float32 copies. Batches are moved to the device of
    the model's first parameter. If anything goes wrong, the model is as it was.

    Args:
        small: What ``apply``, ``compress`` or ``load(trainable=True)`` returned.
        loader: Yields inputs, (inputs, targets), or mappings of named inputs with their
            ``labels``, the same for the same epoch; if it has an attribute ``epoch``,
            that is set before each pass.
        loss_fn: (output, targets) → loss averaged over the batch.
        epochs: Passes over the loader.
        teacher: The dense model, whose outputs are the targets.
        validation: Held-out inputs. With a teacher: if the divergence from it has not
            fallen in the end, the start is restored.
        size: What the packed file may take, as for ``Budget(size=…)``; None: what the
            plan allows. A model that starts larger is squeezed in the first third of
            the steps.
        lr: Peak learning rate of the weights, in steps of their grids.
        float_lr: Peak learning rate of what is on no grid: norms and biases; of steps
            of activations, as a share of them.
        norms: ``"frozen"`` trains the two numbers per channel that folded norms have;
            ``"batch"`` gives them their statistics back, trains with those of each
            batch and estimates them anew at the end (norms in 16 bits stay frozen).
        checkpoint: File to save progress to and resume from; removed at the end.
        seed: Seeds where weights start in their cells, and dropout; the loader draws
            for itself.
        thread_count: Torch threads to train with, whatever torch is set to: the last
            bits of weight gradients depend on their number, so it is a setting.
        progress: Show a bar with the time left.

    Returns:
        What happened. The model is in eval mode and ready for :func:`fitcompress.save`.

    Raises:
        PlanMismatchError: ``small`` is not compressed.
        OptionError: ``epochs``, ``lr`` or ``norms`` cannot be used.
        DataError: Neither a teacher nor a loss is given, or a batch or an output does
            not serve.
        EmptyLoaderError: The loader yields nothing.
        NonFiniteError: The loss is NaN or infinite.
        BudgetExceededError: A model larger than ``size`` could not be squeezed into it.
        OutputError: The checkpoint cannot be written.
    """
    if teacher is None and loss_fn is None:
        raise DataError(
            "nothing to train for", wanted="a teacher, a loss function, or both"
        )
    _check_options(epochs, (lr, float_lr), norms, thread_count)
    plan = plan_of(small)
    if checkpoint is not None:
        check_writable(checkpoint)
    key = f"{seed}-{lr}-{float_lr}-{norms}-{thread_count}-{epochs}"
    if teacher is not None:
        teacher = copy.deepcopy(teacher).eval().to(device_of(small))
        key += f"-{fingerprint(teacher, [])}"
    before, after = None, None
    if teacher is not None and validation is not None:
        before = divergence(teacher, small, validation, progress=progress)
    start = {name: value.clone() for name, value in small.state_dict().items()}
    limit = plan.limit_bytes or len(packed_bytes(small))
    if size is not None:
        limit = Budget(size=size).size_bytes(dense_bytes(small))
    fits = len(packed_bytes(small)) <= limit
    kept, trainer = False, None
    try:
        trainer = _Trainer(
            small, loader, loss_fn, teacher, epochs, (lr, float_lr), limit
        )
        with threads(thread_count), torch.random.fork_rng(devices=[]):
            trainer.prepare(batch_norms=norms == "batch", seed=seed)
            losses = trainer.run(checkpoint, key, progress=progress)
            kept = trainer.finish()
        if teacher is not None and validation is not None and before is not None:
            after = divergence(teacher, small, validation, progress=progress)
            kept = kept and (after <= before or not fits)
    finally:
        if not kept:
            if trainer is not None:
                trainer.rate.release()
            small.load_state_dict(start)
            small.eval()
    if kept and size is not None:
        attach_plan(small, replace(plan, limit_bytes=limit))
    if not kept and not fits:
        found = len(packed_bytes(small))
        raise BudgetExceededError(
            "the model could not be squeezed into its budget",
            size_bytes=found,
            got=f"{found} bytes at the start",
            wanted=f"at most {limit} bytes",
            fix="start from a smaller file, or train longer",
        )
    if checkpoint is not None:
        check_writable(checkpoint).unlink(missing_ok=True)
    return FinetuneResult(before, after, kept, losses)


def _check_options(
    epochs: int, rates: tuple[float, float], norms: str, thread_count: int
) -> None:
    if thread_count < 1:
        raise OptionError("training needs a thread", got=thread_count, wanted="≥ 1")
    if epochs < 1:
        raise OptionError(
            "there is nothing to train", got=f"epochs={epochs}", wanted="≥ 1"
        )
    for lr in rates:
        if not (0 < lr < math.inf):
            raise OptionError("the learning rate must be positive", got=f"lr={lr}")
    if norms not in ("frozen", "batch"):
        raise OptionError(
            "unknown norms", got=repr(norms), wanted="'frozen' or 'batch'"
        )


class _Trainer:
    """One fine-tuning run."""

    def __init__(
        self,
        small: nn.Module,
        loader: Iterable[Any],
        loss_fn: Callable[[Any, Any], torch.Tensor] | None,
        teacher: nn.Module | None,
        epochs: int,
        rates: tuple[float, float],
        limit: int,
    ) -> None:
        self.small, self.loader = small, loader
        self.loss_fn, self.teacher = loss_fn, teacher
        self.epochs = epochs
        self.device = device_of(small)
        self.batches = count_batches(loader)
        self.total = epochs * self.batches
        self.rate = RateControl(small, limit)
        self.norms: list[nn.modules.batchnorm._BatchNorm] = []  # with batch statistics
        self.parameters = [p for p in small.parameters() if p.requires_grad]
        if not self.parameters:
            raise OptionError(
                "there is nothing to train",
                got="no parameter with requires_grad",
                fix="unfreeze the model",
            )
        # Steps are smaller than what 16 bits can tell apart: these train as copies.
        self.trained = [p.detach().float() for p in self.parameters]
        # Adam moves every weight by about its rate: count it in steps of the grid.
        steps = self.rate.step_sizes()
        groups = [
            {"params": [t], "peak": rates[0] * steps[p] if p in steps else rates[1]}
            for p, t in zip(self.parameters, self.trained, strict=True)
        ]
        # Steps of activations change by shares of themselves, and stay positive.
        self.scales = {
            q.scale: q.scale.detach().float().clone()
            for _, q in activations(small)
            if q.learn and not q.dynamic
        }
        for group, parameter in zip(groups, self.parameters, strict=True):
            if parameter in self.scales:
                group["peak"] = rates[1] * float(self.scales[parameter].mean())
        self.optimizer = torch.optim.Adam(groups, rates[1], betas=(0.9, 0.99))

    def prepare(self, *, batch_norms: bool, seed: int) -> None:
        """Spread the weights over their cells; give norms their statistics back.

        In the middle of its cell a weight needs half a step to change its code; spread
        out, as before it was rounded, some need little, and gradients choose which.
        """
        torch.manual_seed(seed)
        self.rate.spread(SPREAD)
        self._copy_parameters()
        if not batch_norms:
            return
        inputs = take(one_pass(self.loader, 0), NORM_SAMPLES)
        thaw_norms_(self.small, (to_device(x, self.device) for x, _ in inputs))
        for norm in self.small.modules():
            if not isinstance(norm, FOLDABLE) or norm.running_mean is None:
                continue
            # What thawing passed over is an affine map, not a norm.
            if not is_folded(norm) and norm.running_mean.dtype == torch.float32:
                self.norms.append(norm)
        self._copy_parameters()

    @torch.no_grad()
    def _copy_parameters(self) -> None:
        for parameter, trained in zip(self.parameters, self.trained, strict=True):
            trained.copy_(parameter)

    def run(
        self, checkpoint: str | os.PathLike[str] | None, key: str, *, progress: bool
    ) -> list[float]:
        state = None
        if checkpoint is not None:
            first = next(take(one_pass(self.loader, 0), 1))[0]
            key = f"{key}-{self.total}-{self.rate.limit}-{digest(first):08x}"
            state = TrainingState(
                checkpoint, key, self.small, self.optimizer, self.rate
            )
        return run_steps(
            self._step,
            self.loader,
            epochs=self.epochs,
            batches=self.batches,
            state=state,
            save_every=SAVE_EVERY,
            title="fine-tune",
            progress=progress,
        )

    def _step(self, step: int, batch: Any) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = warm_cosine(group["peak"], step, self.total)
        if step % CONTROL_EVERY == 0:
            self.rate.adjust(min(1.0, step / self.total / RAMP))
        x, y = split_batch(batch)
        loss = self._loss(to_device(x, self.device), to_device(y, self.device))
        value = finite_value(loss, step)
        self._update(loss)
        return value

    def _loss(self, x: Any, y: Any) -> torch.Tensor:
        self._train_mode()
        out, loss = call_model(self.small, x), torch.zeros((), device=self.device)
        if self.teacher is not None:
            with torch.no_grad():
                wanted = call_model(self.teacher, x)
            loss = loss + distillation_loss(out, wanted, counted(self.teacher, x, y))
        return loss if self.loss_fn is None else loss + self.loss_fn(out, y)

    def _update(self, loss: torch.Tensor) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter, trained in zip(self.parameters, self.trained, strict=True):
            trained.grad = None if parameter.grad is None else parameter.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for parameter, trained in zip(self.parameters, self.trained, strict=True):
                if parameter in self.scales:
                    trained.copy_(trained.maximum(NARROWEST * self.scales[parameter]))
                parameter.copy_(trained)
                parameter.grad = trained.grad = None

    def _train_mode(self) -> None:
        """Train; only norms with statistics of their own use those of the batch."""
        self.small.train()
        live = set(self.norms)
        for module in self.small.modules():
            if isinstance(module, FOLDABLE) and module not in live:
                module.eval()

    def finish(self) -> bool:
        """Fold the norms, with statistics of the final weights, and meet the limit."""
        self.rate.adjust()
        inputs = take(one_pass(self.loader, self.epochs), NORM_SAMPLES)
        estimate_norms_(
            self.small, self.norms, (to_device(x, self.device) for x, _ in inputs)
        )
        self.small.eval()
        fold_norms_(self.small)
        round_leftovers_(self.small, list(self.scales))
        shorten_norms_(self.small, norm_digits(plan_of(self.small)))
        return self.rate.finish()
