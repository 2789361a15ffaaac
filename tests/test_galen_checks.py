"""Galen: what is refused before any work, and what makes two searches one."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from fitcompress.cli.models import build_model
from fitcompress.data import Batches
from fitcompress.errors import DataError, EmptyLoaderError, OptionError
from fitcompress.methods import Galen
from fitcompress.methods.galen.checks import (
    check_input,
    check_loader,
    check_seed,
    check_target,
)
from fitcompress.methods.galen.policy import ActionMap
from fitcompress.methods.galen.search_key import search_key
from fitcompress.methods.galen.walk import make_walk
from fitcompress.search.plan import Level, Plan
from fitcompress.sensitivity.table import Grid
from galen_nets import FakeTarget, X, make_loader, make_net


@pytest.mark.parametrize(
    "options",
    [
        {"agent": "none"},
        {"agent": ["joint"]},
        {"integers": None},
        {"episodes": 0},
        {"episodes": True},
        {"target": 0},
        {"target": None},
        {"target": "0.5"},
        {"target": True},
        {"beta": 1},
        {"beta": None},
        {"beta": float("nan")},
        {"retrain_samples": 0},
        {"finetune_epochs": -1},
        {"learning_rate": float("inf")},
        {"learning_rate": "fast"},
        {"round_to": 1.5},
        {"one_sided": "no"},
        {"reconstruct": None},
    ],
    ids=str,
)
def test_options_that_cannot_be_used(options) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Galen(**options)


def test_numbers_of_other_types_can_be_used() -> None:
    assert Galen(target=1, beta=0, retrain_samples=None).target == 1


@pytest.mark.parametrize("seed", [-1, 1.0, None, 2**63, True], ids=str)
def test_seeds_that_cannot_be_used(seed) -> None:
    check_seed(2**63 - 1)
    with pytest.raises(OptionError, match="seed"):
        check_seed(seed)


def test_models_that_cannot_be_used() -> None:
    with pytest.raises(OptionError, match="model; got NoneType"):
        check_input(None, X, trains=True)
    net = make_net().requires_grad_(False)
    with pytest.raises(OptionError, match="nothing to train"):
        check_input(net, X, trains=True)
    check_input(net, X, trains=False)


class Old:
    """A target that no other network can be a reference of."""

    fingerprint = "old"

    def open(self, model, example_input, *, weight_bits):
        return contextlib.nullcontext()


class Open(Old):
    """One that takes whatever comes."""

    def open(self, model, example_input, **more):
        return contextlib.nullcontext()


def test_targets_that_cannot_be_used() -> None:
    for target in (None, "onnx", object()):
        with pytest.raises(OptionError, match="latency_target"):
            check_target(target)
    with pytest.raises(OptionError, match="without reference="):
        check_target(Old())
    check_target(Open())
    check_target(FakeTarget())


def test_loaders_that_can_be_read_once() -> None:
    for loader in (make_loader(), list(make_loader())):
        check_loader("loader", loader)
    with pytest.raises(DataError, match="can be read only once"):
        check_loader("loader", iter(list(make_loader())))
    with pytest.raises(EmptyLoaderError, match="generator was used up"):
        check_loader("loader", (x for x in [torch.zeros(4, 2)]))
    with pytest.raises(DataError, match="validation cannot be read"):
        check_loader("validation", None)


def test_checks_draw_nothing() -> None:
    data = torch.utils.data.TensorDataset(torch.zeros(8, 2))
    before = torch.get_rng_state()
    check_loader("loader", torch.utils.data.DataLoader(data, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_the_episodes_depend_on_is_in_the_key() -> None:
    net, validation, method = make_net(), make_loader(16), Galen()

    def key(method=method, validation=validation, example=X) -> str:
        return search_key(method, net, 0, [X], validation, example, FakeTarget())

    assert key() == key()
    assert key(replace(method, episodes=7, finetune_epochs=0)) == key()
    assert key(replace(method, warm_up=7)) != key()
    assert key(example=torch.zeros(1, 2, 16, 16)) != key()
    assert key(example=X.double()) != key()
    x, y = validation.inputs, validation.targets
    assert key(validation=Batches(x, y.roll(1), batch_size=16)) != key()
    assert key(validation=Batches(x + 1, y, batch_size=16)) != key()


def test_groups_as_narrow_as_a_step_are_not_decided_on() -> None:
    walk = make_walk(make_net(), X, ActionMap("pruning", round_to=8))
    assert walk.layers == ("3", "5")
    assert [group.width for group in walk.groups] == [12, 16]
    assert walk.left_out["0"] == "8 channels, round_to=8"
    with pytest.raises(OptionError, match="lower round_to"):
        make_walk(make_net(), X, ActionMap("pruning", round_to=16))


class Tied(nn.Module):
    """Two layers with one weight between others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.last, self.end = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(self.first(x).relu()).relu()).relu()
        return self.end(self.last(x).relu())


def test_layers_beside_a_shared_weight_keep_their_channels() -> None:
    walk = make_walk(Tied().eval(), torch.zeros(1, 6), ActionMap(round_to=2))
    assert [group.layers for group in walk.groups] == [("last",)]
    assert walk.left_out["first"] == "one shares a parameter with another layer"


def test_models_without_channels_by_name(tmp_path) -> None:
    levels = {"classifier": Level(Grid(bits=8), 0.0, (10, 72))}
    kept = {"classifier": {"in": [0, 5]}}
    Plan(levels, details={"kept_channels": kept}).save(tmp_path / "galen.json")
    model = build_model("digits", tmp_path / "galen.json")
    assert model.get_submodule("classifier").weight.shape == (10, 2)
    for details, message in (
        ({}, "nothing of channels"),
        ({"kept_channels": [1]}, "no list"),
    ):
        Plan(levels, details=details).save(tmp_path / "other.json")
        with pytest.raises(OptionError, match=message):
            build_model("digits", tmp_path / "other.json")
