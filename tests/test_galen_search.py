"""Galen: the file of a search, networks that cannot be judged, the end."""

from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import galen_environment
from fitcompress.errors import FormatError, LatencyError, NonFiniteError, OptionError
from fitcompress.methods.galen import ending
from fitcompress.methods.galen.ending import final_network, warn_if_missed
from fitcompress.methods.galen.outcome import Outcome
from fitcompress.methods.galen.policy import ActionMap, Policy
from fitcompress.methods.galen.search import PATIENCE, Search
from fitcompress.methods.galen.sensitivities import (
    LARGEST_KL,
    Sensitivities,
    measure_sensitivities,
)
from fitcompress.search.plan import Level, Plan
from fitcompress.sensitivity.table import Grid
from fitcompress.train.state_file import read_state, write_state
from galen_nets import X, make_net


def judged(policy: Policy) -> Outcome:
    value = sum(policy.channels) / 36 - len(policy.bits) / 8
    return Outcome(value, 0.5, 0.5, 1.0, 2.0)


def failed(why: str) -> Outcome:
    return Outcome.failed(why, 0.3, beta=-5.0, one_sided=False)


def zeros() -> Sensitivities:
    return Sensitivities(*(np.zeros((4, 10)) for _ in range(3)))


def search(path=None, key="a", judge=judged) -> Search:
    actions = ActionMap(round_to=2)
    return Search(
        make_net(),
        galen_environment.walk(),
        actions,
        zeros,
        judge,
        failed,
        warm_up=2,
        seed=0,
        path=path,
        key=key,
    )


def test_a_search_goes_on_where_it_stopped(tmp_path) -> None:
    whole = search()
    whole.run(6, progress=False)
    path = tmp_path / "search"
    for episodes in (2, 3, 6):
        again = search(path)
        again.run(episodes, progress=False)
        assert again.history == whole.history[:episodes]
    assert again.best == whole.best


def test_the_file_of_another_search_is_left_alone(tmp_path) -> None:
    path = tmp_path / "search"
    search(path).run(2, progress=False)
    before = path.read_bytes()
    with pytest.raises(OptionError, match=r"another search.*To fix it: name another"):
        search(path, key="b")
    assert path.read_bytes() == before


def test_damaged_files(tmp_path, caplog) -> None:
    path = tmp_path / "search"
    search(path).run(2, progress=False)
    tensors, numbers = read_state(path, "galen")
    history = [[[8], [["0", 8]]], numbers["history"][0][1]]
    for wrong in (None, [], {"key": "a"}, numbers | {"history": [history]}):
        write_state(path, "galen", tensors, wrong)
        caplog.clear()
        assert search(path).history == []
        assert "is damaged and not used" in caplog.text
    for text in (b"damaged", safetensors.torch.save({"x": X})):
        path.write_bytes(text)
        caplog.clear()
        assert search(path).history == []
        assert "is damaged and not used" in caplog.text
    for begin in ("kl/", "net/actor", "replay/"):
        kept = {k: v for k, v in tensors.items() if not k.startswith(begin)}
        write_state(path, "galen", kept, numbers)
        if begin == "kl/":
            assert search(path).history == []
            continue
        with pytest.raises(FormatError, match="lacks a part of the agent"):
            search(path)


def test_networks_that_cannot_be_judged_count_as_the_worst(tmp_path) -> None:
    count = 0

    def judge(policy: Policy) -> Outcome:
        nonlocal count
        count += 1
        if count in (1, 3):
            raise (LatencyError if count == 1 else NonFiniteError)("broken")
        return judged(policy)

    path = tmp_path / "search"
    found = search(path, judge=judge)
    found.run(4, progress=False)
    outcomes = [outcome for _, outcome in found.history]
    assert [each.failure for each in outcomes] == [
        "LatencyError: broken",
        None,
        "NonFiniteError: broken",
        None,
    ]
    assert outcomes[0].reward == pytest.approx(-5 * (1 / 0.3 - 1))
    assert found.best[1].failure is None
    assert search(path).history == found.history


