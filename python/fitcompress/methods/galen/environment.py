"""The walk through the layers, as an environment of Gymnasium."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces

from fitcompress.methods.galen.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fitcompress.methods.galen.features import Features
    from fitcompress.methods.galen.policy import ActionMap
    from fitcompress.methods.galen.walk import Walk

__all__ = ["CompressionEnv"]

LARGEST = 1e4  # number in a state


class CompressionEnv(gymnasium.Env[Any, Any]):
    """One step a layer; the episode ends with the last one, and so comes its reward.

    Steps before it are worth 0 here. What the search stores in its replay buffer is the
    one reward of the episode at every step, see ``Agent.remember``.

    Args:
        walk: Layers and groups.
        actions: What the actions mean.
        features: The states.
        judge: Policy → reward: compresses, retrains and measures the network.

    Attributes:
        policy: What has been decided so far; all else is dense.
    """

    def __init__(
        self,
        walk: Walk,
        actions: ActionMap,
        features: Features,
        judge: Callable[[Policy], float],
    ) -> None:
        self._walk, self._actions, self._features = walk, actions, features
        self._judge = judge
        self.observation_space = spaces.Box(
            -LARGEST, LARGEST, (features.size,), np.float32
        )
        self.action_space = spaces.Box(0.0, 1.0, (actions.size,), np.float32)
        self._start()

    def _start(self) -> None:
        self.policy = Policy(tuple(group.width for group in self._walk.groups), ())
        self._number = 0
        self._previous = [0.0] * self._actions.size

    def _state(self) -> NDArray[np.float32]:
        return self._features.state(self._number, self.policy, self._previous)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Go back to the first layer of the dense network."""
        super().reset(seed=seed, options=options)
        self._start()
        return self._state(), {}

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Decide on one layer."""
        taken = [min(max(float(a), 0.0), 1.0) for a in action]
        name = self._walk.layers[self._number]
        channels, bits = list(self.policy.channels), self.policy.bits
        if name in self._walk.leads:
            group = self._walk.leads[name]
            width = self._walk.groups[group].width
            channels[group] = self._actions.channels(taken, width)
        elif self._actions.prunes:
            taken[0] = 0.0  # it decides on nothing
        if (found := self._actions.bits(taken)) is not None:
            bits = (*bits, (name, *found))
        self.policy = Policy(tuple(channels), bits)
        self._previous, self._number = taken, self._number + 1
        done = self._number == len(self._walk.layers)
        reward = self._judge(self.policy) if done else 0.0
        return self._state(), reward, done, False, {"policy": self.policy.to_list()}
