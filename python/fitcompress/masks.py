"""Mask rules: in which order the weights of a layer are dropped.

A rule gives every weight of a layer an importance; the mask at sparsity s drops the
⌊s·n⌋ least important ones, of equals the first, so masks are nested in s. How many
weights each layer drops is another choice: see ``allocation`` of
:func:`fitcompress.measure`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from fitcompress.errors import NonFiniteError, OptionError, PlanMismatchError
from fitcompress.model.copies import copy_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn

    from fitcompress.model import Layer
    from fitcompress.sensitivity.moments import FisherMoments

__all__ = [
    "Fisher",
    "Magnitude",
    "MaskRule",
    "OutputError",
    "Smoothed",
    "importances",
]


@runtime_checkable
class MaskRule(Protocol):
    """What orders the weights of a layer."""

    @property
    def name(self) -> str:
        """What to call it in a plan's provenance."""
        ...

    def importance(self, layer: Layer) -> torch.Tensor:
        """Return the importance of every weight, ≥ 0, float32 [rows, columns]."""
        ...


@dataclass(frozen=True)
class Magnitude:
    """|θ_j|: what costs least of the rules that need no data."""

    name: str = field(default="magnitude", init=False)

    def importance(self, layer: Layer) -> torch.Tensor:
        """Return |θ|, float32 [rows, columns]."""
        return layer.matrix().detach().float().abs()


@dataclass(frozen=True)
class Smoothed:
    """(F_j + κ · mean F) θ_j², the mean over the layer.

    κ → ∞ is the order of magnitude; κ = 0 that of :class:`Fisher`. Weights with little
    effect one by one shift activations together, which the diagonal of the Fisher
    information does not show; κ from 1 on was measured to cost no more than magnitude.

    Attributes:
        moments: From :func:`fitcompress.measure_fisher` with ``diagonal=True``.
        kappa: κ ≥ 0.
    """

    moments: FisherMoments
    kappa: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.kappa < float("inf"):
            raise OptionError("kappa", got=self.kappa, wanted="a finite number ≥ 0")

    @property
    def name(self) -> str:
        """``"fisher"`` or ``"smoothed fisher, κ = …"``."""
        return f"smoothed fisher, κ = {self.kappa:g}" if self.kappa else "fisher"

    def importance(self, layer: Layer) -> torch.Tensor:
        """Return (F + κ · mean F) θ², float32 [rows, columns].

        Raises:
            PlanMismatchError: The moments have no diagonal of this layer.
        """
        if layer.name not in self.moments.names:
            raise _unknown(layer, "the Fisher moments", self.moments.names)
        diagonal = self.moments.diagonal(layer.name)
        if diagonal.numel() != layer.size:
            raise PlanMismatchError(
                f"the Fisher moments of layer {layer.name!r} are of another model",
                got=f"{diagonal.numel()} values",
                wanted=f"{layer.size}",
            )
        weight = layer.matrix().detach().double()
        fisher = layer.matrix_of(diagonal.view(layer.shape)).double().to(weight.device)
        values = (fisher + self.kappa * fisher.mean()) * weight.square()
        return values.float()


@dataclass(frozen=True)
class Fisher(Smoothed):
    """F_j θ_j², the rule of FITCompress.

    It was measured to cost several times the loss of :class:`Magnitude` at equal
    sparsity.

    *Source:* Zandonati et al. 2023, arXiv 2302.07612.
    """

    kappa: float = field(default=0.0, init=False)


@dataclass(frozen=True)
class OutputError:
    """θ_j² / [(H + δ)⁻¹]_jj: what dropping one weight adds to the layer's output error.

    H is the covariance of the layer's inputs in the dense network and δ a ridge, as in
    compensation; all other weights of the row make up for the one that goes.

    Attributes:
        values: Layer name → importances, float32 [rows, columns].

    *Source:* Optimal Brain Surgeon, Hassibi and Stork 1992.
    """

    values: Mapping[str, torch.Tensor] = field(repr=False)
    name: str = field(default="output error", init=False)

    @classmethod
    def measure(
        cls, model: nn.Module, loader: Iterable[Any], *, samples: int | None = 512
    ) -> OutputError:
        """Return the rule for a model.

        Args:
            model: The trained network; unchanged.
            loader: Yields inputs or (inputs, …) from the training distribution.
            samples: How many to use, None for all.

        Raises:
            FitcompressError: As :func:`fitcompress.apply` does for its inputs.
        """
        # Here, since compensation takes rules itself.
        from fitcompress.compensate.saliency import output_saliency

        return cls(output_saliency(copy_of(model).eval(), loader, samples))

    def importance(self, layer: Layer) -> torch.Tensor:
        """Return what was measured, float32 [rows, columns].

        Raises:
            PlanMismatchError: The layer was not measured.
        """
        if layer.name not in self.values:
            raise _unknown(layer, "the output errors", tuple(self.values))
        return self.values[layer.name]


def importances(
    rule: MaskRule | None, layers: Sequence[Layer]
) -> dict[str, torch.Tensor]:
    """Return the importances of all layers, checked; nothing without a rule.

    Raises:
        OptionError: ``rule`` is no rule.
        PlanMismatchError: A layer is unknown to it, or of another shape.
        NonFiniteError: An importance is negative, NaN or infinite.
    """
    if rule is None:
        return {}
    if not isinstance(rule, MaskRule):
        raise OptionError(
            "masks", got=type(rule).__name__, wanted="a rule of fitcompress.masks"
        )
    found = {}
    for layer in layers:
        values = rule.importance(layer)
        if tuple(values.shape) != (layer.rows, layer.columns):
            raise PlanMismatchError(
                f"the mask rule is for another layer {layer.name!r}",
                got=tuple(values.shape),
                wanted=(layer.rows, layer.columns),
            )
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise NonFiniteError(
                f"an importance in layer {layer.name!r} is negative, NaN or infinite",
                wanted="finite importances from 0 on",
            )
        found[layer.name] = values.float().to(layer.weight.device)
    return found


def _unknown(layer: Layer, what: str, known: Sequence[str]) -> PlanMismatchError:
    return PlanMismatchError(
        f"{what} have no layer {layer.name!r}",
        got=", ".join(known[:6]) or "none",
        wanted="those of this model",
        fix="measure this model",
    )
