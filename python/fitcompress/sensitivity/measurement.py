"""``measure``: Fisher moments of every layer, then the distortion of every level."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fitcompress.data.batches import part, take
from fitcompress.files import check_writable
from fitcompress.model import Layer, check_finite, compressible_layers
from fitcompress.model.costs import count_macs, dense_bytes, overhead_bytes
from fitcompress.progress import Bar
from fitcompress.sensitivity.checkpoint import load_moments
from fitcompress.sensitivity.estimate import estimate, estimate_key, followed, sampled
from fitcompress.sensitivity.fisher import FisherEstimator
from fitcompress.sensitivity.input_errors import (
    check_inputs,
    input_distortion,
    input_histograms,
)
from fitcompress.sensitivity.levels import (
    SPARSITIES,
    allocated,
    check_allocation,
    check_levels,
    default_grids,
)
from fitcompress.sensitivity.mask_rules import Magnitude, check_rule, importance_of
from fitcompress.sensitivity.memorised import compare_losses
from fitcompress.sensitivity.table import Grid, Sensitivity
from fitcompress.sensitivity.tables import TableColumns

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from torch import nn

    from fitcompress.refinement import Refinement
    from fitcompress.sensitivity.levels import Allocation
    from fitcompress.sensitivity.mask_rules import MaskRule
    from fitcompress.sensitivity.moments import FisherMoments

__all__ = ["measure"]


def measure(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    *,
    samples: int | None = 512,
    grids: Sequence[Grid] | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    activation_bits: int | Iterable[int] = (),
    masks: MaskRule | None = None,
    allocation: Allocation | None = None,
    refine: Refinement | None = None,
    validation: Iterable[Any] | None = None,
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
        loader: Yields inputs, (inputs, targets), or mappings of named inputs, whose
            ``labels`` are the targets. A sample of text is a whole sequence.
        loss_fn: (output, targets) → loss averaged over the batch: empirical Fisher;
            for sequences, :func:`label_loss` is one.
            None: cross-entropy with labels sampled from the model: true Fisher, no
            labels needed; padding and positions labelled −100 do not count.
        samples: How many samples to use, None for all.
        grids: Weight grids, each family from fine to coarse. None: 8 … 2 bits and 49
            steps.
        sparsities: Shares of the network's weights that masks drop, rising, from 0.
        activation_bits: Bits that inputs of layers may have, one or falling, such as
            (8, 6, 4), for plans under a bound on bit operations. Costs the gradient of
            the network's input, and forward passes over the data, which are read a
            second time; what can be read only once, as a generator, is kept in memory.
        masks: In what order the weights of a layer are dropped, a rule of
            :mod:`fitcompress.masks`, to be given to :func:`fitcompress.apply` as well.
            None: the smallest |θ| go first.
        allocation: How layers share a sparsity of the network: ``"magnitude"``, also
            for None, one threshold of |θ| for all of them; ``"importance"``, one
            threshold of what the rule makes of their weights; ``"uniform"``, the same
            share in each.
        refine: Correct the distortions by measured loss rises of single layers, see
            :func:`fitcompress.refine`. Takes minutes.
        validation: Data that the network has not seen, to tell whether it has memorised
            those of ``loader``: the mean losses of both are compared.
        checkpoint: File to save progress to and resume from; removed at the end.
        seed: Seeds the sampled labels.
        progress: Show a bar with the time left.

    Returns:
        The table, independent of any budget.

    Warns:
        MemorisedDataWarning: The mean loss on ``loader`` is less than half of that on
            ``validation``.

    Raises:
        NoCompressibleLayerError: The model has nothing to compress.
        EmptyLoaderError: The loader yields nothing.
        NonFiniteError: A weight, the loss or a gradient is NaN or infinite.
        CalibrationError: The loss has no gradient or does not depend on a layer.
        DataError: A batch, or the output of the model for sampled labels, does not
            serve.
        UnsupportedLayerError: A layer mixes the samples of a batch; or its input cannot
            be quantized, with activation_bits, as the first batch shows.
        OptionError: Grids, sparsities or activation bits are out of order, ``masks``
            is no rule, or there is no such allocation.
        PlanMismatchError: The rule for masks was measured on another model.
        OutputError: The checkpoint cannot be written.
    """
    layers = compressible_layers(model)
    check_finite(model)
    if checkpoint is not None:
        check_writable(checkpoint)
    chosen = tuple(grids) if grids is not None else default_grids(layers)
    bits = (
        (activation_bits,)
        if isinstance(activation_bits, int)
        else tuple(activation_bits)
    )
    check_levels(chosen, sparsities, bits)
    rule = Magnitude() if masks is None else masks
    shared = "magnitude" if allocation is None else allocation
    if masks is not None:
        check_rule(rule, layers)
    check_allocation(shared)
    batches, key = estimate_key(model, loader, loss_fn, samples, seed)
    first = list(itertools.islice(batches, 1))
    x, y = next(take(first, samples))
    macs = count_macs(model, part(x, slice(1)))
    batches = followed(first, batches)
    names = zlib.crc32(repr([(each.name, each.shape) for each in layers]).encode())
    key += f"-{names:08x}" + ("-inputs" if bits else "")
    known = _saved(checkpoint, key)
    if bits and known is None:
        two = part(x, slice(2)), part(y, slice(2))
        check = loss_fn or sampled(model, *two, seed, 0)
        check_inputs(model, layers, *two, check)
    del x, y
    again: Iterable[Any] = loader
    once = isinstance(loader, Iterator)  # cannot be read twice
    if (bits or refine or validation is not None) and once:
        batches, again = itertools.tee(batches)
    moments = estimate(
        FisherEstimator(
            model,
            layers,
            activations=bool(bits),
            moments=known,
        ),
        take(batches, samples),
        loss_fn,
        samples=samples,
        checkpoint=checkpoint,
        key=key,
        seed=seed,
        progress=progress,
    )
    losses: dict[str, float | str] = {}
    if validation is not None:
        inputs = again
        if (refine or bits) and once:
            inputs, again = itertools.tee(again)
        losses = compare_losses(
            model, inputs, validation, loss_fn, samples, progress=progress
        )
    shares = allocated(layers, sparsities, rule, shared)
    table = _table(layers, moments, chosen, shares, rule, progress=progress)
    if bits:
        inputs = again
        if refine and once:
            inputs, again = itertools.tee(again)
        histograms = input_histograms(
            model, layers, take(inputs, samples), samples=samples, progress=progress
        )
        hurt, trace = input_distortion(layers, moments, histograms, bits)
        table["activation_bits"] = (None, *bits)
        table["activation_distortion"], table["activation_trace"] = hurt, trace
    indices = [layer.name for layer in layers if layer.one_hot]
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
        provenance={
            "labels": "sampled" if loss_fn is None else "data",
            "seed": seed,
            "masks": rule.name,
            "masks_digest": rule.digest(),
            "allocation": shared,
            **({"losses": losses} if losses else {}),
            **({"float_inputs": indices} if indices else {}),
        },
        **table,
    )
    if refine is not None:
        state = None if checkpoint is None else f"{checkpoint}.refine"
        sensitivity = refine.correct(
            sensitivity,
            model,
            again,
            masks=masks,
            checkpoint=state,
            progress=progress,
        )
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return sensitivity


def _saved(checkpoint: str | os.PathLike[str] | None, key: str) -> FisherMoments | None:
    return None if checkpoint is None else load_moments(checkpoint, key)


def _table(
    layers: list[Layer],
    moments: FisherMoments,
    grids: tuple[Grid, ...],
    shares: list[list[float]],
    rule: MaskRule,
    *,
    progress: bool,
) -> dict[str, Any]:
    columns = TableColumns(grids)
    with Bar(
        "measure: distortion of every level", len(layers), enabled=progress
    ) as bar:
        for layer, share in zip(layers, shares, strict=True):
            fisher = layer.matrix_of(moments.diagonal(layer.name).view(layer.shape))
            own = isinstance(rule, Magnitude)  # the op computes it as it goes
            importance = None if own else importance_of(rule, layer)
            columns.add(layer.matrix(), fisher, share, importance)
            bar.advance()
    return columns.stack()
