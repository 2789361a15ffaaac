"""The episodes of a search, one after the other, on disk after each."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fitcompress.errors import ExportError, LatencyError, NonFiniteError
from fitcompress.methods.galen.agent import Agent
from fitcompress.methods.galen.environment import CompressionEnv
from fitcompress.methods.galen.features import Features
from fitcompress.methods.galen.search_file import read_search, write_search
from fitcompress.progress import Bar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from fitcompress.errors import FitcompressError
    from fitcompress.methods.galen.outcome import Outcome
    from fitcompress.methods.galen.policy import ActionMap, Policy
    from fitcompress.methods.galen.sensitivities import Sensitivities
    from fitcompress.methods.galen.walk import Walk

__all__ = ["Search"]

logger = logging.getLogger(__name__)

FAILURES = (LatencyError, NonFiniteError, ExportError)
PATIENCE = 5  # networks, all of which fail, after which more are not tried


class Search:
    """One search; what it knows is in its file after every episode.

    Args:
        model: The dense network.
        walk: Its layers.
        actions: What the agent decides on.
        sensitivities: () → those of the layers, where the file has none.
        judge: Policy → what it is worth. Not asked twice for the same policy.
        failed: Why a policy cannot be judged → what counts instead.
        warm_up: Episodes with random actions.
        seed: Of all that is drawn.
        path: The file, or None.
        key: What the file must be for.

    Attributes:
        history: Every episode's policy and outcome.

    Raises:
        OptionError: The file is that of another search.
        FormatError: The file lacks a part of the agent.
    """

    def __init__(
        self,
        model: nn.Module,
        walk: Walk,
        actions: ActionMap,
        sensitivities: Callable[[], Sensitivities],
        judge: Callable[[Policy], Outcome],
        failed: Callable[[str], Outcome],
        *,
        warm_up: int,
        seed: int,
        path: Path | None,
        key: str,
    ) -> None:
        self._judge, self._failed = judge, failed
        self._path, self._key = path, key
        self.history: list[tuple[Policy, Outcome]] = []
        self._known: dict[Policy, Outcome] = {}
        self._error: FitcompressError | None = None
        state = None if path is None else read_search(path, key)
        found = sensitivities() if state is None else state.sensitivities
        self._sensitivities = found
        features = Features(model, walk, found, actions)
        self._env = CompressionEnv(walk, actions, features, self._outcome)
        self._agent = Agent(self._env, warm_up=warm_up, seed=seed)
        if state is None:
            self._save()
        else:
            state.restore_(self._agent)
            self.history = state.history
            self._known = dict(state.history)

    @property
    def best(self) -> tuple[Policy, Outcome]:
        """The episode of the largest reward, the first of equals."""
        judged = [each for each in self.history if each[1].failure is None]
        return max(judged or self.history, key=lambda each: each[1].reward)

    def run(self, episodes: int, *, progress: bool) -> None:
        """Go on until so many episodes are done.

        Raises:
            LatencyError: No network can be timed.
            NonFiniteError: None can be trained.
            ExportError: None can be written.
        """
        with Bar("galen", episodes, enabled=progress) as bar:
            bar.advance(len(self.history))
            while len(self.history) < episodes:
                self._episode()
                best = self.best[1]
                if best.failure is None:  # else the next run is to try again
                    self._save()
                bar.advance(
                    note=f"best: reward {best.reward:.3f}, accuracy "
                    f"{100 * best.accuracy:.2f} %, latency {100 * best.share:.1f} %"
                )
        if self._error is not None and self.best[1].failure is not None:
            raise self._error

    def _outcome(self, policy: Policy) -> float:
        if policy not in self._known:
            self._known[policy] = self._judged(policy)
        return self._known[policy].reward

    def _judged(self, policy: Policy) -> Outcome:
        try:
            return self._judge(policy)
        except FAILURES as error:
            failures = [each.failure for each in self._known.values()]
            if None not in failures and len(failures) + 1 >= PATIENCE:
                raise
            self._error = error
            logger.warning("a network cannot be judged: %s", error)
            return self._failed(f"{type(error).__name__}: {error}")

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
        if self._path is not None:
            write_search(
                self._path, self._key, self._agent, self._sensitivities, self.history
            )
