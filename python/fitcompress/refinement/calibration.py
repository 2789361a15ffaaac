"""``calibrate``: fit a table to the loss rises of whole random plans."""

from __future__ import annotations

import logging
import zlib
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fitcompress import ops
from fitcompress.compensate.calibration import prepare
from fitcompress.compensate.compressor import Compressor
from fitcompress.compensate.options import Compensation
from fitcompress.compensate.size_fit import Pace
from fitcompress.data.batches import batch_size, digest
from fitcompress.errors import NonFiniteError, OptionError
from fitcompress.model import check_finite, compressible_layers, fingerprint
from fitcompress.model.copies import copy_of
from fitcompress.model.forward import call_model
from fitcompress.model.positions import counted
from fitcompress.progress import Bar
from fitcompress.quantize import remove
from fitcompress.refinement.checks import check_batches, check_layers
from fitcompress.refinement.divergences import log_probabilities, softened_divergence
from fitcompress.refinement.progress_file import ProgressFile
from fitcompress.refinement.random_plans import draw_plans, families
from fitcompress.refinement.regression import (
    Fit,
    cross_validated,
    rank_correlation,
    simplest,
)
from fitcompress.search.plan import Level, Plan
from fitcompress.sensitivity.mask_rules import check_rule, importance_of
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from fitcompress.model import Layer
    from fitcompress.search.problem import Family
    from fitcompress.sensitivity.mask_rules import MaskRule
    from fitcompress.sensitivity.table import Sensitivity

    Reals = NDArray[np.float64]
    Cells = tuple[NDArray[np.int64], NDArray[np.int64]]

__all__ = ["LEAST_PLANS", "calibrate"]

