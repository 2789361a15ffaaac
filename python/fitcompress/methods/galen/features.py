"""What an agent sees of a layer, and its standardisation along the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import nn

    from fitcompress.methods.galen.policy import ActionMap, Policy
    from fitcompress.methods.galen.sensitivities import Sensitivities
    from fitcompress.methods.galen.walk import Walk

__all__ = ["Features", "Standardizer"]

LEAST_KL = 1e-6  # nats, below which a sensitivity is nothing
FLOAT_BOPS = 32 * 32


class Features:
    """The state of every step.

    Number of the layer; its multiply-accumulates and weights, in logarithms and as
    shares of the network's; output and input channels, kernel, stride; whether it
    decides on channels; what is left of its inputs and outputs; the bit operations of
    the layers before, as they have been compressed, and of those from here on, as if
    they stayed, both as shares of the dense network's; log₁₀ of the sensitivities; and
    the actions of the step before. Channels of a group that was decided on count in
    later layers too.

    Args:
        model: The dense network.
        walk: Its layers.
        sensitivities: Of these.
        actions: What is decided on.
    """

    def __init__(
        self,
        model: nn.Module,
        walk: Walk,
        sensitivities: Sensitivities,
        actions: ActionMap,
    ) -> None:
        self._walk = walk
        self._dense = max(FLOAT_BOPS * sum(walk.macs.values()), 1)
        weights = {name: _weights(model, name) for name in walk.macs}
        total = sum(weights.values())
        macs = max(sum(walk.macs.values()), 1)
        self._fixed = []
        for number, name in enumerate(walk.layers):
            module: Any = model.get_submodule(name)
            kl = sensitivities.of(
                number, prunes=actions.prunes, quantizes=actions.quantizes
            )
            own = [
                number / len(walk.layers),
                np.log10(1 + walk.macs[name]),
                walk.macs[name] / macs,
                np.log10(1 + weights[name]),
                weights[name] / total,
                np.log2(module.weight.shape[0]),
                np.log2(module.weight.shape[1]),
                _first(getattr(module, "kernel_size", 1)),
                _first(getattr(module, "stride", 1)),
                float(name in walk.leads),
            ]
            self._fixed.append(np.concatenate([own, np.log10(kl + LEAST_KL)]))
        self.size = len(self._fixed[0]) + 4 + actions.size

    def state(
        self, number: int, policy: Policy, previous: Sequence[float]
    ) -> NDArray[np.float32]:
        """Return the state at one step, as it is, [size].

        Args:
            number: Of the step; the number of steps after the last one.
            policy: What has been decided so far, all else dense.
            previous: The actions of the step before, zeros at the first.
        """
        walk, last = self._walk, len(self._fixed) - 1
        here = min(number, last)
        name = walk.layers[here]
        done = set(walk.layers[:number])
        before = sum(walk.bops_of(each, policy) for each in walk.layers[:number])
        rest = [each for each in walk.macs if each not in done]
        after = sum(walk.bops_of(each, policy) for each in rest)
        dynamic = [
            walk.remaining(name, "in", policy.channels),
            walk.remaining(name, "out", policy.channels),
            before / self._dense,
            after / self._dense,
        ]
        return np.concatenate([self._fixed[here], dynamic, previous]).astype(np.float32)


class Standardizer:
    """Mean and deviation of all states so far, updated as they come.

        x ↦ clip((x − mean) / √(variance + 10⁻⁸), −10, 10)

    Args:
        size: Length of a state.

    Attributes:
        values: Count, means and sums of squared deviations, float64 [1 + 2 · size].
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.values = np.zeros(1 + 2 * size)

    def update(self, state: NDArray[np.float32]) -> None:
        """Take one more state in (Welford 1962)."""
        self.values[0] += 1
        mean, squares = self.values[1 : 1 + self.size], self.values[1 + self.size :]
        off = state.astype(np.float64) - mean
        mean += off / self.values[0]
        squares += off * (state - mean)

    def __call__(self, states: NDArray[Any]) -> NDArray[np.float32]:
        """Return states [..., size] standardised."""
        count = max(self.values[0], 1.0)
        mean, squares = self.values[1 : 1 + self.size], self.values[1 + self.size :]
        scaled = (states - mean) / np.sqrt(squares / count + 1e-8)
        found: NDArray[np.float32] = np.clip(scaled, -10, 10).astype(np.float32)
        return found


def _weights(model: nn.Module, name: str) -> int:
    weight: Any = model.get_submodule(name).weight
    return int(weight.numel())


def _first(value: Any) -> float:
    return float(value[0] if isinstance(value, tuple) else value)
