"""Compensate one layer, given what it answers in the dense network and reads now."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fitcompress.compensate.statistics import gather_outputs, position_skip
from fitcompress.compensate.sweep import Quantized, quantize
from fitcompress.compensate.target import LARGE
from fitcompress.errors import CalibrationError

if TYPE_CHECKING:
    import torch

    from fitcompress.compensate.dense_pass import Answers
    from fitcompress.compensate.lockstep import Reached
    from fitcompress.compensate.options import Compensation
    from fitcompress.compensate.outlets import Outlet
    from fitcompress.compensate.residuals import Residual
    from fitcompress.compensate.statistics import Moments
    from fitcompress.model import Layer
    from fitcompress.search.plan import Level

__all__ = ["Now", "compensated"]


class Now:
    """What a layer is to answer with its inputs in the network compressed so far.

    Args:
        layer: Of the dense network.
        dense: Its answers there, with what is added to them.
        reached: Its inputs now, and what is added to its outputs.
        residual: How that counts, or None.
    """

    def __init__(
        self,
        layer: Layer,
        dense: Answers,
        reached: Reached,
        residual: Residual | None,
    ) -> None:
        self.inputs, self._added = reached.inputs, reached.added
        self._layer, self._dense, self._residual = layer, dense, residual

    def wanted(self, number: int) -> torch.Tensor:
        """Return what the layer is to answer to a batch.

        Raises:
            CalibrationError: What is added to its outputs in the dense network is not
                there now.
        """
        y, summed = self._dense[number]
        if not summed:
            return y
        share = None
        if self._added is not None and self._residual is not None:
            share = self._residual.share(self._layer, self._added[number])
        if share is None or share.shape != y.shape:
            raise CalibrationError(
                f"the sum that layer {self._layer.name!r} is part of is another one in "
                "the compressed network",
                wanted="a way through the model that its weights do not change",
                fix="pass Compensation(residual=False)",
            )
        return y - share


def compensated(
    layer: Layer,
    level: Level,
    now: Now,
    held_out: list[bool],
    options: Compensation,
    outlet: Outlet,
    *,
    importance: torch.Tensor | None = None,
    widen: float = 1.0,
) -> Quantized:
    """Return the codes of a layer.

    Args:
        layer: Of the dense network.
        level: Where its weights are to lie.
        now: Its inputs, and what it is to answer.
        held_out: Whether each batch is kept from the fit of corrections, to judge them.
        options: What compensation does.
        outlet: Where its outputs can be shifted or scaled.
        importance: What the mask keeps the largest of, [rows, columns], or None.
        widen: Factor on the scales of fixed-point levels.

    Raises:
        NonFiniteError: An input is NaN or infinite.
        CalibrationError: The inputs are degenerate.
    """
    judged = options.drift is None and layer.columns < LARGE
    held = [n for n, out in enumerate(held_out) if out and judged]
    fit_on = [n for n in range(len(now.inputs)) if n not in held]
    skip = position_skip(layer, now.inputs)

    def gathered(numbers: list[int]) -> Moments:
        outputs = (now.wanted(n) for n in numbers)
        return gather_outputs(
            layer, outputs, [now.inputs[n] for n in numbers], skip=skip
        )

    if judged and not held:  # too few to tell a correction from noise
        options = replace(options, drift=0.0)
    return quantize(
        layer.matrix(),
        gathered(fit_on),
        gathered(held) if held else None,
        level,
        options,
        biased=outlet.module is not None,
        scalable=outlet.norm,
        importance=importance,
        widen=widen,
        name=layer.name,
    )
