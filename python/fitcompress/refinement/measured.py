"""``refine``: correct a table by what single levels really do to the outputs."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fitcompress.compensate.calibration import prepare
from fitcompress.compensate.levels import level_weights, swapped
from fitcompress.compensate.lockstep import Lockstep
from fitcompress.compensate.options import Compensation
from fitcompress.compensate.outlets import find_outlets
from fitcompress.data.batches import digest
from fitcompress.errors import (
    CalibrationError,
    NonFiniteError,
    OptionError,
    PlanMismatchError,
)
from fitcompress.model import check_finite, compressible_layers, fingerprint
from fitcompress.model.copies import copy_of
from fitcompress.model.replay import Replay
from fitcompress.progress import Bar
from fitcompress.quantize import fold_norms_, remove, round_leftovers_
from fitcompress.refinement.anchors import anchors, corrected
from fitcompress.refinement.divergences import log_probabilities, softened_divergence
from fitcompress.refinement.progress_file import ProgressFile
from fitcompress.search.plan import Level
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn

    from fitcompress.compensate.outlets import Outlet
    from fitcompress.compensate.sweep import Quantized
    from fitcompress.model import Layer
    from fitcompress.refinement.anchors import Cell
    from fitcompress.sensitivity.table import Sensitivity

__all__ = ["Refinement", "refine"]


@dataclass(frozen=True)
class Refinement:
    """What a refinement measures.

    Attributes:
        samples: Inputs to use; every other batch of them is compensated with, the rest
            is what the loss rise is measured on.
        grids: How many grids of each family are measured; the others follow.
        sparsities: How many sparsities, on the finest grid of the first family.
        temperature: τ of the softened divergence that tells layers apart; 1 for the
            plain one. The mean over the layers is that of the plain one in any case.
        compensation: How errors are compensated, None: weights are rounded.
    """

    samples: int = 1024
    grids: int = 6
    sparsities: int = 4
    temperature: float = 4.0
    compensation: Compensation | None = field(default_factory=Compensation)

    def __post_init__(self) -> None:
        for name, least in (("samples", 2), ("grids", 1), ("sparsities", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise OptionError(name, got=value, wanted=f"an integer from {least} on")
        if not 1 <= self.temperature <= 1e3:
            raise OptionError("temperature", got=self.temperature, wanted="1 to 1000")

    def correct(
        self,
        sensitivity: Sensitivity,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> Sensitivity:
        """Return the table corrected, see :func:`refine`."""
        return refine(
            sensitivity,
            model,
            loader,
            refinement=self,
            checkpoint=checkpoint,
            progress=progress,
        )


def refine(
    sensitivity: Sensitivity,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    refinement: Refinement | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Return the table with its distortions corrected by measured loss rises.

    The Fisher table knows neither how errors add up within a layer nor what
    compensation makes of them. Here every layer alone is put on some of its levels, as
    :func:`fitcompress.apply` would make them, and the outputs are compared with those
    of the dense network,

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
        loader: Yields inputs or (inputs, …), without labels.
        refinement: What to measure; None for the defaults.
        checkpoint: File to save progress to and resume from; removed at the end.
        progress: Show a bar with the time left.

    Raises:
        PlanMismatchError: The sensitivity is that of another model.
        EmptyLoaderError: The loader yields nothing.
        CalibrationError: There are fewer than two batches, a layer is never reached, or
            samples of a batch are mixed.
        NonFiniteError: A weight, an input or an output is NaN or infinite.
        DataError: The model's outputs are no logits.
    """
    options = refinement or Refinement()
    check_finite(model)
    dense = remove(copy_of(model), activations=True).eval()
    layers = {layer.name: layer for layer in compressible_layers(dense)}
    _check_layers(sensitivity, layers)
    cells = anchors(sensitivity, options.grids, options.sparsities)
    with threads(FIXED), torch.no_grad():
        modules = {name: layer.module for name, layer in layers.items()}
        batches = prepare(dense, modules, loader, options.samples).batches
        if len(batches) < 2:
            raise CalibrationError(
                "a refinement needs inputs to compensate with and others to measure on",
                got="one sample",
                wanted="at least two",
                fix="give more inputs",
            )
        folded = copy_of(dense)
        fold_norms_(folded)
        round_leftovers_(folded, [layer.weight for layer in layers.values()])
        outlets = find_outlets(folded, list(layers.values()), batches[0][:16])
        made = _level_weights(
            dense, layers, outlets, batches[::2], sensitivity, cells, options, progress
        )
        crc = zlib.crc32(repr((asdict(options), cells)).encode())
        for x in batches:
            crc = digest(x, crc)
        file = ProgressFile(
            checkpoint, f"{fingerprint(dense, list(layers.values()))}-{crc:08x}"
        )
        rises = _loss_rises(
            folded, layers, outlets, batches[1::2], made, options, file, progress
        )
    order = {name: i for i, name in enumerate(layers)}
    rows = [order[name] for name in sensitivity.names]
    measured = {cell: rises[rows, i] for i, cell in enumerate(cells)}
    result = replace(
        sensitivity,
        distortion=corrected(sensitivity, measured),
        provenance={
            **sensitivity.provenance,
            "refined": {
                "errors": "compensated" if options.compensation else "rounded",
                "temperature": options.temperature,
                "samples": sum(len(x) for x in batches[1::2]),
                "cells": [list(cell) for cell in cells],
            },
        },
    )
    file.forget()
    return result


