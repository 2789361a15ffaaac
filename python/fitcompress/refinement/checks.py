"""Whether a table and inputs belong to a model, and suffice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fitcompress.errors import CalibrationError, PlanMismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fitcompress.model import Layer
    from fitcompress.sensitivity.table import Sensitivity

__all__ = ["check_batches", "check_layers"]


def check_layers(sensitivity: Sensitivity, layers: Mapping[str, Layer]) -> None:
    """Raise unless a table is that of a model with these layers.

    Raises:
        PlanMismatchError: Names the first layer that differs.
    """
    known = dict(zip(sensitivity.names, sensitivity.shapes, strict=True))
    found = {name: tuple(layer.shape) for name, layer in layers.items()}
    if known != found:
        names = [n for n in {**known, **found} if known.get(n) != found.get(n)]
        raise PlanMismatchError(
            "the sensitivity is that of another model",
            got=f"layer {names[0]!r}: {found.get(names[0])}",
            wanted=f"{known.get(names[0])}",
            fix="measure this model first",
        )


def check_batches(batches: Sequence[Any]) -> None:
    """Raise unless there are inputs to compensate with and others to measure on.

    Raises:
        CalibrationError: There is one batch only.
    """
    if len(batches) < 2:
        raise CalibrationError(
            "a refinement needs inputs to compensate with and others to measure on",
            got="one sample",
            wanted="at least two",
            fix="give more inputs",
        )
