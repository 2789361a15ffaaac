"""Rewards, actions, states and the environment."""

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import galen_environment
from fitcompress.errors import FormatError, OptionError
from fitcompress.methods.galen.features import Standardizer
from fitcompress.methods.galen.policy import ActionMap, Policy
from fitcompress.methods.galen.reward import reward
from fitcompress.methods.galen.sensitivities import BITS, measure_sensitivities
from fitcompress.methods.galen.walk import make_walk
from galen_environment import environment
from galen_nets import X, make_net


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
    seven = ActionMap("joint", integers="int8", most_bits=7)
    assert seven.bits([0.0, 0.2, 0.9]) == (7, 8)
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


def test_the_walk_and_its_costs() -> None:
    walk = galen_environment.walk()
    assert walk.layers == ("0", "3", "5", "9")
    assert [group.width for group in walk.groups] == [8, 12, 16]
    assert dict(walk.leads) == {"0": 0, "3": 1, "5": 2}
    assert walk.macs_of("3", (4, 6, 16)) == walk.macs["3"] / 4
    assert walk.macs_of("9", (8, 12, 4)) == walk.macs["9"] / 4
    policy = Policy((4, 6, 16), (("3", 8, 4),))
    assert walk.bops_of("3", policy) == walk.macs["3"] / 4 * 32
    assert walk.bops_of("9", policy) == walk.macs["9"] * 1024
    only = make_walk(make_net(), X, ActionMap("pruning", round_to=4))
    assert only.layers == ("0", "3", "5")
    only = make_walk(make_net(), X, ActionMap("pruning", round_to=8))
    assert only.layers == ("3", "5")  # eight channels are the fewest
    with pytest.raises(OptionError, match="can lose channels"):
        make_walk(torch.nn.Linear(4, 2), torch.zeros(1, 4), ActionMap("pruning"))


def test_sensitivities_rise_with_the_strength() -> None:
    sensitivities = galen_environment.sensitivities()
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


def test_gymnasium_accepts_the_environment() -> None:
    env = environment()
    check_env(env, skip_render_check=True)


def test_rewards_come_with_the_last_layer() -> None:
    seen = []
    env = environment(lambda policy: seen.append(policy) or 7.0)
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
