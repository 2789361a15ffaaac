"""The agent: what it remembers, learns and draws, and that it can go on."""

import numpy as np
import pytest
import torch

from fitcompress.methods.galen import agent as agent_module
from fitcompress.methods.galen.agent import Agent
from fitcompress.methods.galen.environment import CompressionEnv
from galen_environment import environment


def played(agent: Agent, env: CompressionEnv, episodes: int) -> list[np.ndarray]:
    found = []
    for _ in range(episodes):
        state, _ = env.reset()
        states, actions, done, worth = [state], [], False, 0.0
        while not done:
            actions.append(agent.act(states[-1]))
            state, worth, done, _, _ = env.step(actions[-1])
            states.append(state)
        agent.remember(states, actions, float(worth))
        agent.learn(len(actions))
        found += actions
    return found


def test_every_step_gets_the_reward_of_its_episode() -> None:
    values = iter((3.0, -2.0))
    env = environment(lambda policy: next(values))
    agent = Agent(env, warm_up=10)
    played(agent, env, 2)
    replay = agent._replay
    assert replay.rewards[:8, 0].tolist() == [3.0] * 4 + [-2.0] * 4
    assert replay.dones[:8, 0].tolist() == [0, 0, 0, 1] * 2
    assert replay.buffer_size == 2000


def test_the_agent_is_that_of_the_paper() -> None:
    env = environment()
    agent = Agent(env, warm_up=1, seed=4)
    inner = agent._ddpg
    before = [p.detach().clone() for p in inner.actor.parameters()]
    played(agent, env, 1)
    pairs = zip(before, inner.actor.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "nothing is learnt in warm-up"
    played(agent, env, 2)
    assert [p.shape[0] for p in inner.actor.parameters()][::2] == [400, 300, 3]
    assert inner.actor.optimizer.param_groups[0]["lr"] == 1e-4
    assert inner.critic.optimizer.param_groups[0]["lr"] == 1e-3
    assert (inner.tau, inner.gamma, inner.batch_size) == (1e-3, 0.99, 128)
    assert agent.noise == pytest.approx(0.5 * 0.95**2)
    assert inner._n_updates == 8


def test_noise_is_cut_off_at_the_ends() -> None:
    random = np.random.default_rng(0)
    mean = np.array([0.0, 0.5, 1.0], np.float32)
    drawn = np.stack(
        [agent_module._truncated_normal(mean, 0.5, random) for _ in range(4000)]
    )
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert (drawn == 0).mean() < 0.01
    # half a normal distribution, 0 to 2σ, has the mean .5 (φ(0) − φ(2)) / (Φ(2) − .5)
    assert drawn.mean(0) == pytest.approx([0.361, 0.5, 0.639], abs=0.02)


def test_an_agent_goes_on_as_it_would_have() -> None:
    env = environment(lambda policy: float(policy.channels[0]))
    whole = Agent(env, warm_up=2, seed=4)
    played(whole, env, 4)
    tensors, numbers = whole.tensors(), whole.numbers()
    wanted = played(whole, env, 3)
    other = Agent(env, warm_up=2, seed=99)
    other.restore(tensors, numbers)
    np.testing.assert_array_equal(played(other, env, 3), wanted)
    assert not np.array_equal(played(Agent(env, warm_up=2), env, 3), wanted)


def test_the_agent_learns_what_pays() -> None:
    """Pays for keeping channels: the actor ends far above chance."""
    env = environment(lambda p: sum(p.channels) / 36)
    agent = Agent(env, warm_up=10, seed=0)
    played(agent, env, 10)
    chance = sum(agent._replay.rewards[:40, 0]) / 40
    played(agent, env, 60)
    late = sum(agent._replay.rewards[240:280, 0]) / 40
    assert late > chance + 0.15
