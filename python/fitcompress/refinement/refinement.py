"""``refine``: correct a table by what levels and plans really do to the outputs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fitcompress.compensate.options import Compensation
from fitcompress.data.batches import batch_size, take
from fitcompress.errors import OptionError
from fitcompress.refinement.anchors import anchors
from fitcompress.refinement.calibration import LEAST_PLANS, calibrate
from fitcompress.refinement.measured import measure_levels
from fitcompress.refinement.progress_file import ProgressFile
from fitcompress.refinement.random_plans import families

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn

    from fitcompress.search.problem import Family
    from fitcompress.sensitivity.mask_rules import MaskRule
    from fitcompress.sensitivity.table import Sensitivity

__all__ = ["Refinement", "refine"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refinement:
    """What a refinement measures.

    Attributes:
        samples: Inputs to use; every other batch of them is compensated with, the rest
            is what the loss rise is measured on.
        grids: How many grids of each family are measured in single layers before; the
            others follow. 0: none. It ranks plans no better where these are compensated
            and plans are measured, but rounded ones without.
        sparsities: How many sparsities, on the finest grid of the first family.
        plans: Random plans of each family that the table is fitted to afterwards, see
            :func:`fitcompress.calibrate`. 0: none.
        family: Grids that plans are drawn from; None: fixed-point ones if there are
            any. For entropy-coded steps nothing was gained by it.
        temperature: τ of the softened divergence that tells layers and plans apart; 1
            for the plain one. The mean is that of the plain one in any case.
        compensation: How errors are compensated, None: weights are rounded.
    """

    samples: int = 1024
    grids: int = 0
    sparsities: int = 3
    plans: int = 40
    family: Family | None = None
    temperature: float = 4.0
    compensation: Compensation | None = field(default_factory=Compensation)

    def __post_init__(self) -> None:
        bounds = (("samples", 2), ("grids", 0), ("sparsities", 0), ("plans", 0))
        for name, least in bounds:
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise OptionError(name, got=value, wanted=f"an integer from {least} on")
        if 0 < self.plans < LEAST_PLANS:
            wanted = f"0, or an integer from {LEAST_PLANS} on"
            raise OptionError("plans", got=self.plans, wanted=wanted)
        if not 1 <= self.temperature <= 1e3:
            raise OptionError("temperature", got=self.temperature, wanted="1 to 1000")

    def forward_passes(self, sensitivity: Sensitivity) -> int:
        """Return how many forward passes over half of the samples this takes.

        One for each layer and level, from that layer on, and one for each plan.
        Compensation comes on top: two passes over the other half of the samples for all
        levels of all layers, and two for each plan.
        """
        levels = 0
        if self.grids:
            levels = len(anchors(sensitivity, self.grids, self.sparsities))
        kinds = families(sensitivity)
        wanted = self.family_of(sensitivity)
        plans = self.plans * sum(wanted in (kind, "any") for kind in kinds)
        return levels * len(sensitivity.names) + plans

    def family_of(self, sensitivity: Sensitivity) -> Family:
        """Return the grids that plans of a table are drawn from."""
        usual: Family = "bits" if "bits" in families(sensitivity) else "step"
        return self.family or usual

    def correct(
        self,
        sensitivity: Sensitivity,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        masks: MaskRule | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> Sensitivity:
        """Return the table corrected, see :func:`refine`."""
        return refine(
            sensitivity,
            model,
            loader,
            refinement=self,
            masks=masks,
            checkpoint=checkpoint,
            progress=progress,
        )


def refine(
    sensitivity: Sensitivity,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    refinement: Refinement | None = None,
    masks: MaskRule | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Return the table with its distortions corrected by measured loss rises.

    The Fisher table knows neither how errors add up within a layer nor what
    compensation makes of them. So it is fitted to whole random plans, in which layers
    repair each other's errors: see :func:`fitcompress.calibrate`.

    With ``Refinement(grids=…)`` every layer alone is put on some of its levels before,
    as :func:`fitcompress.apply` would make them, and the outputs are compared with
    those of the dense network,

        D̂_l = KL_τ,l · Σ_l' KL_1,l' / Σ_l' KL_τ,l'   in nats,

    KL_τ the divergence softened by a temperature τ (``refinement.divergences``): all
    samples tell layers apart, not just the few that the network is unsure of.
    All other levels follow by interpolation (``refinement.anchors``). Costs one
    forward pass a layer and level, from that layer on.

    On data that the network has memorised, loss rises come out several times too small,
    for all layers alike as far as was measured; held-out inputs give them in true nats.

    Args:
        sensitivity: What :func:`fitcompress.measure` returned for this model.
        model: The trained network, a classifier; unchanged.
        loader: Yields inputs or (inputs, …), without labels; iterated once.
        refinement: What to measure; None for the defaults.
        masks: Order in which masks drop weights, as for :func:`fitcompress.apply`.
        checkpoint: File to save progress to and resume from, beside it one with
            ``.plans`` appended; removed at the end.
        progress: Show bars with the time left.

    Raises:
        PlanMismatchError: The sensitivity is that of another model.
        EmptyLoaderError: The loader yields nothing.
        CalibrationError: There are fewer than two batches, a layer is never reached, or
            samples of a batch are mixed.
        NonFiniteError: A weight, an input or an output is NaN or infinite.
        DataError: The model's outputs are no logits.
    """
    options = refinement or Refinement()
    inputs = [x for x, _ in take(loader, options.samples)]
    file = ProgressFile(checkpoint)
    logger.info(
        "refine: %d forward passes over %d samples",
        options.forward_passes(sensitivity),
        sum(map(batch_size, inputs)) // 2,
    )
    if options.grids:
        sensitivity = measure_levels(
            sensitivity,
            model,
            inputs,
            options,
            masks=masks,
            file=file,
            progress=progress,
        )
    if options.plans:
        sensitivity = calibrate(
            sensitivity,
            model,
            inputs,
            plans=options.plans,
            samples=options.samples,
            temperature=options.temperature,
            compensation=options.compensation,
            masks=masks,
            family=options.family_of(sensitivity),
            checkpoint=None if checkpoint is None else f"{checkpoint}.plans",
            progress=progress,
        )
    file.forget()
    return sensitivity
