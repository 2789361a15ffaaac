"""What whole plans do to the outputs of a network, several plans at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fitcompress.compensate.activations import input_bits, quantize_activations
from fitcompress.compensate.size_fit import Pace
from fitcompress.data.batches import batch_size
from fitcompress.errors import NonFiniteError
from fitcompress.model.forward import call_model
from fitcompress.model.positions import counted
from fitcompress.progress import Bar
from fitcompress.refinement.divergences import log_probabilities, softened_divergence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import nn

    from fitcompress.compensate.compressor import Compressor
    from fitcompress.refinement.progress_file import ProgressFile
    from fitcompress.search.plan import Plan

    Reals = NDArray[np.float64]

__all__ = ["TINY", "float_inputs", "plan_loss_rises", "worker_count"]

STAGES = 2  # of a plan: its weights; its inputs as well
TINY = 1e-30  # nats: there is no logarithm of nothing
MOST_WORKERS = 8
COPIES_BYTES = 2**31  # of the networks that all workers hold
ANSWER_BYTES = 2**31  # of the dense layers, kept for all plans


def worker_count(model: nn.Module) -> int:
    """Return how many plans to apply at the same time, one thread each.

    As many as torch has threads, up to eight, if that many copies of the model, dense
    and compressed, fit in 2 GiB; one on a GPU. The outcome does not depend on it.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return 1
    copies = 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    fitting = COPIES_BYTES // max(copies, 1)
    return max(1, min(torch.get_num_threads(), MOST_WORKERS, fitting))


def plan_loss_rises(
    compressor: Compressor,
    plans: Sequence[Plan],
    calibrating: Sequence[Any],
    measured: Sequence[Any],
    temperature: float,
    file: ProgressFile,
    *,
    workers: int,
    progress: bool,
) -> tuple[Reals, Reals]:
    """Return KL and softened KL of every plan, [P, stages] each.

    Stages: weights on their levels; then the inputs of layers as well, if a plan has
    bits for them.

    Args:
        compressor: For the model.
        plans: P plans.
        calibrating: Inputs that the ranges of activations are chosen from.
        measured: Inputs that the outputs are compared on.
        temperature: τ.
        file: Where finished plans are kept.
        workers: How many plans at the same time.
        progress: Show a bar.

    Raises:
        NonFiniteError: An output is NaN or infinite.
    """
    heats = (1.0, temperature)
    dense = compressor.model
    before = [
        [log_probabilities(call_model(dense, x), t, counted(dense, x)) for t in heats]
        for x in measured
    ]
    rows = sum(len(each[0]) for each in before)
    done, sums = file.load((len(plans), STAGES, len(heats)))
    if compressor.calibration is not None:
        compressor.remember_dense(ANSWER_BYTES)
    idle: SimpleQueue[Compressor] = SimpleQueue()
    for number in range(workers):
        idle.put(compressor.twin() if number else compressor)

    def rises(plan: Plan) -> torch.Tensor:
        own = idle.get()
        try:
            with torch.no_grad():
                return _rises(own, plan, calibrating, measured, before, heats)
        finally:
            idle.put(own)

    samples = sum(map(batch_size, measured))
    title = f"calibrate: {len(plans)} plans, {samples} inputs each"
    pool = ThreadPoolExecutor(workers)
    with Bar(title, len(plans), enabled=progress) as bar:
        bar.advance(done)
        try:
            for number, found in enumerate(pool.map(rises, plans[done:]), done):
                sums[number] = found
                file.save(number + 1, sums)
                bar.advance()
        finally:
            pool.shutdown(cancel_futures=True)
    if not bool(torch.isfinite(sums).all()):
        raise NonFiniteError(
            "an output is NaN or infinite",
            wanted="finite logits",
            fix="look for overflow in half precision",
        )
    plain, soft = (sums / rows).clamp_min(0.0).movedim(-1, 0).numpy()
    return plain, np.maximum(soft, TINY)


def _rises(
    compressor: Compressor,
    plan: Plan,
    calibrating: Sequence[Any],
    measured: Sequence[Any],
    before: list[list[torch.Tensor]],
    heats: Sequence[float],
) -> torch.Tensor:
    """Return sums over all outputs, [stages, heats]."""
    bits = input_bits(plan)
    small = compressor.with_plan(float_inputs(plan)).at(Pace("layers", 1.0))
    sums = torch.zeros(STAGES, len(heats), dtype=torch.float64)
    for stage in range(STAGES if bits else 1):
        if stage:
            quantize_activations(small, bits, calibrating)
        for x, known in zip(measured, before, strict=True):
            output = call_model(small, x)
            for h, t in enumerate(heats):
                after = log_probabilities(output, t, counted(small, x))
                sums[stage, h] += softened_divergence(known[h], after, t)
    return sums


def float_inputs(plan: Plan) -> Plan:
    """Return the plan for weights alone."""
    levels = {n: replace(x, activation_bits=None) for n, x in plan.levels.items()}
    return replace(plan, levels=levels)