def test_a_search_in_which_all_fail_raises_and_can_be_repeated(tmp_path) -> None:
    calls = []

    def judge(policy: Policy) -> Outcome:
        calls.append(policy)
        raise LatencyError("no target")

    path = tmp_path / "search"
    with pytest.raises(LatencyError, match="no target"):
        search(path, judge=judge).run(2, progress=False)
    assert len(calls) == 2
    with pytest.raises(LatencyError, match="no target"):
        search(path, judge=judge).run(50, progress=False)
    assert len(calls) == 2 + PATIENCE
    good, whole = search(path), search()
    for each in (good, whole):
        each.run(3, progress=False)
    assert good.history == whole.history


def test_outcomes_of_failures_are_finite() -> None:
    for target, one_sided, wanted in (
        (0.25, False, -15.0),
        (0.9, False, -5.0),
        (2.0, True, -5.0),
    ):
        found = Outcome.failed("why", target, beta=-5, one_sided=one_sided)
        assert found.reward == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("epochs", "longer", "wanted"),
    [(0, None, "episode"), (2, 0.7, "longer"), (2, 0.4, "episode")],
)
def test_the_better_network_is_returned(monkeypatch, epochs, longer, wanted) -> None:
    """With no last training, or one that harms, that of the episode comes back."""
    names = ("retrain_", "estimate_all_norms_", "finish_", "attach_sizes_", "plan_of")
    for name in names:
        monkeypatch.setattr(ending, name, lambda *_, **__: None)
    found = {"longer": longer, "episode": 0.6}
    episodes = SimpleNamespace(
        options=SimpleNamespace(finetune_epochs=epochs, learning_rate=1e-3),
        builder=SimpleNamespace(build=lambda _: "longer", walk=None),
        seed=0,
        make=lambda _: "episode",
        score=lambda name: Outcome(0.0, found[name], 0.3, 1.0, 2.0),
    )
    lessons = SimpleNamespace(inputs=lambda _: [])
    before = Outcome(0.0, 0.6, 0.3, 1.0, 2.0)
    policy = Policy((), ())
    small, after = final_network(
        episodes, policy, before, lessons, checkpoint=None, key="", progress=False
    )
    assert small == wanted
    assert after.accuracy == found[wanted]


def test_a_missed_target_is_told(caplog, searched_plan) -> None:
    warn_if_missed(Outcome(0, 0.9, 0.509, 1, 2), 0.5)
    assert not caplog.text
    warn_if_missed(Outcome(0, 0.9, 0.55, 1, 2), 0.5)
    assert "takes 55.0 % of the dense one's latency, not 50.0 %" in caplog.text
    assert "accuracy 90.00 %, latency 55.0 % of 50 %, " in searched_plan.summary()
    assert "predicted loss rise" not in searched_plan.summary()


@pytest.fixture
def searched_plan() -> Plan:
    levels = {"0": Level(Grid(bits=8), 0.0, (8, 2, 3, 3))}
    details = {"accuracy": 0.9, "share": 0.55, "target": 0.5}
    return Plan(levels, method="galen", details=details)


class Broken(nn.Module):
    """Infinite if its weights are rounded to anything."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("sum", self.layer.weight.detach().sum())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) / (self.layer.weight.sum() == self.sum)


def test_outputs_that_are_not_finite_are_no_small_divergence() -> None:
    net, x = Broken().eval(), torch.randn(8, 4)
    walk = SimpleNamespace(layers=("layer",), leads={}, groups=())
    options = {"prunes": False, "quantizes": True, "progress": False}
    found = measure_sensitivities(net, walk, [x], **options)
    assert (found.weights == LARGEST_KL).all()
    with pytest.raises(NonFiniteError, match="outputs of the dense network"):
        measure_sensitivities(net, walk, [x * torch.inf], **options)
