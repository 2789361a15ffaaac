"""``calibrate``: fit a table to the loss rises of whole random plans."""

from __future__ import annotations

import logging
import zlib
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fitcompress.compensate.calibration import prepare
from fitcompress.compensate.compressor import Compressor
from fitcompress.compensate.options import Compensation
from fitcompress.data.batches import batch_size, digest
from fitcompress.errors import OptionError
from fitcompress.model import check_finite, compressible_layers, fingerprint
from fitcompress.model.copies import copy_of
from fitcompress.quantize import remove
from fitcompress.refinement.checks import check_batches, check_layers
from fitcompress.refinement.plan_fit import Drawn, fit_plans, squared_error
from fitcompress.refinement.plan_losses import (
    TINY,
    float_inputs,
    plan_loss_rises,
    worker_count,
)
from fitcompress.refinement.progress_file import ProgressFile
from fitcompress.refinement.random_plans import draw_inputs, draw_plans, families
from fitcompress.search.plan import Level, Plan
from fitcompress.sensitivity.mask_rules import check_rule
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from torch import nn

    from fitcompress.model import Layer
    from fitcompress.search.problem import Family
    from fitcompress.sensitivity.mask_rules import MaskRule
    from fitcompress.sensitivity.table import Sensitivity

__all__ = ["LEAST_PLANS", "calibrate"]

logger = logging.getLogger(__name__)
LEAST_PLANS = 8


