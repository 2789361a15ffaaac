"""The agent: DDPG of Stable-Baselines3, its replay buffer, and its noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from stable_baselines3 import DDPG
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger

from fitcompress.methods.galen.features import Standardizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import gymnasium
    from numpy.typing import NDArray

__all__ = ["Agent"]

HIDDEN = [400, 300]
ACTOR_RATE, CRITIC_RATE = 1e-4, 1e-3
TAU, GAMMA = 1e-3, 0.99
REPLAY, BATCH = 2000, 128
NOISE, DECAY = 0.5, 0.95


class Agent:
    """Deep deterministic policy gradient (Lillicrap et al. 2016, arXiv 1509.02971).

    Actor and critic have 400 and 300 hidden units; Adam with 1e-4 and 1e-3; τ = 1e-3,
    γ = .99; a replay buffer of 2000 steps, batches of 128. Actions of the first
    episodes are uniform; later ones are drawn from a normal distribution around the
    actor's, cut off at 0 and 1, of deviation .5 · .95^episode. States are standardised
    by all that were seen, at the time when they are used.

    Args:
        env: Where it acts.
        warm_up: Episodes with uniform actions, after which nothing is learnt yet.
        seed: Of the networks, the noise and the replay.

    Attributes:
        episode: How many were remembered.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], *, warm_up: int = 10, seed: int = 0
    ) -> None:
        assert env.observation_space.shape is not None
        self.episode, self.warm_up = 0, warm_up
        self.standardizer = Standardizer(env.observation_space.shape[0])
        self._random = np.random.default_rng(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._ddpg = _Ddpg(
                "MlpPolicy",
                env,
                learning_rate=ACTOR_RATE,
                buffer_size=REPLAY,
                batch_size=BATCH,
                tau=TAU,
                gamma=GAMMA,
                policy_kwargs={"net_arch": HIDDEN},
                replay_buffer_class=_Replay,
                device="cpu",
            )
        self._ddpg.set_logger(Logger(folder=None, output_formats=[]))
        replay = self._ddpg.replay_buffer
        assert isinstance(replay, _Replay)
        self._replay = replay
        replay.standardizer, replay.random = self.standardizer, self._random

    def act(self, state: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the actions of one step."""
        self.standardizer.update(state)
        size = self._ddpg.action_space.shape
        if self.episode < self.warm_up:
            return self._random.uniform(size=size).astype(np.float32)
        mean = self.best_action(state)
        return _truncated_normal(mean, self.noise, self._random)

    def best_action(self, state: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the actor's actions, without noise."""
        found, _ = self._ddpg.predict(self.standardizer(state), deterministic=True)
        actions: NDArray[np.float32] = np.clip(found, 0.0, 1.0).astype(np.float32)
        return actions

    @property
    def noise(self) -> float:
        """The deviation of the actions: .5 · .95^(episodes after the warm-up)."""
        return float(NOISE * DECAY ** max(0, self.episode - self.warm_up))

    def remember(
        self,
        states: Sequence[NDArray[np.float32]],
        actions: Sequence[NDArray[np.float32]],
        reward: float,
    ) -> None:
        """Store an episode, the one reward at every step of it.

        The buffer gets the steps only when the episode is over. So no step has to learn
        across twenty others what its network was worth, and Q of a step is the sum of
        the rest of the episode: larger for earlier layers, the same for all actions
        there.

        Args:
            states: As they were seen, one more than actions.
            actions: In [0, 1].
            reward: Of the episode.
        """
        for number, action in enumerate(actions):
            self._replay.add(
                states[number][None],
                states[number + 1][None],
                self._ddpg.policy.scale_action(action)[None],
                np.array([reward], np.float32),
                np.array([number + 1 == len(actions)]),
                [{}],
            )
        self.episode += 1

    def learn(self, steps: int) -> None:
        """Make so many updates, one for every step of the episode; none in warm-up."""
        if self.episode <= self.warm_up:
            return
        with torch.random.fork_rng(devices=[]):
            self._ddpg.train(gradient_steps=steps, batch_size=BATCH)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything numeric that the next episode depends on."""
        found = {f"net/{k}": v for k, v in self._ddpg.policy.state_dict().items()}
        for key, optimizer in self._optimizers().items():
            for index, parameter in enumerate(_parameters(optimizer)):
                for name, value in optimizer.state.get(parameter, {}).items():
                    found[f"{key}/{index}/{name}"] = value
        for name in _ARRAYS:
            array = getattr(self._replay, name)
            found[f"replay/{name}"] = torch.from_numpy(array)
        found["standardizer"] = torch.from_numpy(self.standardizer.values)
        return {k: v.detach().clone().contiguous() for k, v in found.items()}

    def numbers(self) -> dict[str, Any]:
        """Return the rest of it, as JSON can hold it."""
        return {
            "episode": self.episode,
            "position": int(self._replay.pos),
            "full": bool(self._replay.full),
            "updates": int(self._ddpg._n_updates),
            "random": self._random.bit_generator.state,
        }

    def restore(
        self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]
    ) -> None:
        """Go on from what :meth:`tensors` and :meth:`numbers` returned."""
        net = {k[4:]: v for k, v in tensors.items() if k.startswith("net/")}
        self._ddpg.policy.load_state_dict(net)
        for key, optimizer in self._optimizers().items():
            for index, parameter in enumerate(_parameters(optimizer)):
                begin = f"{key}/{index}/"
                own = {k: v for k, v in tensors.items() if k.startswith(begin)}
                for name, value in own.items():
                    optimizer.state[parameter][name[len(begin) :]] = value.clone()
        for name in _ARRAYS:
            getattr(self._replay, name)[...] = tensors[f"replay/{name}"].numpy()
        self.standardizer.values[...] = tensors["standardizer"].numpy()
        self.episode = int(numbers["episode"])
        self._replay.pos, self._replay.full = numbers["position"], numbers["full"]
        self._ddpg._n_updates = int(numbers["updates"])
        self._random.bit_generator.state = numbers["random"]

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "actor": self._ddpg.actor.optimizer,
            "critic": self._ddpg.critic.optimizer,
        }


_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones")


class _Ddpg(DDPG):
    """DDPG whose critic learns at a rate of its own."""

    def _update_learning_rate(self, optimizers: Any) -> None:
        for optimizer in optimizers:
            critic = optimizer is self.critic.optimizer
            for group in optimizer.param_groups:
                group["lr"] = CRITIC_RATE if critic else ACTOR_RATE


class _Replay(ReplayBuffer):
    """A buffer of states as they are, which standardises what it is asked for.

    Attributes:
        standardizer: Of states.
        random: Draws the batches; nothing else in the process does.
    """

    standardizer: Standardizer
    random: np.random.Generator

    def sample(self, batch_size: int, env: Any = None) -> Any:
        """Return a batch, drawn with replacement."""
        size = self.buffer_size if self.full else self.pos
        index = self.random.integers(0, size, size=batch_size)
        states = self.standardizer(self.observations[index, 0])
        following = self.standardizer(self.next_observations[index, 0])
        found = super()._get_samples(index, env=None)
        return found._replace(
            observations=self.to_torch(states),
            next_observations=self.to_torch(following),
        )


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _truncated_normal(
    mean: NDArray[np.float32], deviation: float, random: np.random.Generator
) -> NDArray[np.float32]:
    """Draw from a normal distribution that is cut off at 0 and 1."""
    centre = torch.from_numpy(mean.astype(np.float64))
    low, high = (torch.special.ndtr((end - centre) / deviation) for end in (0, 1))
    place = low + torch.from_numpy(random.uniform(size=mean.shape)) * (high - low)
    drawn = centre + deviation * torch.special.ndtri(place)
    found: NDArray[np.float32] = drawn.clamp(0, 1).numpy().astype(np.float32)
    return found
