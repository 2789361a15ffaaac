"""``measure_latency``: a latency table of a network on a target; and its check."""

from __future__ import annotations

import hashlib
import json
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fitcompress.compensate.activations import input_bits
from fitcompress.errors import OptionError, PlanMismatchError
from fitcompress.latency.interplay import make_patterns
from fitcompress.latency.networks import (
    integer_network,
    layers_in_order,
    planned_network,
)
from fitcompress.latency.progress import MeasuredFile
from fitcompress.latency.table import LatencyTable
from fitcompress.model import check_finite, compressible_layers, fingerprint
from fitcompress.progress import Bar
from fitcompress.quantize import activations
from fitcompress.search.plan import Plan

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    from fitcompress.latency.target import LatencyTarget
    from fitcompress.latency.timing import Timing

__all__ = ["LatencyCheck", "check_latency", "measure_latency"]

WIDTHS = (2, 4, 8, 16)  # of the integers that a file can have


@dataclass(frozen=True)
class LatencyCheck:
    """A whole network on the target, against what its table predicts.

    Attributes:
        predicted_ms: By the table.
        measured_ms: Its latency over the float network's in the same turns, times the
            table's float milliseconds: at the speed that the machine had then.
        timing: What was measured just now.
    """

    predicted_ms: float
    measured_ms: float
    timing: Timing

    @property
    def error(self) -> float:
        """Predicted over measured latency, minus 1."""
        return self.predicted_ms / self.measured_ms - 1

    def __str__(self) -> str:
        return (
            f"predicted {self.predicted_ms:.4g} ms ⇒ measured {self.measured_ms:.4g} "
            f"ms ({100 * self.error:+.1f} %); now {self.timing}"
        )


def measure_latency(
    model: nn.Module,
    example_input: Any,
    target: LatencyTarget,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    networks: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LatencyTable:
    """Measure what integer layers do to the latency of a network.

    Whole networks are timed, with random runs of their layers in integers, each in
    turns with the float network, and a sum over layers and over neighbours is fitted
    to their ratios (``latency.interplay``). Layers timed on their own would be several
    times further off: what they gain depends on the next one.

    Args:
        model: The network; its values do not matter, its shapes do. Unchanged.
        example_input: A tensor, a tuple of arguments or a dict of named ones.
        target: Where to measure, such as ``OnnxRuntimeTarget()``.
        weight_bits: 2, 4, 8 or 16: integers to store weights in. Plans with fewer bits
            run the same if exported with ``min_bits`` set to it.
        activation_bits: 2 … 16: bits of inputs; 2 … 8 are all stored in 8.
        networks: How many to time; None: three times the layers, and two.
        checkpoint: Networks measured so far are saved in this file, and a killed call
            goes on from there; removed at the end.
        seed: Of the choice of networks.
        progress: Show a bar with the time left.

    Returns:
        The table, for :func:`fitcompress.search`.

    Raises:
        OptionError: An option cannot work.
        DataError: The model does not run on the example.
        LatencyError: The target could not time a network.
        FitcompressError: As :func:`fitcompress.export_onnx` does, for such targets.
    """
    _check_options(weight_bits, activation_bits, networks)
    layers = compressible_layers(model)
    check_finite(model)
    names = layers_in_order(model, example_input)
    patterns = make_patterns(len(names), networks or 3 * len(names) + 2, seed)
    key = _key(
        fingerprint(model, layers),
        target.fingerprint,
        names,
        weight_bits,
        activation_bits,
        _shapes(example_input),
        patterns.astype(int).tolist(),
    )
    file = MeasuredFile(checkpoint, key)
    rows = file.load()[: len(patterns)]
    if len(rows) < len(patterns):
        small = integer_network(
            model,
            example_input,
            names,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
        )
        opened = target.open(small, example_input, weight_bits=weight_bits)
        with opened as session, Bar("latency", len(patterns), enabled=progress) as bar:
            bar.advance(len(rows))
            for pattern in patterns[len(rows) :]:
                chosen = _chosen(names, pattern)
                timing = session.milliseconds(chosen)
                spread = (timing.q3_ms - timing.q1_ms) / timing.ms
                rows.append([timing.ratio, spread, timing.reference_ms])
                file.save(rows)
                bar.advance(note=f"{timing.ms:.3g} ms")
    numbers = np.array(rows, dtype=np.float64)
    table = LatencyTable(
        names=tuple(names),
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        float_ms=statistics.median(numbers[:, 2].tolist()),
        patterns=patterns,
        ratios=np.ascontiguousarray(numbers[:, 0]),
        spread=np.ascontiguousarray(numbers[:, 1]),
        target=target.fingerprint,
    )
    file.forget()
    return table


def check_latency(
    table: LatencyTable,
    model: nn.Module,
    example_input: Any,
    target: LatencyTarget,
    *,
    plan: Plan | None = None,
) -> LatencyCheck:
    """Measure a whole network; see :meth:`LatencyTable.check`."""
    if target.fingerprint != table.target:
        raise OptionError(
            "the latency table was measured on something else",
            got=target.fingerprint,
            wanted=table.target,
            fix="check on the same target, or measure there",
        )
    if plan is None:
        plan = getattr(model, "_fitcompress_plan", None)
        if not isinstance(plan, Plan):
            raise PlanMismatchError(
                "the model is not compressed, and there is no plan",
                got=type(model).__name__,
                wanted="what apply or load(…, trainable=True) returned, or plan=",
            )
        missing = input_bits(plan).keys() - dict(activations(model)).keys()
        if missing:
            raise PlanMismatchError(
                "the model lacks quantizers that its plan has",
                got=", ".join(sorted(missing)[:6]),
                wanted="the model as apply returned it",
            )
        small = model
    else:
        small = planned_network(model, example_input, plan)
    predicted = table.predict(plan)
    bits = table.weight_bits
    with target.open(small, example_input, weight_bits=bits) as session:
        timing = session.milliseconds(list(input_bits(plan)))
    return LatencyCheck(predicted, timing.ratio * table.float_ms, timing)


def _chosen(names: list[str], pattern: NDArray[np.bool_]) -> list[str]:
    return [name for name, integer in zip(names, pattern, strict=True) if integer]


def _check_options(
    weight_bits: int, activation_bits: int, networks: int | None
) -> None:
    if type(weight_bits) is not int or weight_bits not in WIDTHS:
        raise OptionError(
            "no integers have these weight_bits",
            got=repr(weight_bits),
            wanted=", ".join(map(str, WIDTHS)),
        )
    if type(activation_bits) is not int or not 2 <= activation_bits <= 16:
        raise OptionError("activation_bits", got=repr(activation_bits), wanted="2 … 16")
    if networks is not None and (type(networks) is not int or networks < 2):
        raise OptionError(
            "networks", got=repr(networks), wanted="a whole number, 2 or more"
        )


def _shapes(example: Any) -> list[list[int]]:
    parts = example.values() if isinstance(example, dict) else example
    parts = [parts] if torch.is_tensor(parts) else parts
    return [list(x.shape) for x in parts if torch.is_tensor(x)]


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
