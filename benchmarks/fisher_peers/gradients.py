"""Candidates that only need a few lines: plain, ours, one by one, and the shortcut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fisher_peers.candidate import Candidate

if TYPE_CHECKING:
    from fisher_peers.case import Case

__all__ = ["Loop", "Ours", "Plain", "Shortcut"]


class Plain(Candidate):
    """One forward and backward of the mean loss, all parameters, nothing else."""

    def __init__(self, case: Case, diagonal: bool = False) -> None:
        super().__init__(case, False)
        self.totals.clear()

    def add(self) -> None:
        """Leave the gradients in the parameters."""
        self.case.model.zero_grad(set_to_none=True)
        self.case.mean_loss().backward()


class Ours(Candidate):
    """``FisherEstimator`` of this package."""

    def __init__(self, case: Case, diagonal: bool) -> None:
        from fitcompress.sensitivity import FisherEstimator

        super().__init__(case, False)
        self.diagonal = diagonal
        self.totals.clear()
        self.estimator = FisherEstimator(case.model, diagonal=diagonal)

    def add(self) -> None:
        """Add the batch to the estimator's own sums."""
        self.estimator.update(self.case.x, self.case.y, self.case.loss)

    def values(self) -> dict[str, torch.Tensor]:
        """Return what the estimator says."""
        moments = self.estimator.moments
        names = [layer.name for layer in self.case.layers]
        if self.diagonal:
            return {name: moments.diagonal(name) for name in names}
        return {name: torch.tensor(moments.mean_trace(name)) for name in names}


class Loop(Candidate):
    """Batches of one sample: nothing to get wrong, and what the others are held to."""

    def add(self) -> None:
        """Square the gradient of one sample after the other."""
        case = self.case
        for x, y in zip(case.x.split(1), case.y.split(1), strict=True):
            loss = case.loss(case.model(x), y)
            gradients = torch.autograd.grad(loss, case.weights)
            for layer, gradient in zip(case.layers, gradients, strict=True):
                self.add_square(layer, gradient)


class Shortcut(Candidate):
    """B times the square of the mean gradient, as FITCompress was published.

    The cross terms of different samples do not cancel: it is another number.
    """

    exact = False

    def add(self) -> None:
        """Square the sum of all samples' gradients."""
        loss = self.case.mean_loss() * len(self.case.x)
        gradients = torch.autograd.grad(loss, self.case.weights)
        for layer, gradient in zip(self.case.layers, gradients, strict=True):
            self.add_square(layer, gradient)
