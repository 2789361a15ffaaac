"""``measure``: Fisher moments of every layer, then the distortion of every level."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fitcompress.data.batches import part, take
from fitcompress.errors import OptionError
from fitcompress.model import Layer, check_finite, compressible_layers
from fitcompress.model.costs import count_macs, dense_bytes, overhead_bytes
from fitcompress.model.devices import device_of, to_device
from fitcompress.model.sharding import check_sharding, is_sharded, reshard, unwrapped
from fitcompress.model.value_histogram import ValueHistogram
from fitcompress.progress import Bar
from fitcompress.ranks import Ranks
from fitcompress.sensitivity.checkpoint import Checkpoint
from fitcompress.sensitivity.estimate import estimate, sampled
from fitcompress.sensitivity.fisher import FisherEstimator
from fitcompress.sensitivity.input_errors import (
    check_inputs,
    input_distortion,
    input_histograms,
)
from fitcompress.sensitivity.keys import check_same, estimate_key, followed
from fitcompress.sensitivity.levels import (
    SPARSITIES,
    allocated,
    check_allocation,
    check_levels,
    default_grids,
    grids_from,
)
from fitcompress.sensitivity.lockstep import Lockstep
from fitcompress.sensitivity.mask_rules import Magnitude, check_rule, importance_of
from fitcompress.sensitivity.memorised import compare_losses
from fitcompress.sensitivity.shares import distributed_sampler, shared_out
from fitcompress.sensitivity.table import Grid, Sensitivity
from fitcompress.sensitivity.tables import TableColumns

if TYPE_CHECKING:
    import contextlib
    import os
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn
    from torch.utils.data import DistributedSampler

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
    group: Any = None,
    progress: bool = True,
) -> Sensitivity:
    """Measure how much the loss rises for every level of every compressible layer.

    D_l(level) = ½ Σ_j F_j (θ_j − θ̂_j)² in nats, F the Fisher diagonal of the layer from
    exact per-sample gradients (Zandonati et al. 2022, arXiv 2210.08502). Costs about
    one forward and backward pass per sample and one pass over the weights per grid.

    Under ``torch.distributed`` the processes share batches and layers out, and all end
    with the table that one alone would have. Process r of N takes batches r, r + N, …:
    give all of them the same loader, in the same order. If it has a
    ``DistributedSampler``, each takes what that yields instead. A model sharded by
    ``torch.distributed.fsdp.fully_shard`` is measured as it is: every process holds its
    part of the weights and of F, and one layer at a time as a whole.

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
        checkpoint: File to save progress to and resume from; removed at the end. Each
            of several processes has its own, ``<checkpoint>.rank0-of-2``.
        seed: Seeds the sampled labels.
        group: The ``torch.distributed`` process group, None for the default one, if
            that is initialised.
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
        DistributedError: Another process failed, is gone, or measures something else.
        OutputError: The checkpoint cannot be written.
    """
    bits = (
        (activation_bits,)
        if isinstance(activation_bits, int)
        else tuple(activation_bits)
    )
    rule = Magnitude() if masks is None else masks
    shared = "magnitude" if allocation is None else allocation
    ranks = Ranks(group)
    progress = progress and ranks.first
    with ranks.together():
        model = unwrapped(model)
        check_sharding(model, ranks)
        reshard(model)
        sharded = is_sharded(model)
        if sharded and refine is not None:
            raise OptionError(
                "a sharded model cannot be refined",
                fix="measure it without refine, or the model as a whole",
            )
        layers = compressible_layers(model)
        check_finite(model)
        saved = None if checkpoint is None else Checkpoint(checkpoint, ranks)
        check_levels(
            tuple(grids) if grids is not None else grids_from(()), sparsities, bits
        )
        if masks is not None:
            check_rule(rule, layers)
        check_allocation(shared)
        sampler = distributed_sampler(loader, ranks)
        batches, key = estimate_key(model, loader, loss_fn, samples, seed)
        first = list(itertools.islice(batches, 1))
        x, y = next(take(first, samples))
    check_same(ranks, key, weights=not sharded, data=sampler is None)
    chosen = tuple(grids) if grids is not None else default_grids(layers)
    names = zlib.crc32(repr([(each.name, each.shape) for each in layers]).encode())
    known = None
    if saved is not None:
        saved.key = f"{key}-{names:08x}" + ("-inputs" if bits else "")
        known = saved.load()
    if sharded:  # they can only run the same batch
        x, y = to_device(
            ranks.broadcast(to_device((x, y), torch.device("cpu"))), device_of(model)
        )
    with _running(ranks, sharded):
        macs = count_macs(model, part(x, slice(1)))
        if bits and known is None:
            two = part(x, slice(2)), part(y, slice(2))
            check = loss_fn or sampled(model, *two, seed, 0)
            check_inputs(model, layers, *two, check)
    macs = ranks.broadcast(macs)
    del x, y
    batches = followed(first, batches)
    again: Iterable[Any] = loader
    once = isinstance(loader, Iterator)  # cannot be read twice
    if (bits or refine or validation is not None) and once:
        batches, again = itertools.tee(batches)
    lockstep = Lockstep(ranks, model) if sharded else None
    moments = estimate(
        FisherEstimator(
            model,
            layers,
            activations=bool(bits),
            moments=known,
            lockstep=lockstep,
        ),
        shared_out(batches, sampler, samples, ranks),
        loss_fn,
        samples=samples,
        checkpoint=saved,
        seed=seed,
        progress=progress,
        ranks=ranks,
        lockstep=lockstep,
    )
    reshard(model)
    losses: dict[str, float | str] = {}
    if validation is not None:
        inputs = again
        if (refine or bits) and once:
            inputs, again = itertools.tee(again)
        with _running(ranks, sharded):
            losses = compare_losses(
                model, inputs, validation, loss_fn, samples, progress=progress
            )
        reshard(model)
        losses = ranks.broadcast(losses)
    shares = allocated(layers, sparsities, rule, shared)
    table = _table(
        layers, moments, chosen, shares, rule, ranks, lockstep, progress=progress
    )
    if bits:
        inputs = again
        if refine and once:
            inputs, again = itertools.tee(again)
        histograms = _histograms(
            model, layers, inputs, samples, sampler, ranks, sharded, progress=progress
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
        with ranks.together():
            sensitivity = refine.correct(
                sensitivity,
                model,
                again,
                masks=masks,
                checkpoint=None if saved is None else f"{saved.path}.refine",
                progress=progress,
            )
    reshard(model)
    if saved is not None:
        saved.remove()
    same: Sensitivity = ranks.broadcast(sensitivity)  # to the last bit
    return same


def _running(ranks: Ranks, sharded: bool) -> contextlib.AbstractContextManager[None]:
    """Run a block in which the model runs, and talks to others if it is sharded."""
    return ranks.reaching() if sharded else ranks.together()


def _histograms(
    model: nn.Module,
    layers: list[Layer],
    loader: Iterable[Any],
    samples: int | None,
    sampler: DistributedSampler[Any] | None,
    ranks: Ranks,
    sharded: bool,
    *,
    progress: bool,
) -> dict[str, ValueHistogram]:
    """Return the values of the inputs of layers, on all samples.

    Each process counts its own batches; those of a sharded model count all of them, or,
    with a sampler, as many as each other, what it repeats included.
    """
    alike = sharded and sampler is None
    mine = samples if alike or samples is None else -(-samples // ranks.count)
    shares = (share[1:] for share in shared_out(loader, sampler, samples, ranks))
    batches = take(loader, mine) if sharded else shares
    with _running(ranks, sharded):
        found = input_histograms(
            model, layers, batches, samples=mine, progress=progress
        )
    if alike or ranks.alone:
        return found
    merged: dict[str, ValueHistogram] = {}
    for each in ranks.gather(found):
        for name, histogram in each.items():
            merged.setdefault(name, ValueHistogram()).merge(histogram)
    return merged


def _table(
    layers: list[Layer],
    moments: FisherMoments,
    grids: tuple[Grid, ...],
    shares: list[list[float]],
    rule: MaskRule,
    ranks: Ranks,
    lockstep: Lockstep | None,
    *,
    progress: bool,
) -> dict[str, Any]:
    """Tabulate all layers; each of several processes does some, and gets the others."""
    columns = TableColumns(grids)
    own = isinstance(rule, Magnitude)  # the op computes it as it goes
    with Bar(
        "measure: distortion of every level", len(layers), enabled=progress
    ) as bar:
        error: Exception | None = None
        for number, (layer, share) in enumerate(zip(layers, shares, strict=True)):
            bar.advance()
            mine = number % ranks.count == ranks.rank and error is None
            if not mine and lockstep is None:
                continue
            fisher = moments.diagonal(layer.name)
            if lockstep is not None:
                fisher = lockstep.gather(fisher, layer.shape[0])
            weight = layer.matrix()
            importance = None if own else importance_of(rule, layer)
            if not mine:
                continue
            try:
                fisher = layer.matrix_of(fisher.view(layer.shape))
                columns.add(weight, fisher, share, importance)
            except Exception as caught:
                if ranks.alone:
                    raise
                error = caught
    ranks.agree(error)
    if not ranks.alone:
        parts = ranks.gather(columns.rows)
        columns.take_up(
            parts[i % ranks.count][i // ranks.count] for i in range(len(layers))
        )
    return columns.stack()
