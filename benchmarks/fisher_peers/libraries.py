"""BackPACK, Opacus and curvlinops, each used for the weights of layers only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisher_peers.candidate import Candidate

if TYPE_CHECKING:
    from fisher_peers.case import Case

__all__ = ["BackPack", "Curvlinops", "Opacus"]


def _only_weights(case: Case) -> None:
    """Have autograd, and with it the library, skip biases and norms."""
    case.model.requires_grad_(False)
    for weight in case.weights:
        weight.requires_grad_(True)


def _contiguous(
    _: nn.Module, args: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    return tuple(x.contiguous() for x in args)


class BackPack(Candidate):
    """``BatchL2Grad`` for the trace, ``SumGradSquared`` for the diagonal.

    Only the layers are extended: additions and norms need not be modules then. Its
    version 1.7.1 gets the norms of convolutions with groups wrong.
    """

    changes_model = True

    def __init__(self, case: Case, diagonal: bool) -> None:
        import backpack
        from backpack.extensions import BatchL2Grad, SumGradSquared

        super().__init__(case, diagonal)
        _only_weights(case)
        for layer in case.layers:
            backpack.extend(layer.module)
        self.extended = backpack.backpack
        self.extension = SumGradSquared() if diagonal else BatchL2Grad()

    def add(self) -> None:
        """Read what the extension leaves in the parameters."""
        self.case.model.zero_grad(set_to_none=True)
        with self.extended(self.extension):
            (self.case.mean_loss() * len(self.case.x)).backward()
        for layer in self.case.layers:
            found = getattr(layer.weight, self.extension.savefield)
            self.totals[layer.name] += found if self.diagonal else found.sum()
            delattr(layer.weight, self.extension.savefield)


class Opacus(Candidate):
    """The norms of ghost clipping, which has no diagonal.

    It only looks at modules in training mode: the layers are put into it, where it
    changes nothing, and norms are not.
    """

    changes_model = True
    quantities = ("trace",)

    def __init__(self, case: Case, diagonal: bool = False) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        super().__init__(case, False)
        _only_weights(case)
        for layer in case.layers:
            layer.module.train()
            if layer.one_hot:  # its norms view the indices
                layer.module.register_forward_pre_hook(_contiguous)
        self.model = GradSampleModuleFastGradientClipping(
            case.model, strict=False, loss_reduction="mean"
        )

    def add(self) -> None:
        """Run forward and backward through the wrapped network."""
        self.model.zero_grad(set_to_none=True)
        self.case.loss(self.model(self.case.x), self.case.y).backward()
        for layer in self.case.layers:
            norms: torch.Tensor = layer.weight._norm_sample  # type: ignore[assignment]
            self.totals[layer.name] += norms.square().sum()


class Curvlinops(Candidate):
    """One Rademacher probe of ``EFLinearOperator``: v ∘ Fv estimates the diagonal.

    The library has products with F, and unbiased estimates from them; sums over a layer
    estimate its trace. The error of one probe is in the table. It falls with the root
    of the number of probes, each of which costs the same again.
    """

    exact = False

    def __init__(self, case: Case, diagonal: bool) -> None:
        from curvlinops import EFLinearOperator, hutchinson_diag

        super().__init__(case, diagonal)
        self.probe = hutchinson_diag
        self.operator = EFLinearOperator(
            case.model,
            nn.CrossEntropyLoss(),
            case.weights,
            [(case.x, case.y)],
            check_deterministic=False,
            num_data=len(case.x),
        )

    @torch.no_grad()  # of the parameters that are not differentiated
    def add(self) -> None:
        """Multiply one random vector of signs by the Fisher matrix."""
        with sdpa_kernel(SDPBackend.MATH):  # others have no forward derivative
            found = self.probe(self.operator, 1) * len(self.case.x)
        sizes = [layer.size for layer in self.case.layers]
        for layer, part in zip(self.case.layers, found.split(sizes), strict=True):
            total = self.totals[layer.name]
            total += part.view(layer.shape) if self.diagonal else part.sum()
