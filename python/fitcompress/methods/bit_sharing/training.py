"""Train a network that shares bits until its bit operations meet a budget."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fitcompress.data.batches import digest, split_batch, take
from fitcompress.errors import DataError, EmptyLoaderError, NonFiniteError
from fitcompress.methods.bit_sharing.expected_cost import expected_bops
from fitcompress.model.devices import device_of, to_device
from fitcompress.model.forward import call_model
from fitcompress.model.positions import counted, output_rows
from fitcompress.progress import Bar
from fitcompress.sensitivity.labels import check_logits
from fitcompress.train.evaluation import length_of
from fitcompress.train.training_state import TrainingState

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn

    from fitcompress.methods.bit_sharing.method import BitSharing
    from fitcompress.methods.bit_sharing.network import SharedNetwork
    from fitcompress.quantize import WeightGrid

__all__ = ["Price", "Trainer", "Votes"]

SAVE_EVERY = 30.0  # seconds between checkpoints
TEMPERATURE = 4.0  # of distillation


class Price:
    """λ, what a factor in bit operations costs, adapted to a target.

    With t the share of training that is done, the target falls evenly in its logarithm
    from the first BOPs to the budget, which it has at t = ``ramp``. In every step

        λ ← clip(λ · (BOPs / target)^{κ/steps}, λ_0/100, 1000 λ_0),

    and only while BOPs are above the target is λ · log BOPs part of the loss.

    Args:
        weight: λ_0.
        start: BOPs of the open network.
        limit: The budget.
        steps: Of the whole training.
        gain: κ.
        ramp: Share of the training.
    """

    def __init__(
        self,
        weight: float,
        start: float,
        limit: float,
        steps: int,
        *,
        gain: float = 20.0,
        ramp: float = 0.6,
    ) -> None:
        self.weight = self._first = weight
        self._logs = math.log(start), math.log(limit)
        self._steps, self._gain, self._ramp = steps, gain, ramp
        # A training state asks for grids with prices; there are none.
        self.layers: list[tuple[nn.Module, WeightGrid]] = []

    def target(self, step: int) -> float:
        """Return the bit operations aimed at."""
        first, last = self._logs
        share = min(1.0, (step + 1) / self._steps / self._ramp)
        return math.exp(first + share * min(0.0, last - first))

    def term(self, step: int, cost: torch.Tensor) -> torch.Tensor:
        """Return what the bit operations add to the loss of a step."""
        if float(cost.detach()) <= self.target(step):
            return torch.zeros((), device=cost.device)
        return self.weight * cost.log().float()

    def adjust(self, step: int, cost: float) -> None:
        """Raise or lower λ after a step that cost so many bit operations."""
        excess = math.log(cost) - math.log(self.target(step))
        raised = self.weight * math.exp(self._gain / self._steps * excess)
        self.weight = min(max(raised, self._first / 100), 1000 * self._first)


@dataclass(frozen=True)
class Votes:
    """Gates of inputs depend on the batch; every batch has one vote.

    Attributes:
        bits: Layer → bits of its input → how many batches ask for them.
        measures: Layer → mean |z − z_prev| of every rung above the first.
    """

    bits: dict[str, dict[int, int]]
    measures: dict[str, list[float]]


class Trainer:
    """One search.

    Args:
        network: What is trained.
        loader: Yields inputs, or (inputs, labels).
        options: The method's.
        limit: Bit operations to get to.
        teacher: The float network if its outputs are the targets; None for labels.
    """

    def __init__(
        self,
        network: SharedNetwork,
        loader: Iterable[Any],
        options: BitSharing,
        limit: int,
        teacher: nn.Module | None,
    ) -> None:
        self.network, self.loader, self.teacher = network, loader, teacher
        self.options, self.device = options, device_of(network.model)
        counted = length_of(loader)
        self.batches = sum(1 for _ in loader) if counted is None else counted
        if not self.batches:
            raise EmptyLoaderError("the loader yields no batch", wanted="training data")
        self.total = options.epochs * self.batches
        with torch.no_grad():
            network.model.eval()(next(iter(self._inputs())))
        start = float(expected_bops(network.layers))
        self.price = Price(options.price, start, limit, self.total)
        self.of_weights, self.of_inputs = self._thresholds()
        self.optimizer = self._optimizer()

    def _thresholds(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        weights, inputs = [], []
        for layer in self.network.layers:
            weights.append(layer.weight.threshold)
            if layer.weight.filter_threshold is not None:
                weights.append(layer.weight.filter_threshold)
            if layer.inputs is not None:
                inputs.append(layer.inputs.threshold)
        return weights, inputs

    def _optimizer(self) -> torch.optim.Optimizer:
        thresholds = [*self.of_weights, *self.of_inputs]
        reaches = [layer.weight.reach for layer in self.network.layers]
        reaches += [x.inputs.reach for x in self.network.layers if x.inputs is not None]
        apart = {id(p) for p in (*thresholds, *reaches)}
        rest = [p for p in self.network.model.parameters() if id(p) not in apart]
        rest = [p for p in rest if p.requires_grad]
        rate = self.options.learning_rate
        groups = [
            {"params": rest, "peak": rate, "weight_decay": self.options.weight_decay},
            {"params": reaches, "peak": rate, "weight_decay": 0.0},
            {
                "params": thresholds,
                "lr": self.options.threshold_rate,
                "weight_decay": 0.0,
            },
        ]
        return torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True)

    def pass_of(self, epoch: int) -> Iterable[Any]:
        """Return the loader, told its epoch."""
        if hasattr(self.loader, "epoch"):
            self.loader.epoch = epoch
        return self.loader

    def _inputs(self, epoch: int = 0) -> Iterable[Any]:
        return (to_device(x, self.device) for x, _ in take(self.pass_of(epoch), None))

    def run(
        self, checkpoint: str | os.PathLike[str] | None, key: str, *, progress: bool
    ) -> None:
        """Train, from the checkpoint on if there is one."""
        state = None
        if checkpoint is not None:
            first = next(iter(take(self.pass_of(0), 1)))[0]
            key = f"{key}-{self.total}-{digest(first):08x}"
            state = TrainingState(
                checkpoint, key, self.network.model, self.optimizer, self.price
            )
        done = 0 if state is None else state.restore()
        saved = time.monotonic()
        with Bar("bit sharing", self.total, enabled=progress) as bar:
            for epoch in range(self.options.epochs):
                if done >= (epoch + 1) * self.batches:
                    bar.advance(self.batches)
                    continue
                for number, batch in enumerate(self.pass_of(epoch)):
                    step = epoch * self.batches + number
                    if step < done:
                        bar.advance()
                        continue
                    if number >= self.batches:
                        break
                    if state is not None and step == done:
                        state.restore_random()
                    loss, cost = self.step(step, batch)
                    share = 100 * cost / self.network.dense_bops
                    bar.advance(note=f"loss {loss:.3f}, {share:.2f} % of the BOPs")
                    if state is not None and time.monotonic() - saved > SAVE_EVERY:
                        state.save(step + 1)
                        saved = time.monotonic()

    def step(self, step: int, batch: Any) -> tuple[float, float]:
        """Make one step; return the loss without the price, and the bit operations.

        Even steps leave the thresholds of inputs as they are, odd ones those of
        weights and filters, momentum included.

        Raises:
            DataError: The batch has no labels, and there is no teacher.
            NonFiniteError: The loss is NaN or infinite.
        """
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.total))
        for group in self.optimizer.param_groups:
            if "peak" in group:
                group["lr"] = group["peak"] * cosine
        self.network.model.train()
        x, y = split_batch(batch)
        x = to_device(x, self.device)
        out = check_logits(call_model(self.network.model, x))
        loss = self._loss(x, out, to_device(y, self.device))
        if not math.isfinite(float(loss.detach())):
            raise NonFiniteError(
                "the loss of the search is not finite",
                got=f"{float(loss.detach())} at step {step}",
                fix="lower the learning rate, or look for NaN in the data",
            )
        cost = expected_bops(self.network.layers)
        self.optimizer.zero_grad()
        (loss + self.price.term(step, cost)).backward()  # type: ignore[no-untyped-call]
        for threshold in self.of_weights if step % 2 else self.of_inputs:
            threshold.grad = None
        self.optimizer.step()
        for layer in self.network.layers:
            layer.clamp_()
        found = float(cost.detach())
        self.price.adjust(step, found)
        return float(loss.detach()), found

    def _loss(self, x: Any, out: torch.Tensor, y: Any) -> torch.Tensor:
        """Return the cross-entropy, or T² KL(teacher ‖ student) at T = 4."""
        mask = None if self.teacher is None else counted(self.teacher, x, y)
        out = output_rows(out.float(), mask)
        if self.teacher is None:
            if not torch.is_tensor(y) or y.is_floating_point() or y.numel() != len(out):
                raise DataError(
                    "the search needs labels",
                    got="none" if y is None else type(y).__name__,
                    wanted=f"(inputs, labels) with {len(out)} whole numbers",
                    fix="use run(…, labels=False) to learn from the float network",
                )
            return F.cross_entropy(out, y.reshape(-1).long())
        with torch.no_grad():
            wanted = check_logits(call_model(self.teacher, x)).float()
            wanted = output_rows(wanted, mask) / TEMPERATURE
        soft = F.kl_div(
            (out / TEMPERATURE).log_softmax(-1),
            wanted.log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
        return TEMPERATURE**2 * soft

    @torch.no_grad()
    def votes(self, batches: int) -> Votes:
        """Let up to so many batches vote on the bits of inputs."""
        self.network.model.eval()
        asking = [x for x in self.network.free if x.inputs is not None]
        found: dict[str, dict[int, int]] = {layer.name: {} for layer in asking}
        sums: dict[str, list[float]] = {}
        for number, x in enumerate(self._inputs(self.options.epochs)):
            if number == batches:
                break
            call_model(self.network.model, x)
            for layer in asking:
                assert layer.inputs is not None
                assert layer.inputs.found is not None
                bits = int(layer.inputs.found.bits)
                tally, seen = found[layer.name], layer.inputs.found.measures
                tally[bits] = tally.get(bits, 0) + 1
                before = sums.get(layer.name, [0.0] * len(seen))
                sums[layer.name] = [
                    a + float(b) for a, b in zip(before, seen, strict=True)
                ]
        voted = {name: sum(tally.values()) for name, tally in found.items()}
        means = {name: [s / voted[name] for s in of] for name, of in sums.items()}
        return Votes(found, means)
