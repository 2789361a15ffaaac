"""The episodes of a search, one after the other, on disk after each."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from fitcompress.errors import FormatError
from fitcompress.files import write_atomically
from fitcompress.methods.galen.agent import Agent
from fitcompress.methods.galen.environment import CompressionEnv
from fitcompress.methods.galen.episode import Outcome
from fitcompress.methods.galen.features import Features
from fitcompress.methods.galen.policy import Policy
from fitcompress.methods.galen.sensitivities import Sensitivities
from fitcompress.progress import Bar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from fitcompress.methods.galen.policy import ActionMap
    from fitcompress.methods.galen.walk import Walk

__all__ = ["Search"]

logger = logging.getLogger(__name__)


class Search:
    """One search; what it knows is in its file after every episode.

    Args:
        model: The dense network.
        walk: Its layers.
        actions: What the agent decides on.
        sensitivities: () → those of the layers, where the file has none.
        judge: Policy → what it is worth. Not asked twice for the same policy.
        warm_up: Episodes with random actions.
        seed: Of all that is drawn.
        path: The file, or None.
        key: What the file must be for.

    Attributes:
        history: Every episode's policy and outcome.
    """

    def __init__(
        self,
        model: nn.Module,
        walk: Walk,
        actions: ActionMap,
        sensitivities: Callable[[], Sensitivities],
        judge: Callable[[Policy], Outcome],
        *,
        warm_up: int,
        seed: int,
        path: Path | None,
        key: str,
    ) -> None:
        self._judge, self._path, self._key = judge, path, key
        self.history: list[tuple[Policy, Outcome]] = []
        self._known: dict[Policy, Outcome] = {}
        tensors, numbers = self._read()
        if tensors:
            kinds = ("channels", "weights", "inputs")
            found = Sensitivities(*(tensors[f"kl/{kind}"].numpy() for kind in kinds))
        else:
            found = sensitivities()
        self._sensitivities = found
        features = Features(model, walk, found, actions)
        self._env = CompressionEnv(walk, actions, features, self._outcome)
        self._agent = Agent(self._env, warm_up=warm_up, seed=seed)
        if tensors:
            self._agent.restore(tensors, numbers["agent"])
            for policy, outcome in numbers["history"]:
                known = Policy.from_list(policy), Outcome(**outcome)
                self.history.append(known)
                self._known[known[0]] = known[1]
        else:
            self._save()

    @property
    def best(self) -> tuple[Policy, Outcome]:
        """The episode of the largest reward, the first of equals."""
        return max(self.history, key=lambda each: each[1].reward)

    def run(self, episodes: int, *, progress: bool) -> None:
        """Go on until so many episodes are done."""
        with Bar("galen", episodes, enabled=progress) as bar:
            bar.advance(len(self.history))
            while len(self.history) < episodes:
                self._episode()
                self._save()
                best = self.best[1]
                bar.advance(
                    note=f"best: reward {best.reward:.3f}, accuracy "
                    f"{100 * best.accuracy:.2f} %, latency {100 * best.share:.1f} %"
                )

    def _outcome(self, policy: Policy) -> float:
        found = self._known.get(policy)
        if found is None:
            found = self._known[policy] = self._judge(policy)
        return found.reward

    def _episode(self) -> None:
        state, _ = self._env.reset()
        states, actions, done, reward = [state], [], False, 0.0
        while not done:
            action = self._agent.act(state)
            state, reward, done, _, _ = self._env.step(action)
            states.append(state)
            actions.append(action)
        policy = self._env.policy
        self.history.append((policy, self._known[policy]))
        self._agent.remember(states, actions, float(reward))
        self._agent.learn(len(actions))

    def _save(self) -> None:
        if self._path is None:
            return
        tensors = self._agent.tensors()
        for kind in ("channels", "weights", "inputs"):
            values = getattr(self._sensitivities, kind)
            tensors[f"kl/{kind}"] = torch.from_numpy(values).clone()
        numbers: dict[str, Any] = {
            "key": self._key,
            "agent": self._agent.numbers(),
            "history": [[p.to_list(), o.to_dict()] for p, o in self.history],
        }
        data = safetensors.torch.save(tensors, {"galen": json.dumps(numbers)})
        write_atomically(self._path, data)

    def _read(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return what a fitting file holds, else nothing."""
        if self._path is None or not self._path.exists():
            return {}, {}
        try:
            with safetensors.safe_open(self._path, framework="pt") as file:
                numbers = json.loads((file.metadata() or {})["galen"])
                if numbers["key"] != self._key:
                    logger.warning(
                        "%s belongs to another run and is not used", self._path
                    )
                    return {}, {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except (
            safetensors.SafetensorError,
            FormatError,
            KeyError,
            ValueError,
            OSError,
        ) as error:
            logger.warning("%s is damaged and not used: %s", self._path, error)
            return {}, {}
        return tensors, numbers