def calibrate(
    sensitivity: Sensitivity,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    plans: int = 64,
    samples: int = 1024,
    temperature: float = 4.0,
    compensation: Compensation | None = Compensation(),  # noqa: B008
    masks: MaskRule | None = None,
    family: Family = "any",
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Return the table fitted to what whole random plans do to the outputs.

    A table of single layers does not know what becomes of a layer's error in a network
    that is compressed everywhere: compensation lets later layers repair the errors of
    earlier ones, some nearly whole and others not at all. So random plans are applied,
    as :func:`fitcompress.apply` would, their outputs compared with those of the dense
    network, and a factor for every layer, and for the mask of every layer, is fitted
    (``refinement.regression``):

        D'_l(g, s) = a_l B_l(g, 0) + b_l (B'_l(g, s) − B'_l(g, 0))   in nats,

    B and B' the table, the squared error ½ Σ_j (θ_j − θ̂_j)² of rounded weights, the
    geometric mean of both, or for steps ½ n_l Δ²/12: those that predict plans they were
    not fitted to best, with factors as nearly alike as that allows. How well that is,
    is in ``provenance["calibrated"]`` and in the log. Each family of grids has plans
    and factors of its own.

    If the table has activation bits, every fixed-point plan is measured a second time
    with random bits for the inputs of its layers, and their distortions get factors as
    well: D'_l(a) = c_l D_l(a). Without that, a search on bit operations holds what
    rounded weights would cost, several times too much once they are compensated,
    against what inputs do cost.

    Costs ``plans`` times an ``apply`` with half of the samples and a forward pass over
    the other half, for each family; as many plans at the same time as torch has
    threads, with the same result for any number of them.

    Args:
        sensitivity: What :func:`fitcompress.measure` or :func:`fitcompress.refine`
            returned for this model.
        model: The trained network, a classifier; unchanged.
        loader: Yields inputs or (inputs, …), without labels.
        plans: Random plans of each family; two for each layer are plenty.
        samples: Inputs to use; every other batch of them is compensated with, the rest
            is what the loss rise is measured on.
        temperature: τ of the softened divergence that tells plans apart, see
            :func:`fitcompress.refine`.
        compensation: How plans are compensated; None: weights are rounded.
        masks: Order in which masks drop weights, as for :func:`fitcompress.apply`.
        family: Grids to fit: ``"bits"``, ``"step"`` or ``"any"`` that the table has.
        seed: Draws the plans.
        checkpoint: File to save progress to and resume from; removed at the end.
        progress: Show a bar with the time left.

    Raises:
        PlanMismatchError: The sensitivity is that of another model.
        OptionError: Fewer than eight plans, or another option makes no sense.
        EmptyLoaderError: The loader yields nothing.
        CalibrationError: There are fewer than two batches, or samples of a batch are
            mixed.
        NonFiniteError: A weight, an input or an output is NaN or infinite.
        DataError: The model's outputs are no logits.
    """
    _check_options(plans, samples, temperature)
    file = ProgressFile(checkpoint)
    check_finite(model)
    dense = remove(copy_of(model), activations=True).eval()
    layers = compressible_layers(dense)
    check_layers(sensitivity, {layer.name: layer for layer in layers})
    if masks is not None:
        check_rule(masks, layers)
    kinds = [kind for kind in families(sensitivity) if family in (kind, "any")]
    if not kinds:
        raise OptionError(
            f"the sensitivity has no grid of family {family!r}",
            got=", ".join(families(sensitivity)),
            wanted="step, bits or any, and grids of that family",
        )
    drawn = {
        kind: Drawn(
            *draw_plans(sensitivity, kind, plans, seed),
            inputs=draw_inputs(sensitivity, kind, plans, seed),
        )
        for kind in kinds
    }
    every = [
        plan for kind in kinds for plan in _plans(sensitivity, layers, drawn[kind])
    ]
    workers = worker_count(model)
    with threads(FIXED), torch.no_grad():
        modules = {layer.name: layer.module for layer in layers}
        batches = prepare(dense, modules, loader, samples).batches
        check_batches(batches)
        crc = zlib.crc32(repr([plan.to_json() for plan in every]).encode())
        options = None if compensation is None else asdict(compensation)
        crc = zlib.crc32(repr((options, temperature)).encode(), crc)
        crc = zlib.crc32((masks.digest() if masks else "").encode(), crc)
        for x in batches:
            crc = digest(x, crc)
        file.belongs_to(f"{fingerprint(dense, layers)}-{crc:08x}")
        compressor = Compressor(
            dense,
            float_inputs(every[0]),
            None if compensation is None else batches[::2],
            compensation=compensation,
            masks=masks,
            progress=False,
        )
    with threads(1), torch.no_grad():  # of every worker
        plain, soft = plan_loss_rises(
            compressor,
            every,
            batches[::2],
            batches[1::2],
            temperature,
            file,
            workers=workers,
            progress=progress,
        )
    squared = squared_error(layers, sensitivity, masks)
    distortion, report = sensitivity.distortion.copy(), {}
    inputs = sensitivity.activation_distortion
    for number, kind in enumerate(kinds):
        begin, stages = number * plans, drawn[kind].stages
        rises, softened = (y[begin : begin + plans, :stages] for y in (plain, soft))
        rows = np.array([g.family == kind for g in sensitivity.grids])
        fit = fit_plans(sensitivity, kind, squared, drawn[kind], softened)
        in_nats = rises.sum() / max(softened.sum(), TINY)
        distortion[:, rows] = fit.distortion[:, rows] * in_nats
        if stages > 1:
            inputs = fit.inputs * in_nats
        report[kind] = fit.report
        logger.info("calibrate, %s: %s", kind, report[kind])
    result = replace(
        sensitivity,
        distortion=distortion,
        activation_distortion=inputs,
        provenance={
            **sensitivity.provenance,
            "calibrated": {
                "errors": "compensated" if compensation else "rounded",
                "temperature": temperature,
                "samples": sum(map(batch_size, batches[1::2])),
                **report,
            },
        },
    )
    file.forget()
    return result


def _check_options(plans: int, samples: int, temperature: float) -> None:
    for name, value, least in (("plans", plans, LEAST_PLANS), ("samples", samples, 2)):
        if type(value) is not int or value < least:
            raise OptionError(name, got=value, wanted=f"an integer from {least} on")
    if not 1 <= temperature <= 1e3:
        raise OptionError("temperature", got=temperature, wanted="1 to 1000")


def _plans(table: Sensitivity, layers: Sequence[Layer], drawn: Drawn) -> list[Plan]:
    """Return plans of chosen cells, in the order of the model."""
    place = {name: i for i, name in enumerate(table.names)}
    inputs = np.zeros_like(drawn.grids) if drawn.inputs is None else drawn.inputs
    cells = (drawn.grids, drawn.masks, inputs)
    return [
        Plan(
            {
                layer.name: Level(
                    table.grids[grid[i]],
                    float(table.sparsity[i, sparsity[i]]),
                    tuple(layer.shape),
                    activation_bits=table.activation_bits[width[i]],
                )
                for layer in layers
                for i in (place[layer.name],)
            },
            method="random",
        )
        for grid, sparsity, width in zip(*cells, strict=True)
    ]
