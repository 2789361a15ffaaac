"""``measure_fisher``: a Fisher estimate over a loader, and its checkpoint."""

from __future__ import annotations

import itertools
import logging
import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fitcompress.data.batches import batch_size, part
from fitcompress.errors import DistributedError, OptionError
from fitcompress.model import check_finite
from fitcompress.model.forward import call_model
from fitcompress.model.modes import evaluating
from fitcompress.model.positions import counted
from fitcompress.model.sharding import check_sharding, is_sharded, reshard, unwrapped
from fitcompress.progress import Bar
from fitcompress.ranks import Ranks
from fitcompress.sensitivity.checkpoint import Checkpoint
from fitcompress.sensitivity.fisher import MEMORY, FisherEstimator
from fitcompress.sensitivity.keys import check_same, estimate_key
from fitcompress.sensitivity.labels import logits_of, sampled_label_loss
from fitcompress.sensitivity.lockstep import Lockstep
from fitcompress.sensitivity.shares import distributed_sampler, shared_out
from fitcompress.sensitivity.weights import measured_weights
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator

    from fitcompress.sensitivity.moments import FisherMoments
    from fitcompress.sensitivity.shares import Share

__all__ = ["estimate", "measure_fisher", "sampled"]

logger = logging.getLogger(__name__)

SAVE_EVERY = 5.0  # seconds between checkpoints
FEWEST = 32  # samples before an estimate may stop early


def measure_fisher(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    *,
    diagonal: bool = False,
    activations: bool = False,
    samples: int | None = None,
    tolerance: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    memory: int = MEMORY,
    seed: int = 0,
    group: Any = None,
    progress: bool = True,
) -> FisherMoments:
    """Measure Fisher traces, and diagonals, of every weight of a model.

    With G_i the gradient of the loss ℓ_i of sample i for a weight,

        T = (1/N) Σ_i ‖G_i‖²,    F = (1/N) Σ_i G_i ∘ G_i    (nats²),

    exact per sample: a batch's mean gradient is never squared. Costs less than a
    forward and backward pass of training for most models, as no weight gradients are
    formed where their norms follow from less; see :mod:`fitcompress.sensitivity.forms`.

    Under ``torch.distributed`` the processes share the batches out, as for
    :func:`measure`, and end with the same moments. Those of a model that is sharded by
    FSDP2 are gathered at the end: a diagonal is then whole in every process.

    Args:
        model: The network; unchanged afterwards, and in eval mode meanwhile.
        loader: Yields inputs, (inputs, targets), or mappings of named inputs, as for
            Hugging Face models, whose ``labels`` are the targets.
        loss_fn: (output, targets) → mean loss of the samples: empirical Fisher. None:
            cross-entropy with labels sampled from the model: true Fisher, no labels
            needed; of a sequence, which is one sample, positions that an
            ``attention_mask`` leaves out or that are labelled −100 do not count. The
            loss of a sample must not depend on the others: a mean over the tokens of
            sequences of unequal lengths does, and :func:`label_loss` does not.
        diagonal: Measure F beside T.
        activations: Measure T_a of the inputs of layers, too.
        samples: How many samples to use; None for all.
        tolerance: Stop when the largest relative standard error of the traces is below
            it, after 32 samples at least; None: do not stop early.
        checkpoint: File to save progress to and resume from; removed at the end.
        memory: Bytes that activations may take; larger batches are cut.
        seed: Seeds the sampled labels.
        group: The ``torch.distributed`` process group, None for the default one, if
            that is initialised.
        progress: Show a bar with the time left.

    Returns:
        The moments, which can be saved and merged with those of other samples.

    Raises:
        EmptyLoaderError: The loader yields nothing.
        NonFiniteError: A weight, the loss or a gradient is NaN or infinite.
        CalibrationError: The loss has no gradient.
        DataError: A batch, or the output of the model for sampled labels, does not
            serve.
        UnsupportedLayerError: A layer mixes the samples of a batch.
        OptionError: The tolerance is not positive.
        DistributedError: Another process failed, is gone, or measures something else.
        OutputError: The checkpoint cannot be written.

    Example:
        >>> import torch, fitcompress as fc
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> fisher = fc.measure_fisher(model, [torch.randn(64, 4)], progress=False)
        >>> fisher.names, fisher.samples
        (('0', '2'), 64)

    Source: FIT (Zandonati et al., 2022, arXiv 2210.08502).
    """
    if tolerance is not None and not tolerance > 0:
        raise OptionError("the tolerance is not positive", got=tolerance)
    ranks = Ranks(group)
    with ranks.together():
        model = unwrapped(model)
        check_sharding(model, ranks)
        reshard(model)
        check_finite(model)
        saved = None if checkpoint is None else Checkpoint(checkpoint, ranks)
        sampler = distributed_sampler(loader, ranks)
        batches, key = estimate_key(model, loader, loss_fn, samples, seed)
    check_same(ranks, key, weights=not is_sharded(model), data=sampler is None)
    moments = None
    if saved is not None:
        saved.key = f"{key}-{diagonal:d}{activations:d}"
        moments = saved.load()
    lockstep = Lockstep(ranks, model) if is_sharded(model) else None
    estimator = FisherEstimator(
        model,
        diagonal=diagonal,
        activations=activations,
        memory=memory,
        moments=moments,
        lockstep=lockstep,
    )
    found = estimate(
        estimator,
        shared_out(batches, sampler, samples, ranks),
        loss_fn,
        samples=samples,
        tolerance=tolerance,
        checkpoint=saved,
        seed=seed,
        ranks=ranks,
        lockstep=lockstep,
        progress=progress,
    )
    if lockstep is not None:
        shapes = {each.name: each.rows for each in measured_weights(model)}
        for name, mine in found.squares.items():
            found.squares[name] = lockstep.gather(mine, shapes[name])
    estimator.drop_unreached()
    if saved is not None:
        saved.remove()
    return found