logger = logging.getLogger(__name__)
LEAST_PLANS = 8
TINY = 1e-30


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

    Costs ``plans`` times an ``apply`` with half of the samples and a forward pass over
    the other half, for each family.

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
    drawn = {kind: draw_plans(sensitivity, kind, plans, seed) for kind in kinds}
    every = [
        plan for kind in kinds for plan in _plans(sensitivity, layers, drawn[kind])
    ]
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
            every[0],
            None if compensation is None else batches[::2],
            compensation=compensation,
            masks=masks,
            progress=False,
        )
        plain, soft = _loss_rises(
            compressor, every, batches[1::2], temperature, file, progress=progress
        )
    squared = _squared_error(layers, sensitivity, masks)
    distortion, report = sensitivity.distortion.copy(), {}
    for number, kind in enumerate(kinds):
        own = slice(number * plans, (number + 1) * plans)
        rows = np.array([g.family == kind for g in sensitivity.grids])
        fitted, report[kind] = _fitted(
            sensitivity, kind, squared, drawn[kind], soft[own]
        )
        in_nats = plain[own].sum() / max(soft[own].sum(), TINY)
        distortion[:, rows] = fitted[:, rows] * in_nats
        logger.info("calibrate, %s: %s", kind, report[kind])
    result = replace(
        sensitivity,
        distortion=distortion,
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


def _plans(table: Sensitivity, layers: Sequence[Layer], cells: Cells) -> list[Plan]:
    """Return plans of chosen cells, in the order of the model."""
    place = {name: i for i, name in enumerate(table.names)}
    return [
        Plan(
            {
                layer.name: Level(
                    table.grids[grid[i]],
                    float(table.sparsity[i, sparsity[i]]),
                    tuple(layer.shape),
                )
                for layer in layers
                for i in (place[layer.name],)
            },
            method="random",
        )
        for grid, sparsity in zip(*cells, strict=True)
    ]


def _loss_rises(
    compressor: Compressor,
    plans: list[Plan],
    measured: list[Any],
    temperature: float,
    file: ProgressFile,
    *,
    progress: bool,
) -> tuple[Reals, Reals]:
    """Return KL and softened KL of every plan, [P] each."""
    heats = (1.0, temperature)
    dense = compressor.model
    before = [
        [log_probabilities(call_model(dense, x), t, counted(dense, x)) for t in heats]
        for x in measured
    ]
    rows = sum(len(each[0]) for each in before)
    done, sums = file.load((len(plans), len(heats)))
    samples = sum(map(batch_size, measured))
    title = f"calibrate: {len(plans)} plans, {samples} inputs each"
    with Bar(title, len(plans), enabled=progress) as bar:
        bar.advance(done)
        for number, plan in enumerate(plans[done:], done):
            small = compressor.with_plan(plan).at(Pace("layers", 1.0))
            for x, known in zip(measured, before, strict=True):
                output = call_model(small, x)
                for h, t in enumerate(heats):
                    after = log_probabilities(output, t, counted(small, x))
                    sums[number, h] += softened_divergence(known[h], after, t)
            file.save(number + 1, sums)
            bar.advance()
    if not bool(torch.isfinite(sums).all()):
        raise NonFiniteError(
            "an output is NaN or infinite",
            wanted="finite logits",
            fix="look for overflow in half precision",
        )
    plain, soft = (sums / rows).clamp_min(0.0).numpy().T
    return plain, np.maximum(soft, TINY)


def _squared_error(
    layers: Sequence[Layer], table: Sensitivity, masks: MaskRule | None
) -> Reals:
    """Return ½ Σ (θ − θ̂)² of all cells, [L, G, S]."""
    bits = [g.bits for g in table.grids if g.bits is not None]
    steps = [g.step for g in table.grids if g.step is not None]
    by_name = {layer.name: layer for layer in layers}
    return np.stack(
        [
            ops.distortion_table(
                by_name[name].matrix(),
                None,
                bits,
                steps,
                shares.tolist(),
                importance=None
                if masks is None
                else importance_of(masks, by_name[name]),
            ).distortion.numpy()
            for name, shares in zip(table.names, table.sparsity, strict=True)
        ]
    )


def _bases(table: Sensitivity, kind: str, squared: Reals) -> dict[str, Reals]:
    """Return what D' may be proportional to in a layer, [L, G, S] each."""
    bases = {
        "table": table.distortion,
        "squared error": squared,
        "both": np.sqrt(table.distortion * squared),
    }
    if kind == "step":
        steps = np.array([grid.step or 0.0 for grid in table.grids])
        law = table.sizes[:, None, None] * np.square(steps)[:, None] / 24
        bases["step law"] = np.broadcast_to(law, squared.shape)
    return bases


def _fitted(
    table: Sensitivity, kind: str, squared: Reals, cells: Cells, y: Reals
) -> tuple[Reals, dict[str, Any]]:
    """Return the table of the best bases, in the units of y, and how well it fits."""
    layers = np.arange(len(table.names))
    grids, masks = cells
    bases = _bases(table, kind, squared)
    plain = {name: base[:, :, :1] for name, base in bases.items()}
    rest = {name: np.maximum(base - plain[name], 0.0) for name, base in bases.items()}
    masked = bool(masks.any())
    pairs = [(a, b) for a in bases for b in (bases if masked else (a,))]
    groups = np.repeat([0, 1][: 1 + masked], len(layers))
    fits: list[Fit] = []
    origins: list[tuple[str, str]] = []
    for one, other in pairs:
        columns = [plain[one][layers, grids, 0], rest[other][layers, grids, masks]]
        x = np.concatenate(columns[: 1 + masked], axis=1)
        if not (x > 0).any(1).all():
            continue
        found = cross_validated(x, y, groups)
        fits += found
        origins += [(one, other)] * len(found)
    if not fits:  # nothing hurts: zero weights
        return table.distortion, {"plans": len(y), "base": "none"}
    chosen = simplest(fits)
    fit, (one, other) = fits[chosen], origins[chosen]
    a = fit.factors[: len(layers), None, None]
    b = fit.factors[-len(layers) :, None, None]
    before = table.distortion[layers, grids, masks].sum(1)
    report = {
        "plans": len(y),
        "base": one,
        "ridge": fit.ridge,
        "spearman_before": rank_correlation(before, y),
        "spearman": rank_correlation(fit.predicted, y),
        "log_error": fit.error,
        "factors": _relative(a),
    }
    if masked:
        report |= {"mask_base": other, "mask_factors": _relative(b)}
    return a * plain[one] + b * rest[other], report


def _relative(factors: Reals) -> list[float]:
    """Return factors over their geometric mean."""
    logs = np.log(factors.ravel())
    return [float(f) for f in np.exp(logs - logs.mean()).round(4)]
