"""``measure_fisher``: a Fisher estimate over a loader, and its checkpoint."""

from __future__ import annotations

import itertools
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fitcompress.data.batches import batch_size, digest, part, take
from fitcompress.errors import OptionError
from fitcompress.files import check_writable
from fitcompress.model import check_finite, fingerprint
from fitcompress.model.forward import call_model
from fitcompress.model.modes import evaluating
from fitcompress.model.positions import counted
from fitcompress.progress import Bar
from fitcompress.sensitivity.checkpoint import load_moments, save_moments
from fitcompress.sensitivity.fisher import MEMORY, FisherEstimator
from fitcompress.sensitivity.labels import logits_of, sampled_label_loss
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator

    from fitcompress.sensitivity.moments import FisherMoments

__all__ = ["estimate", "estimate_key", "followed", "measure_fisher", "sampled"]

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

    Under ``torch.distributed`` every process takes its own part of the data, and the
    result is that of all of them together.

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
    check_finite(model)
    if checkpoint is not None:
        check_writable(checkpoint)
    batches, key = estimate_key(model, loader, loss_fn, samples, seed)
    key += f"-{diagonal:d}{activations:d}"
    moments = load_moments(checkpoint, key) if checkpoint is not None else None
    estimator = FisherEstimator(
        model,
        diagonal=diagonal,
        activations=activations,
        memory=memory,
        moments=moments,
    )
    found = estimate(
        estimator,
        take(batches, samples),
        loss_fn,
        samples=samples,
        tolerance=tolerance,
        checkpoint=checkpoint,
        key=key,
        seed=seed,
        group=group,
        progress=progress,
    )
    if _distributed():
        found.all_reduce(group)
    estimator.drop_unreached()
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return found


def estimate_key(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Any,
    samples: int | None,
    seed: int,
) -> tuple[Iterator[Any], str]:
    """Return the loader's batches, and what must be equal to continue a checkpoint."""
    batches, crc = iter(loader), 0
    # What is in memory costs next to nothing to read; of the rest, the first batch.
    known: Iterable[Any] = loader
    if not isinstance(loader, (list, tuple)):
        known = first = list(itertools.islice(batches, 1))
        batches = followed(first, batches)
    for batch in take(known, samples):
        crc = digest(batch, crc)
    labels = "sampled" if loss_fn is None else getattr(loss_fn, "__qualname__", "data")
    weights = fingerprint(model, [])
    return batches, f"{weights}-{labels}-{seed}-{samples}-{crc:08x}"


def followed(first: list[Any], rest: Iterator[Any]) -> Iterator[Any]:
    """Yield what is in ``first``, which then is let go of, and ``rest``."""
    while first:
        yield first.pop(0)
    yield from rest


def estimate(
    estimator: FisherEstimator,
    batches: Iterator[tuple[Any, Any]],
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    *,
    samples: int | None,
    checkpoint: str | os.PathLike[str] | None,
    key: str,
    seed: int,
    progress: bool,
    tolerance: float | None = None,
    group: Any = None,
) -> FisherMoments:
    """Run an estimator over batches, in eval mode, saving now and then."""
    resume = estimator.moments.batches
    saved = time.monotonic()
    model = estimator.model
    with (
        _evaluating_loudly(model),
        threads(FIXED),
        Bar("measure: Fisher moments", samples, enabled=progress) as bar,
    ):
        for number, (x, y) in enumerate(batches):
            if number == resume and loss_fn is not None:
                _warn_unless_mean(model, x, y, loss_fn)
            if number >= resume:
                estimator.update(x, y, loss_fn or sampled(model, x, y, seed, number))
                if checkpoint is not None and time.monotonic() - saved > SAVE_EVERY:
                    save_moments(checkpoint, estimator.moments, key)
                    saved = time.monotonic()
            moments = estimator.moments
            text = f"loss {moments.mean_loss:.4f}"
            if tolerance is not None:
                error, _ = _common_error(moments, group, running=True)
                text += f", standard error {100 * error:.1f} %"
            bar.advance(batch_size(x), text)
            if tolerance is not None and error < tolerance:
                return estimator.moments
    if tolerance is not None and _distributed():
        error, running = float("inf"), True
        while running and not error < tolerance:  # the others may have more data
            error, running = _common_error(estimator.moments, group, running=False)
    return estimator.moments


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

    Seeded by batch, so that a resumed run draws the same labels. Of sequences, padding
    and what is labelled −100 do not count.
    """
    rank = torch.distributed.get_rank() if _distributed() else 0
    own = (seed + 65_537 * rank) * 1_000_003 + number
    generator = torch.Generator().manual_seed(own)
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


def _common_error(
    moments: FisherMoments, group: Any, *, running: bool
) -> tuple[float, bool]:
    """Return the largest relative standard error, and whether any process has data.

    Under ``torch.distributed`` both are those of all processes together: all of them
    must come to the same decision, or the others would wait.
    """
    together = type(moments)(
        trace={name: sums.clone() for name, sums in moments.trace.items()},
        unsupported=dict(moments.unsupported),
        samples=moments.samples,
        batches=int(running),  # summed up like any count
    )
    if _distributed():
        together.all_reduce(group)
    if together.samples < FEWEST:
        return float("inf"), together.batches > 0
    return together.largest_relative_error, together.batches > 0


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


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
