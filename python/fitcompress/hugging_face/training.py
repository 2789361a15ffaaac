"""A callback for ``transformers.Trainer``: the packed file keeps its size in training.

Weights on grids are parametrizations, which any ``Trainer`` trains, saves and resumes
as they are. What it does not know is the size of the packed file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from fitcompress.errors import BudgetExceededError
from fitcompress.model import compressible_layers
from fitcompress.model.costs import dense_bytes
from fitcompress.quantize import (
    fold_norms_,
    norm_digits,
    plan_of,
    round_leftovers_,
    shorten_norms_,
)
from fitcompress.search import Budget
from fitcompress.storage.save_load import packed_bytes
from fitcompress.train.finetuning import CONTROL_EVERY, RAMP, SPREAD
from fitcompress.train.rate_control import RateControl

if TYPE_CHECKING:
    from torch import nn

__all__ = ["KeepSize"]


class KeepSize(TrainerCallback):
    """Prices bits while a ``Trainer`` trains, as :func:`fitcompress.finetune` does.

    ::

        small = fc.load("small.safetensors", build_model(folder), trainable=True)
        size = KeepSize(small)
        trainer = Trainer(
            small, TrainingArguments("run", save_steps=500), train_dataset=data,
            callbacks=[size], optimizers=(size.optimizer(), None),
        )
        trainer.train()  # resume_from_checkpoint=True after a kill
        fc.save(small, "tuned.safetensors")

    In the end the weights are on their grids, what is on none is rounded to 16 bits
    where that is safe, and the model is in eval mode. A resumed run ends with the same
    numbers as one that was not killed, if it starts from the same packed file: prices
    are found anew, from the weights alone, whenever a checkpoint is written.

    Args:
        small: What ``apply``, ``compress`` or ``load(trainable=True)`` returned.
        size: What the packed file may take, as for ``Budget(size=…)``; None: what the
            plan allows. A model that starts larger is squeezed in the first third of
            the steps.

    Raises:
        PlanMismatchError: ``small`` is not compressed.
    """

    def __init__(self, small: nn.Module, size: int | float | str | None = None) -> None:
        plan, self.small = plan_of(small), small
        limit = plan.limit_bytes or len(packed_bytes(small))
        if size is not None:
            limit = Budget(size=size).size_bytes(dense_bytes(small))
        self.rate = RateControl(small, limit)
        _declare_ties(small)

    def optimizer(self, lr: float = 0.0025, float_lr: float = 5e-4) -> torch.optim.Adam:
        """Return an optimizer with a learning rate for each grid.

        Args:
            lr: Of the weights, in steps of their grids.
            float_lr: Of what is on no grid: norms and biases.
        """
        steps = self.rate.step_sizes()
        groups = [
            {"params": [p], "lr": lr * steps[p] if p in steps else float_lr}
            for p in self.small.parameters()
            if p.requires_grad
        ]
        return torch.optim.Adam(groups, float_lr, betas=(0.9, 0.99))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Spread the weights over their cells, or find the prices of a resumed run."""
        if state.global_step:
            self._price_anew(state)
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            self.rate.spread(SPREAD)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Price bits anew, every so many steps."""
        if state.global_step % CONTROL_EVERY == 0:
            self.rate.adjust(self._share(state))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget all prices but those that a resumed run would find."""
        self._price_anew(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the weights on their grids, within the size.

        Raises:
            BudgetExceededError: They do not get small enough.
        """
        self.rate.adjust()
        self.small.eval()
        fold_norms_(self.small)
        round_leftovers_(self.small)
        shorten_norms_(self.small, norm_digits(plan_of(self.small)))
        if not self.rate.finish():
            found = len(packed_bytes(self.small))
            raise BudgetExceededError(
                "the model could not be squeezed into its budget",
                size_bytes=found,
                got=f"{found} bytes",
                wanted=f"at most {self.rate.limit} bytes",
                fix="start from a smaller file, or train longer",
            )

    def _price_anew(self, state: Any) -> None:
        self.rate.release()
        self.rate.weight = 0.0
        self.rate.adjust(self._share(state))

    @staticmethod
    def _share(state: Any) -> float:
        done: float = state.global_step / max(state.max_steps, 1)
        return min(1.0, done / RAMP)


def _declare_ties(small: nn.Module) -> None:
    """Tell ``save_pretrained`` which tensors are shared, or it refuses checkpoints."""
    for layer in compressible_layers(small):
        for _, module in layer.tied:
            key = "parametrizations.weight"
            object.__setattr__(
                module, "_tied_weights_keys", {key: f"{layer.name}.{key}"}
            )
