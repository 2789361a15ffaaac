"""Which weights of a layer a mask drops first: the rules that need no calibration.

A rule gives every weight of a layer an importance. The mask at sparsity s drops the
⌊s · n⌋ weights of lowest importance, of equals those that come first: there is one
order for each layer, so masks are nested in the sparsity. How a sparsity of the network
is shared among its layers is another question, see ``levels.allocated``.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from fitcompress.errors import NonFiniteError, OptionError, PlanMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fitcompress.model import Layer
    from fitcompress.sensitivity.moments import FisherMoments

__all__ = [
    "Fisher",
    "Magnitude",
    "MaskRule",
    "Smoothed",
    "check_rule",
    "importance_of",
    "tensors_digest",
]


@runtime_checkable
class MaskRule(Protocol):
    """What a rule for masks offers; any object that has it will do."""

    @property
    def name(self) -> str:
        """What it is called in the provenance of a table, options included."""

    def importance(self, layer: Layer) -> torch.Tensor:
        """Return how much each weight is worth, float32 [rows, columns], ≥ 0.

        Args:
            layer: A layer of the dense network.

        Raises:
            PlanMismatchError: The rule was measured on another model.
        """

    def digest(self) -> str:
        """Return a short text that two rules share only if they order alike."""


@dataclass(frozen=True)
class Magnitude:
    """|θ_j|: the smallest weights go first.

    Example:
        >>> import fitcompress as fc
        >>> fc.masks.Magnitude().name
        'magnitude'
    """

    @property
    def name(self) -> str:
        """``magnitude``."""
        return "magnitude"

    def importance(self, layer: Layer) -> torch.Tensor:
        """Return |θ|, float32 [rows, columns]."""
        return layer.matrix().abs()

    def digest(self) -> str:
        """Return its name: there is nothing to choose."""
        return self.name


@dataclass(frozen=True, eq=False)
class Fisher:
    """F_j θ_j², the rule of FITCompress: what is nearly free by itself goes first.

    It was measured to cost much more loss than :class:`Magnitude` once the other
    weights are refitted, 1.2 to 4 times on a small network: dropped together, such
    weights shift the activations, which the diagonal does not see, so the table looks
    far better than the network. If weights are merely rounded, it depends; see
    :class:`Smoothed` and ``docs/method.md``, section 5.

    Attributes:
        moments: Of :func:`fitcompress.measure_fisher` with ``diagonal=True``.

    Source: FITCompress (Zandonati et al., 2023, arXiv 2302.07612).
    """

    moments: FisherMoments = field(repr=False)

    @property
    def name(self) -> str:
        """``fisher``."""
        return "fisher"

    def importance(self, layer: Layer) -> torch.Tensor:
        """Return F θ², float32 [rows, columns].

        Raises:
            PlanMismatchError: The moments are those of another model.
            DataError: They are traces only.
        """
        return _diagonal(self.moments, layer) * layer.matrix().square()

    def digest(self) -> str:
        """Return a hash of the moments."""
        return tensors_digest(
            f"{self.name} {self.moments.samples}", self.moments.squares
        )


@dataclass(frozen=True, eq=False)
class Smoothed:
    """(F_j + κ · mean F) θ_j², the mean over the layer's weights.

    κ = 0 is :class:`Fisher`; within a layer, a large κ is :class:`Magnitude`.

    Attributes:
        moments: Of :func:`fitcompress.measure_fisher` with ``diagonal=True``.
        kappa: κ ≥ 0.
    """

    moments: FisherMoments = field(repr=False)
    kappa: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.kappa < math.inf:
            raise OptionError("kappa", got=self.kappa, wanted="a finite number ≥ 0")

    @property
    def name(self) -> str:
        """``smoothed`` and κ."""
        return f"smoothed({self.kappa:g})"

    def importance(self, layer: Layer) -> torch.Tensor:
        """Return (F + κ · mean F) θ², float32 [rows, columns].

        Raises:
            PlanMismatchError: The moments are those of another model.
            DataError: They are traces only.
        """
        fisher = _diagonal(self.moments, layer)
        offset = (self.kappa * fisher.double().mean()).float()
        return (fisher + offset) * layer.matrix().square()

    def digest(self) -> str:
        """Return a hash of the moments and κ."""
        about = f"smoothed {float(self.kappa).hex()} {self.moments.samples}"
        return tensors_digest(about, self.moments.squares)


def importance_of(rule: MaskRule, layer: Layer) -> torch.Tensor:
    """Return what a rule makes of a layer, checked.

    Raises:
        PlanMismatchError: The rule does not know the layer, or in another shape.
        OptionError: An importance is negative or of another type.
        NonFiniteError: An importance is NaN or infinite.
    """
    found = rule.importance(layer)
    wanted = (layer.rows, layer.columns)
    if tuple(found.shape) != wanted:
        raise _mismatch(layer, rule.name, list(found.shape), list(wanted))
    if found.dtype != torch.float32:
        raise OptionError(
            f"mask rule {rule.name!r}: layer {layer.name!r} has mistyped importances",
            got=found.dtype,
            wanted=torch.float32,
        )
    found = found.detach().to(layer.weight.device)
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError(
            f"mask rule {rule.name!r}: an importance of layer {layer.name!r} is NaN or "
            "infinite",
            wanted="finite numbers",
        )
    if bool((found < 0).any()):
        raise OptionError(
            f"mask rule {rule.name!r}: an importance of layer {layer.name!r} is "
            "negative",
            got=float(found.min()),
            wanted="numbers from 0 on",
        )
    return found


def check_rule(rule: MaskRule, layers: Iterable[Layer]) -> None:
    """Raise unless ``rule`` is one and fits all layers.

    Raises:
        OptionError: It is no rule.
        PlanMismatchError: It does not know a layer, or in another shape.
        DataError: It needs Fisher diagonals and has traces only.
        NonFiniteError: An importance is NaN or infinite.
    """
    if isinstance(rule, type) or not isinstance(rule, MaskRule):
        raise OptionError(
            "masks is no rule",
            got=repr(rule),
            wanted="an object such as fitcompress.masks.Magnitude()",
        )
    for layer in layers:
        importance_of(rule, layer)


def tensors_digest(about: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a short hash of a text and of named tensors."""
    made = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        made.update(f"\n{name} {values.dtype} {tuple(values.shape)}\n".encode())
        if values.numel():
            made.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()[:16]


def _diagonal(moments: FisherMoments, layer: Layer) -> torch.Tensor:
    """Return F as a matrix [rows, columns]."""
    if layer.name not in moments.trace and layer.name not in moments.squares:
        why = moments.unsupported.get(layer.name)
        raise _mismatch(layer, "fisher", why or "no moments of it", list(layer.shape))
    fisher = moments.diagonal(layer.name)
    if fisher.shape != layer.weight.flatten(1).shape:
        raise _mismatch(layer, "fisher", list(fisher.shape), list(layer.shape))
    return layer.matrix_of(fisher.view(layer.shape)).to(layer.weight.device)


def _mismatch(
    layer: Layer, rule: str, got: object, wanted: object
) -> PlanMismatchError:
    return PlanMismatchError(
        f"the mask rule {rule!r} does not fit layer {layer.name!r}",
        got=got,
        wanted=f"importances for a weight of shape {wanted}",
        fix="measure the rule on this model",
    )
