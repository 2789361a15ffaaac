"""``BitSharing``: bits of weights and inputs, and filters, learnt by training."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.compensate import apply
from fitcompress.data.batches import take
from fitcompress.errors import BudgetInfeasibleError, OptionError
from fitcompress.files import check_writable
from fitcompress.methods.bit_sharing.configuration import configuration, smallest
from fitcompress.methods.bit_sharing.extraction import float_network, make_plan
from fitcompress.methods.bit_sharing.network import build_network
from fitcompress.methods.bit_sharing.shared_bits import Ladder
from fitcompress.methods.bit_sharing.training import Trainer
from fitcompress.model import check_finite
from fitcompress.model.devices import device_of, to_device
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn

    from fitcompress.search import Budget, Plan

__all__ = ["BitSharing"]

NORM_SAMPLES = 4096
APPLY_SAMPLES = 1024


@dataclass(frozen=True)
class BitSharing:
    """Bits of every layer's weight and input, and filters to remove, by training.

    Numbers of all widths share their leading part, and a gate for every further part
    is learnt along with the weights:

        ẑ = z_2 + g_4 (ε_4 + g_8 ε_8),    g_b = 1[mean|z − z_prev| > τ_b],
        loss = cross-entropy + λ · log BOPs,    BOPs = Σ MACs · kept · b_w · b_a,

    the gates with the gradient of a sigmoid, λ adapted to the budget. A filter group
    goes where its largest-relative norm is at most τ_p. Even steps train thresholds of
    weights, odd steps those of inputs; a vote over batches decides on the bits of
    inputs. The first and the last layer keep 8 bits. In the end, gates nearest to their
    threshold are closed or opened, so that the budget is met and spent.

    Attributes:
        ladder: Bits to choose from; each divides the next.
        epochs: Passes over the loader.
        prune_groups: Pattern of layer names → B, consecutive filters that stay or go
            together; a later pattern wins. Empty: all filters stay.
        max_pruned: Largest share of a layer's groups that may go, in [0, 1).
        learning_rate: Of weights and ranges at the start; falls along a cosine.
        threshold_rate: Learning rate of the thresholds.
        weight_decay: Of weights, not of thresholds and ranges.
        price: λ at the start.
        vote_batches: Most batches that vote.

    Raises:
        OptionError: An option cannot be used.

    Source: after Automatic Bit Sharing (arXiv 2101.04935); where it is a
    reconstruction, see ``docs/method.md``.

    Example:
        >>> import torch, fitcompress as fc
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
        >>> data = [(torch.randn(16, 4), torch.randint(0, 4, (16,)))]
        >>> method = fc.methods.BitSharing(epochs=2)
        >>> plan, small = method.run(net, data, fc.Budget(bops="4%"), progress=False)
        >>> plan.bops <= 0.04 * 4 * 16 * 32 * 32
        True
    """

    ladder: tuple[int, ...] = (2, 4, 8)
    epochs: int = 30
    prune_groups: Mapping[str, int] = field(default_factory=dict)
    max_pruned: float = 0.5
    learning_rate: float = 1e-3
    threshold_rate: float = 1e-2
    weight_decay: float = 1e-4
    price: float = 0.1
    vote_batches: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "prune_groups", _checked_groups(self.prune_groups))
        if len(Ladder(self.ladder).bits) < 2:
            raise OptionError(
                "there is nothing to choose on this ladder",
                got=self.ladder,
                wanted="at least two rungs, such as (2, 4, 8)",
            )
        for name, whole in (
            ("epochs", self.epochs),
            ("vote_batches", self.vote_batches),
        ):
            if type(whole) is not int or whole < 1:
                raise OptionError(name, got=repr(whole), wanted="an integer from 1 on")
        for name in ("learning_rate", "threshold_rate", "price"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(
                    name, got=getattr(self, name), wanted="a finite number > 0"
                )
        if not 0 <= self.weight_decay < math.inf:
            raise OptionError("weight_decay", got=self.weight_decay, wanted="≥ 0")
        if not 0 <= self.max_pruned < 1:
            raise OptionError("max_pruned", got=self.max_pruned, wanted="[0, 1)")

    def run(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        budget: Budget,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        seed: int = 0,
        progress: bool = True,
        labels: bool = True,
    ) -> tuple[Plan, nn.Module]:
        """Search, and return the plan with the compressed network.

        Args:
            model: The trained classifier, in float32; unchanged.
            loader: Yields (inputs, labels) or inputs, the same for the same epoch; if
                it has an attribute ``epoch``, that is set before each pass.
            budget: Bounds the bit operations and nothing else.
            checkpoint: File to save progress to and resume from; removed at the end.
                After a kill the same call ends with the identical result.
            seed: Of dropout; the loader draws for itself.
            progress: Show bars with the time left.
            labels: Learn from the labels; else from the outputs of ``model``.

        Returns:
            The plan, and what :func:`fitcompress.apply` made of the trained network
            with it, ready for :func:`fitcompress.finetune`. The plan can be applied to
            ``model`` as well: it says which filters to keep.

        Raises:
            OptionError: The budget bounds something else, or an option does not fit
                the model.
            BudgetInfeasibleError: Fewer bit operations than with all gates closed.
            DataError: Labels are missing.
            EmptyLoaderError: The loader yields nothing.
            NonFiniteError: A weight or the loss is NaN or infinite.
            CalibrationError: A layer is never called.
            OutputError: The checkpoint cannot be written.
        """
        _check_budget(budget)
        check_finite(model)
        if checkpoint is not None:
            check_writable(checkpoint)
        with threads(FIXED), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            plan, dense, inputs = self._search(
                model,
                loader,
                budget,
                checkpoint,
                seed,
                progress=progress,
                labels=labels,
            )
        small = apply(dense, plan, inputs, samples=APPLY_SAMPLES, progress=progress)
        if checkpoint is not None:
            check_writable(checkpoint).unlink(missing_ok=True)
        return plan, small

    def _search(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        budget: Budget,
        checkpoint: str | os.PathLike[str] | None,
        seed: int,
        *,
        progress: bool,
        labels: bool,
    ) -> tuple[Plan, nn.Module, list[torch.Tensor]]:
        """Return the plan, the float network to apply it to, and inputs for that."""
        if hasattr(loader, "epoch"):
            loader.epoch = 0
        network = build_network(
            model, loader, Ladder(self.ladder), self.prune_groups, self.max_pruned
        )
        limit = budget.bops_limit(network.dense_bops)
        if (least := smallest(network)) > limit:
            raise BudgetInfeasibleError(
                "no choice of bits on the ladder meets the budget",
                smallest=least,
                got=budget,
                wanted=f"at least {least} bit operations, "
                f"{100 * least / network.dense_bops:.3g} % of float32",
                fix="allow more, a ladder that starts lower, or filters to go",
            )
        teacher = None if labels else copy.deepcopy(model).eval()
        trainer = Trainer(network, loader, self, limit, teacher)
        key = f"{self}-{seed}-{limit}-{labels}"
        trainer.run(checkpoint, key, progress=progress)
        votes = trainer.votes(self.vote_batches)
        found = configuration(network, votes)
        searched = found.bops()
        found.fit(limit)
        device = device_of(model)
        passing = take(trainer.pass_of(self.epochs), NORM_SAMPLES)
        inputs = [to_device(x, device) for x, _ in passing]
        dense = float_network(model, network, inputs)
        details = {
            "ladder": list(self.ladder),
            "bops_limit": limit,
            "bops_searched": searched,
            "price": trainer.price.weight,
            "votes": {
                name: {str(bits): count for bits, count in sorted(tally.items())}
                for name, tally in votes.bits.items()
            },
        }
        return make_plan(model, network, found, details), dense, inputs


def _check_budget(budget: Budget) -> None:
    if budget.costs != ("bops",) or budget.rules or budget.groups:
        raise OptionError(
            "bit sharing takes one bound, on bit operations",
            got=f"{budget}"
            + (", with rules" if budget.rules else "")
            + (", with groups" if budget.groups else ""),
            wanted='Budget(bops="5%")',
            fix="use search for bytes, rules and groups",
        )


def _checked_groups(groups: Any) -> dict[str, int]:
    if not isinstance(groups, Mapping) or not all(
        isinstance(pattern, str) and type(size) is int and size >= 1
        for pattern, size in groups.items()
    ):
        raise OptionError(
            "prune_groups",
            got=repr(groups),
            wanted='pattern → filters of a group, such as {"layer*.conv1": 4}',
        )
    return dict(groups)
