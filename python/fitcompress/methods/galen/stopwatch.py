"""Latencies of smaller networks beside the dense float one, in the same turns."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from fitcompress.latency.networks import planned_network
from fitcompress.methods.galen.result import FLOAT_BITS
from fitcompress.model import compressible_layers
from fitcompress.quantize import activations
from fitcompress.search.plan import Level, Plan
from fitcompress.sensitivity.table import Grid

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from fitcompress.latency.target import LatencySession, LatencyTarget
    from fitcompress.latency.timing import Timing

__all__ = ["Stopwatch"]


class Stopwatch:
    """Times networks on a target; made by :meth:`of`.

    Args:
        target: Where.
        example: An input.
        weight_bits: Integers that weights are stored in, at least.
        reference: The session of the dense network.
    """

    def __init__(
        self,
        target: LatencyTarget,
        example: Any,
        weight_bits: int,
        reference: LatencySession,
    ) -> None:
        self._target, self._example = target, example
        self._weight_bits, self._reference = weight_bits, reference

    @classmethod
    @contextlib.contextmanager
    def of(
        cls, target: LatencyTarget, dense: nn.Module, example: Any, weight_bits: int
    ) -> Iterator[Stopwatch]:
        """Get ready: the dense network is traced once.

        Raises:
            FitcompressError: As the target raises them.
        """
        levels = {
            layer.name: Level(Grid(bits=FLOAT_BITS), 0.0, layer.shape)
            for layer in compressible_layers(dense)
        }
        held = planned_network(dense, example, Plan(levels))
        with target.open(held, example, weight_bits=weight_bits) as reference:
            yield cls(target, example, weight_bits, reference)

    def time(self, small: nn.Module) -> Timing:
        """Time a finished network and the dense one in turns.

        Raises:
            FitcompressError: As the target raises them.
        """
        layers = [name for name, _ in activations(small)]
        with self._target.open(
            small,
            self._example,
            weight_bits=self._weight_bits,
            reference=self._reference,
        ) as session:
            return session.milliseconds(layers)
