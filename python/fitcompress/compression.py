"""``compress``: measure, search and apply in one call."""

from __future__ import annotations

import logging
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fitcompress.compensate import apply
from fitcompress.compensate.options import Compensation
from fitcompress.data.batches import batch_size, digest, take, tensors
from fitcompress.errors import (
    BudgetExceededError,
    FormatError,
    UnsupportedLayerError,
)
from fitcompress.files import check_writable
from fitcompress.model import check_finite, compressible_layers, fingerprint
from fitcompress.ranks import ALONE
from fitcompress.refinement import Refinement
from fitcompress.search import Budget, search
from fitcompress.sensitivity.measurement import measure
from fitcompress.sensitivity.table import Sensitivity

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from pathlib import Path

    from torch import nn

    from fitcompress.search.problem import Family
    from fitcompress.search.selection import Method

__all__ = ["compress"]

logger = logging.getLogger(__name__)
RETRIES = 4
INPUT_BITS = (8, 6, 5, 4, 3, 2)  # of layers' inputs, under a bound on bit operations
REFINEMENT_PLANS, ENOUGH = 24, 16  # samples that it takes


def compress(
    model: nn.Module,
    loader: Iterable[Any],
    budget: Budget,
    *,
    method: Method | None = None,
    family: Family | None = None,
    samples: int | None = 1024,
    activation_bits: int | Iterable[int] | None = None,
    refine: bool | Refinement | None = None,
    compensation: Compensation | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Return a compressed copy of ``model`` under ``budget``: no labels, no training.

    The same as :func:`measure` with labels sampled from the model, :func:`search` and
    :func:`apply` with calibration. Under a bound on bit operations the inputs of layers
    are quantized as well, and :func:`refine` weighs what that costs against what
    compensated weights do, by random plans; that takes most of the time. Where a
    fixed-point plan turns out a little larger in the file than predicted, the search is
    repeated with that much less.

    Args:
        model: The trained network; unchanged.
        loader: Yields inputs or (inputs, …) from the training distribution, or mappings
            of named inputs, as for Hugging Face models; iterated once, so a generator
            will do. A sample of text is a whole sequence; what its ``attention_mask``
            leaves out is not measured and not calibrated with.
        budget: The bound.
        method: As for :func:`search`.
        family: As for :func:`search`.
        samples: Inputs used to calibrate, None for all; half as many measure the
            sensitivity.
        activation_bits: Bits that inputs of layers may have, one or falling; () to
            leave them in float. None: 8, 6, 5, 4, 3 and 2 under a bound on bit
            operations if all inputs can be quantized, none otherwise.
        refine: Whether :func:`refine` corrects the sensitivity; with what, if it is a
            :class:`Refinement`. None: with 24 plans where inputs are quantized and
            there are 16 samples.
        compensation: As for :func:`apply`.
        checkpoint: Progress is saved in files of this name with ``.measure``,
            ``.refine``, ``.sensitivity`` and ``.apply`` appended, and resumed from
            there; removed at the end. After a kill, the same call ends with the
            identical model.
        seed: Seeds the sampled labels.
        progress: Show bars with the time left.

    Returns:
        What :func:`apply` returns, ready for :func:`save` or :func:`finetune`.

    Raises:
        FitcompressError: As :func:`measure`, :func:`refine`, :func:`search` and
            :func:`apply` do.

    Example:
        >>> import torch, fitcompress as fc
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 4))
        >>> budget = fc.Budget(size="20%")
        >>> small = fc.compress(net, [torch.randn(64, 64)], budget, progress=False)
    """
    layers = compressible_layers(model)
    check_finite(model)
    files = _Files(checkpoint)
    # Once: a second pass of a loader that shuffles would yield others after a kill.
    given = list(take(loader, samples))
    # Labels of sequences may say that positions do not count.
    inputs = [(x, y) if isinstance(x, dict) else x for x, y in given]
    half = None if samples is None else max(1, samples // 2)
    usual = activation_bits is None
    bits = _bits(activation_bits, budget)
    options = compensation or Compensation()
    found = sum(map(batch_size, (x for x, _ in given)))
    refinement = _refinement(refine, bits, found, options)
    key = ""
    if checkpoint is not None:
        key = f"{fingerprint(model, layers)}-{seed}-{half}-{_digest(inputs):08x}"
        if bits:
            key = f"{key}-{'-'.join(map(str, bits))}"

    def measured(bits: tuple[int, ...]) -> Sensitivity:
        return measure(
            model,
            inputs,
            samples=half,
            activation_bits=bits,
            checkpoint=files.path("measure"),
            seed=seed,
            group=ALONE,
            progress=progress,
        )

    table = files.sensitivity(key)
    if table is None:
        try:
            table = measured(bits)
        except UnsupportedLayerError as error:
            if not (usual and bits):
                raise
            logger.warning("inputs of layers are not quantized: %s", error)
            table, refinement = measured(()), None
        files.keep(table, key)
    if refinement is not None:
        table = refinement.correct(
            table,
            model,
            inputs,
            checkpoint=files.path("refine"),
            progress=progress,
        )
    tightened = budget
    for attempt in range(RETRIES + 1):
        plan = search(table, tightened, method=method, family=family)
        if budget.size is not None:
            # What counts is the user's bound, not the tightened one.
            plan = replace(plan, limit_bytes=budget.size_bytes(table.dense_bytes))
        try:
            small = apply(
                model,
                plan,
                inputs,
                samples=samples,
                # Another plan is better than wider scales.
                compensation=replace(
                    options, widen=options.widen and attempt == RETRIES
                ),
                checkpoint=files.path(_apply(attempt)),
                progress=progress,
            )
        except BudgetExceededError as error:
            if attempt == RETRIES:
                raise
            allowed = budget.size_bytes(table.dense_bytes)
            # Less than the search believed, or it would find the same plan again.
            believed = min(plan.size_bytes, tightened.size_bytes(table.dense_bytes))
            tightened = replace(
                budget, size=int(believed * min(0.995, allowed / error.size_bytes))
            )
        else:
            files.forget()
            return small
    raise AssertionError


def _bits(given: int | Iterable[int] | None, budget: Budget) -> tuple[int, ...]:
    """Return the bits that inputs may have."""
    if given is None:
        return () if budget.bops is None else INPUT_BITS
    return (given,) if isinstance(given, int) else tuple(given)


def _refinement(
    wanted: bool | Refinement | None,
    activation_bits: tuple[int, ...],
    samples: int,
    compensation: Compensation,
) -> Refinement | None:
    """Return what corrects the sensitivity, or None."""
    if isinstance(wanted, Refinement):
        return wanted
    if wanted is None:
        wanted = bool(activation_bits) and samples >= ENOUGH
    if not wanted:
        return None
    return Refinement(
        samples=samples, plans=REFINEMENT_PLANS, compensation=compensation
    )


class _Files:
    """What a killed call leaves behind for the next one; nothing without checkpoint."""

    def __init__(self, checkpoint: str | os.PathLike[str] | None) -> None:
        self._base = None if checkpoint is None else check_writable(checkpoint)
        for part in PARTS:
            if (path := self.path(part)) is not None:
                check_writable(path)

    def path(self, part: str) -> Path | None:
        """Return the file of one part of the work."""
        base = self._base
        return None if base is None else base.with_name(f"{base.name}.{part}")

    def keep(self, table: Sensitivity, key: str) -> None:
        """Save a sensitivity; ``key`` says what it belongs to."""
        path = self.path("sensitivity")
        if path is not None:
            replace(table, provenance=table.provenance | {"compress": key}).save(path)

    def sensitivity(self, key: str) -> Sensitivity | None:
        """Return the sensitivity that was kept for ``key``, if any."""
        path = self.path("sensitivity")
        if path is None or not path.exists():
            return None
        try:
            table = Sensitivity.load(path)
        except FormatError as error:
            logger.warning("%s is not used: %s", path, error)
            return None
        provenance = dict(table.provenance)
        if provenance.pop("compress", None) != key:
            logger.warning("%s belongs to another run and is not used", path)
            return None
        return replace(table, provenance=provenance)

    def forget(self) -> None:
        """Remove all files: the work is done."""
        for part in PARTS:
            if (path := self.path(part)) is not None:
                path.unlink(missing_ok=True)


def _apply(attempt: int) -> str:
    """Name the part of one attempt: a resumed run goes through earlier ones again."""
    return f"apply-{attempt + 1}" if attempt else "apply"


PARTS = (
    "measure",
    "refine",
    "refine.plans",
    "sensitivity",
    *map(_apply, range(RETRIES + 1)),
)


def _digest(inputs: list[Any]) -> int:
    """Return the CRC-32 of all inputs and of how they are cut into batches."""
    crc = 0
    for x in tensors(inputs):
        crc = digest(x, zlib.crc32(f"{x.dtype}{tuple(x.shape)}".encode(), crc))
    return crc
