"""What whole plans do to the outputs of a network, several plans at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from fitcompress.threads import FIXED, adopt_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import nn

    from fitcompress.compensate.compressor import Compressor
    from fitcompress.refinement.progress_file import ProgressFile
    from fitcompress.search.plan import Plan

    Reals = NDArray[np.float64]

__all__ = ["TINY", "Workers", "float_inputs", "plan_loss_rises"]

STAGES = 2  # of a plan: its weights; its inputs as well
TINY = 1e-30  # nats: there is no logarithm of nothing
MOST_WORKERS = 8
WORKER_BYTES = 2**32  # of all workers together
ANSWER_BYTES = 2**31  # of the dense layers, kept for all plans
LEAST = 1e-6  # of the median loss rise: the logarithm of less says nothing


@dataclass(frozen=True)
class Workers:
    """How many plans are applied at the same time.

    Attributes:
        count: Of plans; nothing but the time depends on it.
        threads: Of each, which does not depend on the machine.
    """

    count: int
    threads: int

    @classmethod
    def for_model(cls, model: nn.Module, layer_bytes: int, threads: int) -> Workers:
        """Return as many as fit in 4 GiB, up to eight and to ``threads``.

        One on a GPU; and one, on two threads, where two would not fit.

        Args:
            model: The network.
            layer_bytes: Of the largest input of a layer for all compensating samples;
                a worker holds about three such.
            threads: That torch has.
        """
        tensors = [*model.parameters(), *model.buffers()]
        copy = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        fitting = WORKER_BYTES // max(2 * copy + 3 * layer_bytes, 1)
        on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
        if fitting < 2 or not on_cpu:
            return cls(1, FIXED)
        return cls(min(threads, MOST_WORKERS, fitting), 1)


def plan_loss_rises(
    compressor: Compressor,
    plans: Sequence[Plan],
    calibrating: Sequence[Any],
    measured: Sequence[Any],
    temperature: float,
    file: ProgressFile,
    *,
    workers: Workers,
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
        workers: How many plans at the same time, in a block with their threads.
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
    for number in range(workers.count):
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
    pool = ThreadPoolExecutor(workers.count, initializer=adopt_threads)
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
    return plain, np.maximum(soft, max(TINY, LEAST * float(np.median(soft[:, 0]))))


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
