"""What single layers at single levels, all others dense, do to the outputs."""

from __future__ import annotations

import zlib
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fitcompress.compensate.calibration import prepare
from fitcompress.compensate.levels import level_weights, swapped
from fitcompress.compensate.lockstep import Lockstep, not_reached
from fitcompress.compensate.outlets import find_outlets
from fitcompress.data.batches import batch_size, digest, part
from fitcompress.errors import NonFiniteError
from fitcompress.model import check_finite, compressible_layers, fingerprint
from fitcompress.model.copies import copy_of
from fitcompress.model.positions import counted
from fitcompress.model.replay import Replay
from fitcompress.progress import Bar
from fitcompress.quantize import fold_norms_, remove, round_leftovers_
from fitcompress.refinement.anchors import anchors, corrected
from fitcompress.refinement.checks import check_batches, check_layers
from fitcompress.refinement.divergences import log_probabilities, softened_divergence
from fitcompress.search.plan import Level
from fitcompress.sensitivity.mask_rules import check_rule
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from fitcompress.compensate.outlets import Outlet
    from fitcompress.compensate.sweep import Quantized
    from fitcompress.model import Layer
    from fitcompress.refinement.anchors import Cell
    from fitcompress.refinement.progress_file import ProgressFile
    from fitcompress.refinement.refinement import Refinement
    from fitcompress.sensitivity.mask_rules import MaskRule
    from fitcompress.sensitivity.table import Sensitivity

__all__ = ["measure_levels"]


def measure_levels(
    sensitivity: Sensitivity,
    model: nn.Module,
    loader: Iterable[Any],
    options: Refinement,
    *,
    masks: MaskRule | None,
    file: ProgressFile,
    progress: bool,
) -> Sensitivity:
    """Return the table with its distortions corrected by those of single layers.

    Args:
        sensitivity: Of this model.
        model: In any mode; unchanged.
        loader: Inputs.
        options: What to measure.
        masks: Order in which masks drop weights.
        file: Where sums over batches are kept.
        progress: Show a bar.

    Raises:
        FitcompressError: As :func:`fitcompress.refine` does.
    """
    check_finite(model)
    dense = remove(copy_of(model), activations=True).eval()
    layers = {layer.name: layer for layer in compressible_layers(dense)}
    check_layers(sensitivity, layers)
    if masks is not None:
        check_rule(masks, layers.values())
    cells = anchors(sensitivity, options.grids, options.sparsities)
    with threads(FIXED), torch.no_grad():
        modules = {name: layer.module for name, layer in layers.items()}
        batches = prepare(dense, modules, loader, options.samples).batches
        check_batches(batches)
        folded = copy_of(dense)
        fold_norms_(folded)
        round_leftovers_(folded, [layer.weight for layer in layers.values()])
        outlets = find_outlets(
            folded, list(layers.values()), part(batches[0], slice(16))
        )
        made = _level_weights(
            dense,
            layers,
            outlets,
            batches[::2],
            sensitivity,
            cells,
            options,
            masks,
            progress,
        )
        crc = zlib.crc32(_described(sensitivity, cells, options, masks).encode())
        for x in batches:
            crc = digest(x, crc)
        file.belongs_to(f"{fingerprint(dense, list(layers.values()))}-{crc:08x}")
        rises = _loss_rises(
            folded, layers, outlets, batches[1::2], made, options, file, progress
        )
    order = {name: i for i, name in enumerate(layers)}
    rows = [order[name] for name in sensitivity.names]
    measured = {cell: rises[rows, i] for i, cell in enumerate(cells)}
    return replace(
        sensitivity,
        distortion=corrected(sensitivity, measured),
        provenance={
            **sensitivity.provenance,
            "refined": {
                "errors": "compensated" if options.compensation else "rounded",
                "temperature": options.temperature,
                "samples": sum(map(batch_size, batches[1::2])),
                "cells": [list(cell) for cell in cells],
            },
        },
    )


def _described(
    table: Sensitivity, cells: list[Cell], options: Refinement, masks: MaskRule | None
) -> str:
    """Name all that the sums depend on besides model and inputs."""
    levels = [(str(table.grids[g]), table.sparsity[:, s].tolist()) for g, s in cells]
    return repr((asdict(options), levels, masks.digest() if masks else None))


def _level_weights(
    dense: nn.Module,
    layers: dict[str, Layer],
    outlets: dict[str, Outlet],
    batches: list[Any],
    table: Sensitivity,
    cells: list[Cell],
    options: Refinement,
    masks: MaskRule | None,
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
                raise not_reached(layers, made)
            name, inputs, _ = reached
            layer = layers[name]
            shares = table.sparsity[place[name]]
            levels = [
                Level(table.grids[g], float(shares[s]), layer.shape) for g, s in cells
            ]
            made[name] = level_weights(
                layer,
                levels,
                inputs,
                outlets[name],
                options.compensation,
                masks=masks,
            )
            bar.advance(note=name)
    return made


def _loss_rises(
    folded: nn.Module,
    layers: dict[str, Layer],
    outlets: dict[str, Outlet],
    batches: list[Any],
    made: dict[str, list[Quantized]],
    options: Refinement,
    file: ProgressFile,
    progress: bool,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return D̂ of every layer and cell, [L, cells]."""
    names = {name: [name, *(n for n, _ in each.tied)] for name, each in layers.items()}
    modules = {n: folded.get_submodule(n) for own in names.values() for n in own}
    heats = (1.0, options.temperature)
    count = len(next(iter(made.values())))
    done, sums = file.load((len(heats), len(layers), count))
    total, rows = len(batches) * len(layers) * count, 0
    passes, samples = len(layers) * count, sum(map(batch_size, batches))
    title = f"refine: {passes} forward passes over {samples} inputs"
    with Bar(title, total, enabled=progress) as bar:
        bar.advance(done * len(layers) * count)
        for number, x in enumerate(batches):
            with Replay(folded, modules, x) as replay:
                mask = counted(folded, x)
                before = [log_probabilities(replay.output, t, mask) for t in heats]
                rows += len(before[0])
                if number < done:
                    continue
                for i, (name, layer) in enumerate(layers.items()):
                    for k, weights in enumerate(made[name]):
                        with swapped(folded, layer, weights, outlets[name]):
                            output = replay.run_from(*names[name])
                        for h, t in enumerate(heats):
                            after = log_probabilities(output, t, mask)
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
