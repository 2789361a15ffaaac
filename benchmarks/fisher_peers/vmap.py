"""Per-sample gradients by ``torch.func``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisher_peers.candidate import Candidate

if TYPE_CHECKING:
    from fisher_peers.case import Case

__all__ = ["Vmap"]

LARGEST = 2**28  # numbers in the gradients of a chunk of samples: 1 GB


class Vmap(Candidate):
    """``vmap(grad(loss))`` over the weights; the whole batch at once if that fits."""

    def __init__(self, case: Case, diagonal: bool) -> None:
        super().__init__(case, diagonal)
        self.weights = {f"{x.name}.weight": x.weight.detach() for x in case.layers}
        size = sum(weight.numel() for weight in self.weights.values())
        self.chunk = max(1, LARGEST // size)

        def loss(
            weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor
        ) -> torch.Tensor:
            output = functional_call(case.model, weights, (x[None],))
            return case.loss(output, y[None])

        self.gradients = vmap(grad(loss), in_dims=(None, 0, 0))

    @torch.no_grad()  # of the parameters that are not differentiated
    def add(self) -> None:
        """Square gradients [chunk, …] layer by layer."""
        case = self.case
        chunks = zip(case.x.split(self.chunk), case.y.split(self.chunk), strict=True)
        for x, y in chunks:
            with sdpa_kernel(SDPBackend.MATH):  # others run sample by sample
                found = self.gradients(self.weights, x, y)
            for layer in case.layers:
                squares = found.pop(f"{layer.name}.weight").square_()
                total = self.totals[layer.name]
                total += squares.sum(0) if self.diagonal else squares.sum()
