"""``measure``: Fisher moments of every layer, then the distortion of every level."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fitcompress import ops
from fitcompress.data.batches import digest, take
from fitcompress.files import check_writable
from fitcompress.model import Layer, check_finite, compressible_layers, fingerprint
from fitcompress.model.costs import count_macs, dense_bytes, overhead_bytes
from fitcompress.model.modes import evaluating
from fitcompress.progress import Bar
from fitcompress.sensitivity.checkpoint import load_moments, save_moments
from fitcompress.sensitivity.fisher import FisherEstimator, Moments, sampled_label_loss
from fitcompress.sensitivity.levels import (
    SPARSITIES,
    check_levels,
    default_grids,
    layer_sparsities,
)
from fitcompress.sensitivity.table import Grid, Sensitivity
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

__all__ = ["measure"]

SAVE_EVERY = 5.0  # seconds between checkpoints


def measure(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    *,
    samples: int | None = 512,
    grids: Sequence[Grid] | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Sensitivity:
    """Measure how much the loss rises for every level of every compressible layer.

    D_l(level) = ½ Σ_j F_j (θ_j − θ̂_j)² in nats, F the Fisher diagonal of the layer from
    exact per-sample gradients (Zandonati et al. 2022, arXiv 2210.08502). Costs about
    one forward and backward pass per sample and one pass over the weights per grid.

    Use data that the network has not memorised, augmented or held out: on memorised
    data the Fisher information is nearly gone and the ranking of plans suffers.

    Args:
        model: The trained network; unchanged afterwards.
        loader: Yields inputs or (inputs, targets).
        loss_fn: (output, targets) → loss averaged over the batch: empirical Fisher.
            None: cross-entropy with labels sampled from the model: true Fisher, no
            labels needed.
        samples: How many samples to use, None for all.
        grids: Weight grids, each family from fine to coarse. None: 8 … 2 bits and 49
            steps.
        sparsities: Shares of the network's weights that masks drop, rising, from 0; the
            smallest |θ| go first, which costs far less than dropping the lowest F θ².
        checkpoint: File to save progress to and resume from; removed at the end.
        seed: Seeds the sampled labels.
        progress: Show a bar with the time left.

    Returns:
        The table, independent of any budget.

    Raises:
        NoCompressibleLayerError: The model has nothing to compress.
        EmptyLoaderError: The loader yields nothing.
        NonFiniteError: A weight, the loss or a gradient is NaN or infinite.
        CalibrationError: The loss has no gradient or does not depend on a layer.
        DataError: A batch, or the output of the model for sampled labels, does not
            serve.
        UnsupportedLayerError: A layer mixes the samples of a batch.
        OutputError: The checkpoint cannot be written.
    """
    layers = compressible_layers(model)
    check_finite(model)
    if checkpoint is not None:
        check_writable(checkpoint)
    chosen = tuple(grids) if grids is not None else default_grids(layers)
    check_levels(chosen, sparsities)
    batches, ahead = itertools.tee(loader)  # a generator must not lose its first batch
    first = next(take(ahead, samples))[0]
    del ahead
    macs = count_macs(model, first[:1])
    # What must be equal for a checkpoint to be continued.
    labels = "sampled" if loss_fn is None else "data"
    crc = digest(first)
    if isinstance(loader, (list, tuple)):  # in memory: all of it costs next to nothing
        for x, _ in itertools.islice(take(loader, samples), 1, None):
            crc = digest(x, crc)
    key = f"{fingerprint(model, layers)}-{labels}-{seed}-{samples}-{crc:08x}"
    with evaluating(model), threads(FIXED):
        moments = _moments(
            model,
            layers,
            batches,
            loss_fn,
            samples,
            checkpoint,
            key,
            seed,
            progress=progress,
        )
    table = _table(layers, moments, chosen, sparsities, progress=progress)
    sensitivity = Sensitivity(
        names=tuple(layer.name for layer in layers),
        shapes=tuple(layer.shape for layer in layers),
        macs=np.array([macs[layer.name] for layer in layers], dtype=np.int64),
        fisher_trace=np.array([moments.mean_trace(layer.name) for layer in layers]),
        fisher_error=np.array([moments.relative_error(layer.name) for layer in layers]),
        grids=chosen,
        overhead_bytes=overhead_bytes(model, layers),
        dense_bytes=dense_bytes(model),
        samples=moments.samples,
        loss=moments.loss / moments.samples,
        provenance={"labels": labels, "seed": seed},
        **table,
    )
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return sensitivity


def _moments(
    model: nn.Module,
    layers: list[Layer],
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    samples: int | None,
    checkpoint: str | os.PathLike[str] | None,
    key: str,
    seed: int,
    *,
    progress: bool,
) -> Moments:
    moments = load_moments(checkpoint, key) if checkpoint is not None else None
    estimator = FisherEstimator(model, layers, moments)
    resume = estimator.moments.batches
    saved = time.monotonic()
    with Bar("measure: Fisher moments", samples, enabled=progress) as bar:
        for number, (x, y) in enumerate(take(loader, samples)):
            if number >= resume:
                if loss_fn is not None:
                    estimator.update(x, y, loss_fn)
                else:
                    # Seeded by batch, so that a resumed run draws the same labels.
                    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)

                    def loss(
                        out: Any, _: Any, generator: torch.Generator = generator
                    ) -> torch.Tensor:
                        return sampled_label_loss(out, generator)

                    estimator.update(x, y, loss)
                if checkpoint is not None and time.monotonic() - saved > SAVE_EVERY:
                    save_moments(checkpoint, estimator.moments, key)
                    saved = time.monotonic()
            mean = estimator.moments.loss / max(estimator.moments.samples, 1)
            bar.advance(len(x), f"loss {mean:.4f}")
    return estimator.moments


def _table(
    layers: list[Layer],
    moments: Moments,
    grids: tuple[Grid, ...],
    sparsities: Sequence[float],
    *,
    progress: bool,
) -> dict[str, Any]:
    bits = [g.bits for g in grids if g.bits is not None]
    steps = [g.step for g in grids if g.step is not None]
    names = ("distortion", "nonzeros", "grid_length", "prune_length", "norm")
    columns: dict[str, list[Any]] = {
        n: [] for n in (*names, "size_bits", "weight_bits")
    }
    shares = layer_sparsities(layers, sparsities)
    with Bar(
        "measure: distortion of every level", len(layers), enabled=progress
    ) as bar:
        for layer, share in zip(layers, shares, strict=True):
            weight, fisher = layer.matrix(), moments.diagonal(layer.name)
            cells = ops.distortion_table(
                weight, fisher, weight.square(), bits, steps, share
            )
            scales = [16 * layer.rows] * len(bits) + [32] * len(steps)
            entropy = np.ceil(cells.entropy_bits.numpy()).astype(np.int64)
            columns["size_bits"].append(entropy + np.array(scales)[:, None])
            columns["nonzeros"].append(cells.nnz.numpy())
            for name in ("distortion", "grid_length", "prune_length", "norm"):
                columns[name].append(getattr(cells, name).numpy())
            largest = float(weight.abs().max())
            codes = [round(largest / s) for s in steps]
            columns["weight_bits"].append(
                [*bits, *(max(1, (2 * k).bit_length()) for k in codes)]
            )
            bar.advance()
    table: dict[str, Any] = {
        k: np.stack(v) for k, v in columns.items() if k != "weight_bits"
    }
    table["weight_bits"] = np.array(columns["weight_bits"], dtype=np.int64)
    table["sparsity"] = np.array(shares)
    return table
