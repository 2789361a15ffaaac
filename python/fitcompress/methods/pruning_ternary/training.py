"""The training of ternary weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fitcompress.data.batches import digest, split_batch, take
from fitcompress.methods.pruning_ternary.schedule import ZeroSchedule, next_mask
from fitcompress.methods.pruning_ternary.ternary import (
    TernaryWeight,
    alignment,
    unit_rows,
)
from fitcompress.model import compressible_layers
from fitcompress.model.devices import device_of, to_device
from fitcompress.model.forward import call_model
from fitcompress.model.positions import counted
from fitcompress.quantize import WeightGrid, attach_grid, row_scales
from fitcompress.quantize.leftovers import FOLDABLE
from fitcompress.search.plan import Level
from fitcompress.sensitivity.table import Grid
from fitcompress.train.distillation import distillation_loss
from fitcompress.train.loop import count_batches, finite_value, one_pass, run_steps
from fitcompress.train.norms import NORM_SAMPLES, estimate_norms_
from fitcompress.train.schedule import warm_cosine
from fitcompress.train.training_state import TrainingState

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from torch.nn.modules.batchnorm import _BatchNorm

    from fitcompress.methods.pruning_ternary.method import PruningTernary

__all__ = ["TernaryTraining"]

SAVE_EVERY = 30.0  # seconds between checkpoints
MOMENTUM = 0.9


class TernaryTraining:
    """One training; ``model`` is the copy that is trained.

    Latent filters have length 1 to begin with, which changes nothing, as only their
    direction counts, and gives the learning rate the same meaning in all of them.

    Args:
        dense: The network; unchanged.
        options: Of the method.
        loader: Yields inputs or (inputs, targets), the same for the same epoch.
        teacher: Its outputs are targets, in eval mode; or None.
        loss_fn: (output, targets) → loss; or None.

    Attributes:
        dense_cosines: Mean cosine of the dense filters of every layer and what they
            would be with the final share of zeros and no training.
    """

    def __init__(
        self,
        dense: nn.Module,
        options: PruningTernary,
        loader: Iterable[Any],
        teacher: nn.Module | None,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    ) -> None:
        self.options, self.loader = options, loader
        self.teacher, self.loss_fn = teacher, loss_fn
        self.device = device_of(dense)
        self.batches = count_batches(loader)
        self.schedule = ZeroSchedule(
            options.zeros,
            options.epochs * self.batches,
            options.ramp,
            options.frozen,
        )
        self.model = copy.deepcopy(dense).train()
        self.ternary: dict[str, tuple[nn.Parameter, TernaryWeight]] = {}
        self.dense_cosines: dict[str, float] = {}
        groups = self._attach()
        latents = {id(group["params"][0]) for group in groups}
        rest = [
            p
            for p in self.model.parameters()
            if p.requires_grad and id(p) not in latents
        ]
        if rest:
            groups.append({"params": rest, "share": 1.0})
        for group in groups:
            group["lr"] = group["share"] * options.learning_rate
        self.optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)
        self.norms: list[_BatchNorm] = [
            module
            for module in self.model.modules()
            if isinstance(module, FOLDABLE) and module.running_mean is not None
        ]

    def _attach(self) -> list[dict[str, Any]]:
        """Put the weights on ternary or fixed-point values; return their groups."""
        groups: list[dict[str, Any]] = []
        layers = compressible_layers(self.model)
        bits = self.options.first_and_last
        for number, layer in enumerate(layers):
            layer.weight.requires_grad_(True)
            rows = layer.matrix()
            length = torch.linalg.vector_norm(rows, dim=1)
            if bits is not None and number in (0, len(layers) - 1):
                level = Level(Grid(bits=bits), 0.0, layer.shape)
                grid = WeightGrid(*row_scales(rows, level))
                attach_grid(layer.module, grid.to(rows.device), layer.weight.detach())
                latent = _latent(layer.module)
                # Moves by the angle that it would move by with filters of length 1.
                share = float(length.square().mean())
                groups.append({"params": [latent], "share": share})
                continue
            units = unit_rows(rows)
            final, _ = next_mask(units.abs(), None, self.schedule.zeros, 0.0)
            self.dense_cosines[layer.name] = float(alignment(units, final).mean())
            mask, _ = next_mask(units.abs(), None, self.schedule.start, 0.0)
            held = TernaryWeight(length, mask, layer.view)
            with torch.no_grad():
                layer.weight.copy_(layer.weight_of(units))
            parametrize.register_parametrization(
                layer.module, "weight", held, unsafe=True
            )
            latent = _latent(layer.module)
            self.ternary[layer.name] = (latent, held)
            decay = self.options.weight_decay
            groups.append({"params": [latent], "share": 1.0, "weight_decay": decay})
        return groups

    def run(
        self, checkpoint: str | os.PathLike[str] | None, key: str, *, progress: bool
    ) -> list[float]:
        """Train, resuming what ``checkpoint`` holds; return the mean loss of epochs."""
        self.estimate_norms(self.model)
        state = None
        if checkpoint is not None:
            first = next(take(one_pass(self.loader, 0), 1))[0]
            key = f"{key}-{self.schedule.steps}-{digest(first):08x}"
            state = TrainingState(checkpoint, key, self.model, self.optimizer)
        losses = run_steps(
            self._step,
            self.loader,
            epochs=self.options.epochs,
            batches=self.batches,
            state=state,
            save_every=SAVE_EVERY,
            title="ternary",
            progress=progress,
        )
        self.model.eval()
        return losses

    def estimate_norms(self, model: nn.Module) -> None:
        """Estimate the statistics of a model's norms anew, in place.

        Args:
            model: The model under training, or a copy of it.
        """
        names = [n for n, m in self.model.named_modules() if m in set(self.norms)]
        norms: Any = [model.get_submodule(name) for name in names]
        inputs = take(one_pass(self.loader, self.options.epochs), NORM_SAMPLES)
        estimate_norms_(model, norms, (to_device(x, self.device) for x, _ in inputs))

    def cosines(self) -> dict[str, float]:
        """Return the mean cosine of latent and ternary filters of every layer."""
        return {
            name: float(alignment(_rows(latent, held), held.mask).mean())
            for name, (latent, held) in self.ternary.items()
        }

    def _step(self, step: int, batch: Any) -> float:
        rate = warm_cosine(self.options.learning_rate, step, self.schedule.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * rate
        self._update_masks(step)
        x, y = split_batch(batch)
        loss = self._loss(to_device(x, self.device), to_device(y, self.device))
        value = finite_value(loss, step)
        self.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:  # with frozen codes there may be nothing else to train
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        return value

    def _update_masks(self, step: int) -> None:
        frozen, new = self.schedule.is_frozen(step), self.schedule.has_new_mask(step)
        zeros = self.schedule.zeros_at(step)
        for latent, held in self.ternary.values():
            if new:
                size = unit_rows(_rows(latent, held)).abs()
                mask, _ = next_mask(size, held.mask, zeros, self.options.hysteresis)
                held.mask.copy_(mask)
            held.frozen = frozen

    def _loss(self, x: Any, y: Any) -> torch.Tensor:
        self.model.train()
        out, loss = call_model(self.model, x), torch.zeros((), device=self.device)
        if self.teacher is not None:
            with torch.no_grad():
                wanted = call_model(self.teacher, x)
            loss = loss + distillation_loss(out, wanted, counted(self.teacher, x, y))
        return loss if self.loss_fn is None else loss + self.loss_fn(out, y)


def _latent(module: nn.Module) -> nn.Parameter:
    latent = module.get_submodule("parametrizations.weight").original
    assert isinstance(latent, nn.Parameter)
    return latent


def _rows(latent: torch.Tensor, held: TernaryWeight) -> torch.Tensor:
    return held.view.matrix_of(latent.detach())
