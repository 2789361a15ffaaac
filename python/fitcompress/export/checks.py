"""What has to be true of a model before it is written, and of what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fitcompress.errors import OptionError, PlanMismatchError
from fitcompress.search.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from fitcompress.export.report import ExportedLayer

__all__ = ["check_compressed", "check_sums"]


def check_compressed(model: nn.Module) -> None:
    """Raise unless weights are on grids.

    Raises:
        PlanMismatchError: They are not.
    """
    if not isinstance(getattr(model, "_fitcompress_plan", None), Plan):
        raise PlanMismatchError(
            "the weights of this model are no codes",
            got=type(model).__name__,
            wanted="what apply, compress or load(…, trainable=True) returned",
            fix="give the packed file: export_onnx(…, packed=FILE)",
        )


def check_sums(sums: int, layers: Sequence[ExportedLayer]) -> None:
    """Raise unless any sum was brought to integers, as ``integer_sums`` asks.

    Raises:
        OptionError: None was.
    """
    if sums:
        return
    fitting = sum(x.weight == "INT8" and x.input == "UINT8" for x in layers)
    raise OptionError(
        "integer_sums finds no sum that integers could compute",
        got=f"{fitting} of {len(layers)} layers with INT8 weights and UINT8 inputs",
        wanted="a convolution of these that a shortcut is added to",
        fix="quantize inputs to 8 bits, write 4-bit weights with min_bits=8, or leave "
        "integer_sums out",
    )