def _check_layers(sensitivity: Sensitivity, layers: dict[str, Layer]) -> None:
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


def _level_weights(
    dense: nn.Module,
    layers: dict[str, Layer],
    outlets: dict[str, Outlet],
    batches: list[torch.Tensor],
    table: Sensitivity,
    cells: list[Cell],
    options: Refinement,
    progress: bool,
) -> dict[str, list[Quantized]]:
    """Return every layer at every cell, given the inputs of the dense network."""
    made: dict[str, list[Quantized]] = {}
    place = {name: i for i, name in enumerate(table.names)}
    modules = {name: layer.module for name, layer in layers.items()}
    with (
        Lockstep(dense, modules, batches) as passes,
        Bar("refine: weights at their levels", len(layers), enabled=progress) as bar,
    ):
        for _ in layers:
            reached = passes.advance()
            if reached is None:
                missing = next(name for name in layers if name not in made)
                raise CalibrationError(
                    f"the inputs never reach layer {missing!r}",
                    got=f"{len(made)} of {len(layers)} layers reached",
                    wanted="a forward pass that uses every compressible layer",
                    fix="give inputs that exercise it",
                )
            name, inputs = reached
            layer = layers[name]
            shares = table.sparsity[place[name]]
            levels = [
                Level(table.grids[g], float(shares[s]), layer.shape) for g, s in cells
            ]
            made[name] = level_weights(
                layer, levels, inputs, outlets[name], options.compensation
            )
            bar.advance(note=name)
    return made


def _loss_rises(
    folded: nn.Module,
    layers: dict[str, Layer],
    outlets: dict[str, Outlet],
    batches: list[torch.Tensor],
    made: dict[str, list[Quantized]],
    options: Refinement,
    file: ProgressFile,
    progress: bool,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return D̂ of every layer and cell, [L, cells]."""
    modules = {name: folded.get_submodule(name) for name in layers}
    heats = (1.0, options.temperature)
    count = len(next(iter(made.values())))
    done, sums = file.load((len(heats), len(layers), count))
    total, rows = len(batches) * len(layers) * count, 0
    with Bar("refine: loss rises", total, enabled=progress) as bar:
        bar.advance(done * len(layers) * count)
        for number, x in enumerate(batches):
            with Replay(folded, modules, x) as replay:
                before = [log_probabilities(replay.output, t) for t in heats]
                rows += len(before[0])
                if number < done:
                    continue
                for i, (name, layer) in enumerate(layers.items()):
                    for k, weights in enumerate(made[name]):
                        with swapped(folded, layer, weights, outlets[name]):
                            output = replay.run_from(name)
                        for h, t in enumerate(heats):
                            after = log_probabilities(output, t)
                            sums[h, i, k] += softened_divergence(before[h], after, t)
                        bar.advance(note=name)
            file.save(number + 1, sums)
    if not bool(torch.isfinite(sums).all()):
        raise NonFiniteError(
            "an output is NaN or infinite",
            wanted="finite logits",
            fix="look for overflow in half precision",
        )
    plain, soft = (sums / rows).clamp_min(0.0).numpy()
    scale = plain.sum(0) / np.maximum(soft.sum(0), np.finfo(float).tiny)
    return np.asarray(soft * scale)