def estimate(
    estimator: FisherEstimator,
    shares: Iterator[Share],
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    *,
    samples: int | None,
    checkpoint: Checkpoint | None,
    seed: int,
    progress: bool,
    ranks: Ranks,
    lockstep: Lockstep | None = None,
    tolerance: float | None = None,
) -> FisherMoments:
    """Run an estimator over batches, in eval mode, saving now and then.

    Several processes take a batch each, turn by turn, until none has one left; then
    all have the moments of all of them. In every turn each says whether it failed. Of a
    sharded model the loss is not looked at before: in each process it is another
    batch's, and one that raises would leave the others in the model.

    Args:
        estimator: Of this process.
        shares: Its batches.
        loss_fn: As for ``measure``.
        samples: How many all of them measure.
        checkpoint: Where to save; loaded moments are those of its ``turn``.
        seed: Of sampled labels.
        progress: Whether to show a bar.
        ranks: The processes.
        lockstep: Of a sharded model.
        tolerance: As for ``measure_fisher``.
    """
    model, moments = estimator.model, estimator.moments
    resume, saved = 0 if checkpoint is None else checkpoint.turn, time.monotonic()
    mine = None if samples is None else -(-samples // ranks.count)
    untried = loss_fn is not None and lockstep is None

    def update(share: Share) -> None:
        nonlocal untried
        number, x, y = share
        if untried and loss_fn is not None:
            _warn_unless_mean(model, x, y, loss_fn)
        untried = False
        estimator.update(x, y, loss_fn or sampled(model, x, y, seed, number))

    with (
        _evaluating_loudly(model),
        threads(FIXED),
        Bar(_title(ranks), mine, enabled=progress and ranks.first) as bar,
    ):
        for turn in itertools.count():
            share: Share | None = None
            error: Exception | None = None
            try:
                share = next(shares, None)
                if share is not None and turn >= resume and lockstep is None:
                    update(share)
            except Exception as caught:
                if ranks.alone or isinstance(caught, DistributedError):
                    raise
                error = caught
            late = time.monotonic() - saved > SAVE_EVERY and ranks.first
            more, due = ranks.agree(error, share is not None, late)
            if not more:
                break
            if lockstep is not None and turn >= resume:
                lockstep.run(estimator, share, update)
            if checkpoint is not None and due and turn >= resume:
                checkpoint.save(moments, turn + 1)
                saved = time.monotonic()
            text = f"loss {moments.mean_loss:.4f}"
            if tolerance is not None:
                error_now = _common_error(moments, ranks)
                text += f", standard error {100 * error_now:.1f} %"
            bar.advance(0 if share is None else batch_size(share.x), text)
            if tolerance is not None and error_now < tolerance:
                break
        if not ranks.alone:
            with ranks.reaching():
                moments.all_reduce(ranks.group, squares=lockstep is None)
    return moments


def _title(ranks: Ranks) -> str:
    title = "measure: Fisher moments"
    return title if ranks.alone else f"{title}, 1 of {ranks.count} processes"


def _warn_unless_mean(
    model: nn.Module, x: Any, y: Any, loss_fn: Callable[[Any, Any], torch.Tensor]
) -> None:
    """Warn if the loss of two samples is not the mean of their losses."""
    if batch_size(x) < 2:
        return
    with torch.no_grad():
        losses = [
            loss_fn(call_model(model, part(x, cut)), part(y, cut))
            for cut in (slice(0, 2), slice(0, 1), slice(1, 2))
        ]
    if not all(torch.is_tensor(loss) and loss.numel() == 1 for loss in losses):
        return  # the estimator says what is wrong with it
    both, *alone = map(float, losses)
    mean = sum(alone) / 2
    if abs(both - mean) > 1e-3 * max(abs(each) for each in (both, *alone)):
        logger.warning(
            "the loss is not the mean of the losses of the samples: %.6g for two "
            "together, %.6g and %.6g alone; moments are those of B times its gradient. "
            "Use reduction='mean', without class weights, and average the tokens of a "
            "sample before the samples",
            both,
            *alone,
        )


def sampled(
    model: nn.Module, x: Any, y: Any, seed: int, number: int
) -> Callable[[Any, Any], torch.Tensor]:
    """Return the loss with sampled labels for one batch.

    Seeded by the number of the batch, so that a resumed run draws the same labels, and
    every process those that one alone would. Of sequences, padding and what is labelled
    −100 do not count.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    mask = counted(model, x, y)
    done = 0

    def loss(output: Any, _: Any) -> torch.Tensor:
        nonlocal done
        rows = None
        if mask is not None:  # the batch may have been cut
            count = batch_size(logits_of(output))
            rows = mask[done : done + count]
            done += count
        return sampled_label_loss(output, generator, rows)

    return loss


def _common_error(moments: FisherMoments, ranks: Ranks) -> float:
    """Return the largest relative standard error, of all processes together.

    All of them come to the same decision.
    """
    together = type(moments)(
        trace={name: sums.clone() for name, sums in moments.trace.items()},
        unsupported=dict(moments.unsupported),
        samples=moments.samples,
    )
    if not ranks.alone:
        with ranks.reaching():
            together.all_reduce(ranks.group)
    return together.largest_relative_error if together.samples >= FEWEST else math.inf


def _evaluating_loudly(model: nn.Module) -> Any:
    """Put the model into eval mode for a while, and say so if that changes a norm."""
    training = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    if training:
        logger.warning(
            "%d batch norms, such as %s, were in train mode, where they couple the "
            "samples of a batch: measured with their running statistics",
            len(training),
            training[0],
        )
    return evaluating(model)
