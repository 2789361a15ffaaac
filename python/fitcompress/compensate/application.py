"""``apply``: a compressed copy of a network at the levels of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fitcompress.compensate.compressor import Compressor
from fitcompress.compensate.size_fit import fit
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn

    from fitcompress.compensate.options import Compensation
    from fitcompress.search.plan import Plan
    from fitcompress.sensitivity.mask_rules import MaskRule

__all__ = ["apply"]


def apply(
    model: nn.Module,
    plan: Plan,
    calibrate: Iterable[Any] | None = None,
    *,
    samples: int | None = 1024,
    compensation: Compensation | None = None,
    masks: MaskRule | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Return a compressed copy of ``model`` with every layer at its level of ``plan``.

    With calibration data, each layer's rounding errors are compensated by its later
    weights, by the bias or norm that follows, and by the layers after it (see
    ``compensate.sweep``); without, weights are rounded to the nearest level, which
    costs far more accuracy. Norms are folded to two numbers per channel and, like
    biases, rounded to 16 bits.

    Where the plan has activation bits, the inputs of layers are quantized as well, with
    ranges of least squared error over the calibration data as they pass through the
    compressed network.

    If the plan bounds the bytes of the file, all entropy-coded steps are scaled by
    about one factor until the packed file uses the budget and does not exceed it. Of a
    plan that has only fixed-point levels the scales are widened if it would.

    Args:
        model: The trained network; unchanged.
        plan: For this model.
        calibrate: Yields inputs or (inputs, …) from the training distribution, without
            labels, or mappings of named inputs; a thousand are plenty. A sample of text
            is a whole sequence; positions that its ``attention_mask`` leaves out do not
            count, and those labelled −100 do, as others read them.
        samples: How many to use, None for all.
        compensation: What compensation does; None for the defaults.
        masks: What masks drop: of every layer the share that its level says, in the
            order of a rule of :mod:`fitcompress.masks` for the dense weights; what is
            left is refitted if there are calibration data. None: with calibration data
            what the others make up for best, in rounds with refits between them;
            without, the smallest |θ|. A plan that says which filters to keep, in its
            details, brings its own rule.
        checkpoint: File to save progress to and resume from; removed at the end.
        progress: Show a bar with the time left.

    Returns:
        A copy with the same module types in eval mode, its weights on their grids.
        Quantizers of activations that ``model`` had are gone.

    Raises:
        PlanMismatchError: The plan or the rule for masks is for another model.
        OptionError: ``masks`` is no rule.
        BudgetExceededError: The packed file cannot meet the plan's budget.
        NonFiniteError: A weight, an input or an activation is NaN or infinite.
        EmptyLoaderError: ``calibrate`` yields nothing.
        CalibrationError: A layer is never reached, the model mixes the samples of a
            batch, or there are no data for the activation bits of the plan.
        UnsupportedLayerError: The plan has activation bits for an embedding.
    """
    compressor = Compressor(
        model,
        plan,
        calibrate,
        samples=samples,
        compensation=compensation,
        masks=masks,
        checkpoint=checkpoint,
        progress=progress,
    )
    with threads(FIXED):
        small = fit(compressor, plan)
    compressor.attempts.forget()
    return small
