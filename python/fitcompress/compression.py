"""``compress``: measure, search and apply in one call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fitcompress.compensate import apply
from fitcompress.errors import BudgetExceededError
from fitcompress.search import Budget, search
from fitcompress.sensitivity.measurement import measure

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from fitcompress.search.problem import Family
    from fitcompress.search.selection import Method

__all__ = ["compress"]

RETRIES = 4


def compress(
    model: nn.Module,
    loader: Iterable[Any],
    budget: Budget,
    *,
    method: Method | None = None,
    family: Family | None = None,
    samples: int | None = 1024,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Return a compressed copy of ``model`` under ``budget``: no labels, no training.

    The same as :func:`measure` with labels sampled from the model, :func:`search` and
    :func:`apply` with calibration. Where a fixed-point plan turns out a little larger
    in the file than predicted, the search is repeated with that much less.

    Args:
        model: The trained network; unchanged.
        loader: Yields inputs from the training distribution; iterated twice.
        budget: The bound.
        method: As for :func:`search`.
        family: As for :func:`search`.
        samples: Inputs used to calibrate; half as many measure the sensitivity.
        seed: Seeds the sampled labels.
        progress: Show bars with the time left.

    Returns:
        What :func:`apply` returns, ready for :func:`save` or :func:`finetune`.

    Raises:
        FitcompressError: As :func:`measure`, :func:`search` and :func:`apply` do.

    Example:
        >>> import torch, fitcompress as fc
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 4))
        >>> budget = fc.Budget(size="20%")
        >>> small = fc.compress(net, [torch.randn(64, 64)], budget, progress=False)
    """
    half = None if samples is None else max(1, samples // 2)
    table = measure(model, loader, samples=half, seed=seed, progress=progress)
    tightened = budget
    for attempt in range(RETRIES + 1):
        plan = search(table, tightened, method=method, family=family)
        if budget.kind == "size":
            # What counts is the user's bound, not the tightened one.
            plan = replace(plan, limit_bytes=budget.size_bytes(table.dense_bytes))
        try:
            return apply(model, plan, loader, samples=samples, progress=progress)
        except BudgetExceededError as error:
            if attempt == RETRIES:
                raise
            allowed = budget.size_bytes(table.dense_bytes)
            # Less than the search believed, or it would find the same plan again.
            believed = min(plan.size_bytes, tightened.size_bytes(table.dense_bytes))
            tightened = Budget(
                size=int(believed * min(0.995, allowed / error.size_bytes))
            )
    raise AssertionError
