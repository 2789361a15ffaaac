"""Rewards, actions, states, the environment and the agent."""

import numpy as np
import pytest
import torch

from fitcompress.errors import FormatError, OptionError
from fitcompress.methods.galen.features import Features, Standardizer
from fitcompress.methods.galen.policy import ActionMap, Policy
from fitcompress.methods.galen.reward import reward
from fitcompress.methods.galen.sensitivities import (
    BITS,
    Sensitivities,
    measure_sensitivities,
)
from fitcompress.methods.galen.walk import Walk, make_walk
from galen_nets import X, make_loader, make_net

for package in ("torch_pruning", "gymnasium", "stable_baselines3"):
    pytest.importorskip(package)

from gymnasium.utils.env_checker import check_env

from fitcompress.methods.galen import agent as agent_module
from fitcompress.methods.galen.agent import Agent
from fitcompress.methods.galen.environment import CompressionEnv


def test_rewards() -> None:
    assert reward(0.9, 0.5, 0.5) == 0.9
    assert reward(0.9, 0.6, 0.5) == pytest.approx(0.9 - 5 * 0.2)
    assert reward(0.9, 0.4, 0.5) == pytest.approx(0.9 - 5 * 0.2)
    assert reward(0.9, 0.4, 0.5, one_sided=True) == 0.9
    assert reward(0.9, 1.0, 0.5, beta=-1, one_sided=True) == pytest.approx(-0.1)
    for wrong in ({"share": 0}, {"target": -1}, {"beta": 1}, {"accuracy": np.nan}):
        with pytest.raises(OptionError):
            reward(**({"accuracy": 1.0, "share": 1.0, "target": 0.5} | wrong))


def test_channels_are_rounded_up() -> None:
    actions = ActionMap(round_to=8)
    found = [actions.channels([a, 0, 0], 32) for a in (0, 0.2, 0.25, 0.5, 0.95, 1)]
    assert found == [32, 32, 24, 16, 8, 8]
    assert actions.channels([1, 0, 0], 5) == 5
    assert actions.channels([0.01, 0, 0], 20) == 20
    assert ActionMap("quantization").channels([1, 1], 32) == 32


def test_bits_follow_the_rule_of_the_paper() -> None:
    mixed = ActionMap("quantization", "mixed", most_bits=8)
    assert mixed.bits([0.2, 0.1]) is None
    assert mixed.bits([0.3, 0.1]) == (8, 8)
    assert mixed.bits([0.5, 0.5]) == (8, 8)
    # a′ = .5 of the weight: ⌊.5 · 8⌋ + 1 = 5; of the input, below .5: 9, clipped to 8
    assert mixed.bits([0.1, 0.75]) == (5, 8)
    assert mixed.bits([0.75, 0.6]) == (7, 5)
    assert mixed.bits([1.0, 1.0]) == (2, 2)
    only8 = ActionMap("joint", "int8")
    assert only8.bits([0.9, 0.2, 0.2]) is None
    assert only8.bits([0.0, 0.2, 0.9]) == (8, 8)
    assert ActionMap("pruning").bits([1.0]) is None
    assert [ActionMap(kind).size for kind in ("pruning", "quantization")] == [1, 2]
    assert ActionMap().size == 3
    with pytest.raises(OptionError):
        only8.bits([0, 0, 1.5])


@pytest.mark.parametrize(
    "options",
    [
        {"agent": "both"},
        {"integers": "int4"},
        {"round_to": 0},
        {"most_bits": 1},
        {"most_bits": 8.0},
    ],
)
def test_actions_that_mean_nothing(options) -> None:
    with pytest.raises(OptionError):
        ActionMap(**options)


def test_policies_survive_json() -> None:
    policy = Policy((8, 3), (("a", 8, 4),))
    assert Policy.from_list(policy.to_list()) == policy
    for wrong in ([1], [[1], [["a", 8]]], None):
        with pytest.raises(FormatError):
            Policy.from_list(wrong)


@pytest.fixture(scope="module")
def walk() -> Walk:
    return make_walk(make_net(), X, ActionMap(round_to=2))


@pytest.fixture(scope="module")
def sensitivities(walk: Walk) -> Sensitivities:
    inputs = [x for x, _ in make_loader(32)]
    return measure_sensitivities(
        make_net(), walk, inputs, prunes=True, quantizes=True, progress=False
    )


def environment(walk, sensitivities, judge=lambda policy: 1.0) -> CompressionEnv:
    actions = ActionMap(round_to=2)
    features = Features(make_net(), walk, sensitivities, actions)
    return CompressionEnv(walk, actions, features, judge)


