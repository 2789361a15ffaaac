"""What all candidates have in common: sums over the samples of all steps."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from fisher_peers.case import Case
    from fitcompress.model import Layer

__all__ = ["Candidate", "frozen"]


class Candidate:
    """Adds Σ_i ‖G_i‖², or Σ_i G_i ∘ G_i, of one batch a step.

    Args:
        case: Network and batch.
        diagonal: Squares of every weight; else only their sum.

    Attributes:
        exact: Whether squares are those of single samples' gradients.
        changes_model: Whether it leaves hooks or switches behind, and wants a copy.
        quantities: What it has.
    """

    exact = True
    changes_model = False
    quantities: tuple[str, ...] = ("trace", "diagonal")

    def __init__(self, case: Case, diagonal: bool) -> None:
        self.case, self.diagonal = case, diagonal
        self.samples = 0
        self.totals = {
            layer.name: torch.zeros(layer.shape)
            if diagonal
            else torch.zeros((), dtype=torch.float64)
            for layer in case.layers
        }

    def step(self) -> None:
        """Add the batch: this is timed."""
        self.add()
        self.samples += len(self.case.x)

    def add(self) -> None:
        """Add the squares of all samples to ``totals``."""
        raise NotImplementedError

    def values(self) -> dict[str, torch.Tensor]:
        """Return the mean over samples by layer: a trace, or a diagonal as a matrix."""
        return {
            layer.name: self._value(layer, self.totals[layer.name] / self.samples)
            for layer in self.case.layers
            if layer.name in self.totals
        }

    def _value(self, layer: Layer, mean: torch.Tensor) -> torch.Tensor:
        return layer.matrix_of(mean) if self.diagonal else mean

    def add_square(self, layer: Layer, gradient: torch.Tensor) -> None:
        """Add the square of one gradient."""
        total = self.totals[layer.name]
        if self.diagonal:
            total.addcmul_(gradient, gradient)
        else:  # torch's sum is pairwise, a dot product in float32 is less exact
            total += gradient.square().sum()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Have autograd skip all parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