def test_the_walk_and_its_costs(walk: Walk) -> None:
    assert walk.layers == ("0", "3", "5", "9")
    assert [group.width for group in walk.groups] == [8, 12, 16]
    assert dict(walk.leads) == {"0": 0, "3": 1, "5": 2}
    assert walk.macs_of("3", (4, 6, 16)) == walk.macs["3"] / 4
    assert walk.macs_of("9", (8, 12, 4)) == walk.macs["9"] / 4
    policy = Policy((4, 6, 16), (("3", 8, 4),))
    assert walk.bops_of("3", policy) == walk.macs["3"] / 4 * 32
    assert walk.bops_of("9", policy) == walk.macs["9"] * 1024
    only = make_walk(make_net(), X, ActionMap("pruning"))
    assert only.layers == ("0", "3", "5")
    with pytest.raises(OptionError, match="can lose channels"):
        make_walk(torch.nn.Linear(4, 2), torch.zeros(1, 4), ActionMap("pruning"))


def test_sensitivities_rise_with_the_strength(sensitivities: Sensitivities) -> None:
    assert sensitivities.channels.shape == (4, 10)
    assert (sensitivities.channels[3] == 0).all()
    for kind in (sensitivities.weights, sensitivities.inputs):
        assert (kind[:, 0] > 10 * kind[:, BITS.index(8)]).all()
    assert (sensitivities.channels[:3, 8] > sensitivities.channels[:3, 1]).all()
    net, before = make_net(), make_net().state_dict()
    walk = make_walk(net, X, ActionMap())
    measure_sensitivities(net, walk, [X], prunes=True, quantizes=True, progress=False)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(a, before[k]) for k, a in net.state_dict().items())


def test_states_are_standardised_by_all_that_were_seen() -> None:
    states = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    standardizer = Standardizer(4)
    for state in states:
        standardizer.update(state)
    wanted = (states - states.mean(0)) / states.std(0)
    np.testing.assert_allclose(standardizer(states), wanted, atol=1e-4)
    assert standardizer(states + 1e6).max() == 10


def test_gymnasium_accepts_the_environment(walk, sensitivities) -> None:
    env = environment(walk, sensitivities)
    check_env(env, skip_render_check=True)


def test_rewards_come_with_the_last_layer(walk, sensitivities) -> None:
    seen = []
    env = environment(walk, sensitivities, lambda policy: seen.append(policy) or 7.0)
    first, _ = env.reset()
    actions = [[0.5, 0.1, 0.1], [0.0, 0.9, 0.0], [1.0, 0.0, 0.0], [0.9, 0.3, 0.3]]
    found = [env.step(np.array(a, np.float32)) for a in actions]
    assert [each[1] for each in found] == [0, 0, 0, 7.0]
    assert [each[2] for each in found] == [False, False, False, True]
    assert seen == [Policy((4, 12, 2), (("3", 8, 8), ("9", 8, 8)))]
    # half of the inputs of the second layer are gone
    assert found[0][0][-7] == pytest.approx(0.5)
    assert first[-7] == 1
    np.testing.assert_allclose(found[1][0][-3:], [0, 0.9, 0], atol=1e-6)
    # the last layer decides on no channels: its action there counts as none
    np.testing.assert_allclose(found[3][0][-3:], [0, 0.3, 0.3], atol=1e-6)


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


def test_every_step_gets_the_reward_of_its_episode(walk, sensitivities) -> None:
    values = iter((3.0, -2.0))
    env = environment(walk, sensitivities, lambda policy: next(values))
    agent = Agent(env, warm_up=10)
    played(agent, env, 2)
    replay = agent._replay
    assert replay.rewards[:8, 0].tolist() == [3.0] * 4 + [-2.0] * 4
    assert replay.dones[:8, 0].tolist() == [0, 0, 0, 1] * 2
    assert replay.buffer_size == 2000


def test_the_agent_is_that_of_the_paper(walk, sensitivities) -> None:
    env = environment(walk, sensitivities)
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
    # half a normal distribution from 0 to 2σ: its mean is .5 (φ(0) − φ(2)) / (Φ(2) − .5)
    assert drawn.mean(0) == pytest.approx([0.361, 0.5, 0.639], abs=0.02)


def test_an_agent_goes_on_as_it_would_have(walk, sensitivities) -> None:
    env = environment(walk, sensitivities, lambda policy: float(policy.channels[0]))
    whole = Agent(env, warm_up=2, seed=4)
    played(whole, env, 4)
    tensors, numbers = whole.tensors(), whole.numbers()
    wanted = played(whole, env, 3)
    other = Agent(env, warm_up=2, seed=99)
    other.restore(tensors, numbers)
    np.testing.assert_array_equal(played(other, env, 3), wanted)
    assert not np.array_equal(played(Agent(env, warm_up=2), env, 3), wanted)


def test_the_agent_learns_what_pays(walk, sensitivities) -> None:
    """Pays for keeping channels: the actor ends far above chance."""
    env = environment(walk, sensitivities, lambda p: sum(p.channels) / 36)
    agent = Agent(env, warm_up=10, seed=0)
    played(agent, env, 10)
    chance = sum(agent._replay.rewards[:40, 0]) / 40
    played(agent, env, 60)
    late = sum(agent._replay.rewards[240:280, 0]) / 40
    assert late > chance + 0.15
