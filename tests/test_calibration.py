"""Calibration inputs: batches, samples that mix, data that is not as in training."""

from __future__ import annotations

import logging
import math
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.compensate import calibration
from fitcompress.compensate.calibration import (
    Calibration,
    check_independent,
    norm_divergence,
    prepare,
)
from fitcompress.data import Batches
from fitcompress.errors import CalibrationError, NonFiniteError
from fitcompress.model import compressible_layers
from fitcompress.quantize import fold_norms_
from fitcompress.storage.save_load import packed_bytes

if TYPE_CHECKING:
    from collections.abc import Callable


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    return {layer.name: layer.module for layer in compressible_layers(model)}


def plan_for(model: nn.Module, grid: fc.Grid) -> fc.Plan:
    layers = compressible_layers(model)
    return fc.Plan({x.name: fc.Level(grid, 0.0, x.shape) for x in layers})


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [96, 600])  # without and with a pilot
def test_how_the_loader_cuts_its_batches_does_not_matter(
    net, sensitivity, count
) -> None:
    x, plan = noise(count, 2, 6, 6), fc.search(sensitivity, fc.Budget(size=1150))
    files = set()
    for size in (1, 7, 100):
        loader = Batches(x, batch_size=size)
        made = fc.apply(net, plan, loader, samples=count - 6, progress=False)
        files.add(packed_bytes(made))
    assert len(files) == 1


def test_batches_are_of_one_size(monkeypatch) -> None:
    model = nn.Linear(4, 3)

    def sizes(count: int, loader_size: int = 50) -> list[int]:
        loader = Batches(noise(count, 4), batch_size=loader_size)
        made = prepare(model, modules_of(model), loader, None)
        assert torch.equal(torch.cat(made.batches), loader.inputs)
        return [len(x) for x in made.batches]

    assert sizes(3) == [1, 1, 1]
    assert sizes(96) == [12] * 8
    assert sizes(1024) == [128] * 8
    assert sizes(2000) == [*[128] * 15, 80]
    monkeypatch.setattr(calibration, "BATCH_BYTES", 5 * 16)
    assert sizes(50) == [5] * 10
    monkeypatch.setattr(calibration, "PASSES", 4)
    assert sizes(50) == [13, 13, 13, 11]


def test_inputs_of_other_shapes_are_not_joined() -> None:
    model = nn.Conv1d(2, 3, 3)
    given = [noise(8, 2, 10), noise(8, 2, 12)]
    made = prepare(model, modules_of(model), given, None)
    assert {x.shape[1:] for x in made.batches} == {(2, 10), (2, 12)}


def test_every_fourth_batch_is_held_out_and_few_find_the_size() -> None:
    batches = list(noise(1024, 1).split(64))
    made = Calibration(batches)
    assert [n for n, out in enumerate(made.held_out) if out] == [3, 7, 11, 15]
    pilot = made.pilot()
    assert pilot is not None
    assert len(pilot.batches) == 4  # one of them held out
    assert all(a is b for a, b in zip(pilot.batches, batches, strict=False))
    assert Calibration(batches[:7]).pilot() is None
    assert len(Calibration(list(noise(1024, 1).split(16))).pilot().batches) == 8


class Mixes(nn.Module):
    """Subtracts the mean of the batch, more of it from later samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x - x.mean(0) * torch.linspace(0, 1, len(x))[:, None])


class Centers(Mixes):
    """Likewise, the same for every order of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x - x.mean(0))


class TimeFirst(nn.Module):
    """Puts the batch second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(x)[0])


class Draws(nn.Module):
    """Draws at random in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(nn.functional.dropout(x, 0.5, training=True))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Mixes, (8, 6)),
        (Centers, (8, 6)),
        (TimeFirst, (8, 5, 6)),
        (Draws, (8, 6)),
    ],
)
def test_models_that_mix_the_samples_of_a_batch(model, shape) -> None:
    torch.manual_seed(0)
    model = model().eval()
    plan = plan_for(model, fc.Grid(bits=4))
    pattern = r"depends on the rest of its batch.*got outputs.*%.*wanted.*To fix it"
    with pytest.raises(CalibrationError, match=pattern):
        fc.apply(model, plan, [noise(*shape)], progress=False)


def test_models_that_mix_are_found_whatever_the_loader_does() -> None:
    model = Mixes()
    with pytest.raises(CalibrationError):
        prepare(model, modules_of(model), noise(16, 6).split(1), None)


class Outputs(nn.Module):
    """Gives its output in some container."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any], broken: bool) -> None:
        super().__init__()
        self.layer, self.wrap, self.broken = nn.Linear(6, 4), wrap, broken

    def forward(self, x: torch.Tensor) -> Any:
        x = x * torch.arange(1, len(x) + 1)[:, None] if self.broken else x
        return self.wrap(self.layer(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: (y, None),
        lambda y: {"logits": y, "loss": y.mean(), "kind": "text"},
        lambda y: [torch.zeros(3), y],
    ],
    ids=["tensor", "tuple", "dict", "list"],
)
def test_containers_of_outputs_are_looked_into(wrap) -> None:
    x = noise(8, 6)
    check_independent(Outputs(wrap, broken=False), x)
    with pytest.raises(CalibrationError):
        check_independent(Outputs(wrap, broken=True), x)


def test_what_cannot_be_compared_is_let_through(net, images) -> None:
    check_independent(net, images)
    check_independent(Mixes(), noise(1, 6))
    check_independent(Outputs(lambda _: 3, broken=True), noise(8, 6))
    check_independent(Outputs(lambda y: y / 0, broken=True), noise(8, 6))


class Words(nn.Module):
    """Integer inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.hidden = nn.Embedding(20, 12), nn.Linear(12, 24)
        self.out = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(self.words(x)).relu().mean(1))


@torch.no_grad()
def test_integer_inputs() -> None:
    model = Words().eval()
    x = torch.randint(0, 20, (400, 6), generator=torch.Generator().manual_seed(1))
    plan = plan_for(model, fc.Grid(bits=3))
    rounded = fc.apply(model, plan, progress=False)
    small = fc.apply(model, plan, Batches(x[:300], batch_size=50), progress=False)

    def error(other: nn.Module) -> float:
        return float((other(x[300:]) - model(x[300:])).square().mean())

    assert error(small) < 0.8 * error(rounded)
    budget = fc.Budget(size="30%")
    made = fc.compress(model, iter(x.split(50)), budget, progress=False)
    parameters = sum(p.numel() for p in model.parameters())
    assert len(packed_bytes(made)) <= budget.size_bytes(4 * parameters)


def convnet(x: torch.Tensor) -> nn.Module:
    """A net whose norms have seen ``x``."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8, momentum=None),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )
    with torch.no_grad():
        for part in x.split(64):
            net(part)
    return net.eval()


def test_inputs_of_another_normalisation_are_noticed(caplog) -> None:
    seen, x = noise(1024, 2, 6, 6), noise(256, 2, 6, 6, seed=1)
    net = convnet(seen)
    plan = plan_for(net, fc.Grid(bits=8))

    def warnings(x: torch.Tensor) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            fc.apply(net, plan, [x], progress=False)
        texts = [record.getMessage() for record in caplog.records]
        return [text for text in texts if "nats per channel" in text]

    assert warnings(seen) == []
    assert warnings(x) == []
    assert warnings(x[:12]) == []  # more is allowed for few
    for other in (x + 1, 0.5 * x, 255 * x):
        (text,) = warnings(other)
        assert "do not look like the training data" in text
        found = re.search(r"by (\S+) nats per channel, expected below (\S+);", text)
        assert found is not None
        assert float(found[1]) > float(found[2]) == pytest.approx(0.014)
    net = fc.apply(net, plan, [x], progress=False)  # has forgotten what it saw
    assert warnings(x + 1) == []


def test_the_divergence_is_that_of_two_normal_distributions() -> None:
    norm = nn.BatchNorm1d(3).eval()
    norm.running_mean.copy_(torch.tensor([0.0, 1.0, -2.0]))
    norm.running_var.copy_(torch.tensor([1.0, 4.0, 0.25]))
    x = noise(500, 3) * torch.tensor([2.0, 1.0, 0.5]) + 0.5
    model = nn.Sequential(norm, nn.Linear(3, 2))

    def normal(mean: torch.Tensor, var: torch.Tensor) -> Any:
        return torch.distributions.Normal(mean.double(), (var + norm.eps).sqrt())

    wanted = torch.distributions.kl_divergence(
        normal(x.mean(0), x.var(0, correction=0)),
        normal(norm.running_mean, norm.running_var),
    ).mean()
    found = norm_divergence(model, list(x.split(100)))
    assert found == pytest.approx(float(wanted) - 2 / 500, rel=1e-4)
    assert norm_divergence(nn.Linear(3, 2), [x]) is None
    assert not norm._forward_pre_hooks
    untracked = nn.BatchNorm1d(3, track_running_stats=False)
    assert norm_divergence(untracked.eval(), [x]) is None
    fold_norms_(model)
    assert norm_divergence(model, [x]) is None


@pytest.mark.parametrize("samples", [24, 2048])
def test_too_few_samples_are_noticed(caplog, samples) -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(32, 32), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(32, 4)).eval()
    plan = plan_for(net, fc.Grid(bits=3))
    with caplog.at_level(logging.WARNING):
        fc.apply(net, plan, [noise(samples, 32)], samples=None, progress=False)
    found = [r.getMessage() for r in caplog.records if "too small" in r.getMessage()]
    assert len(found) == (samples < 100)
    assert all(f"{samples} samples" in text for text in found)


@pytest.mark.parametrize("depth", [1, 2])
def test_many_samples_suffice_for_few_layers(caplog, depth) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)]
    net = nn.Sequential(*layers[: 2 * depth - 1]).eval()
    plan = plan_for(net, fc.Grid(bits=3))
    fc.apply(net, plan, [noise(4096, 32)], samples=None, progress=False)
    assert "too small" not in caplog.text


def test_inputs_must_be_finite() -> None:
    model, x = nn.Linear(4, 3), noise(32, 4)
    for value in (math.nan, math.inf):
        x[-1, 2] = value
        with pytest.raises(NonFiniteError, match=r"calibration input.*To fix it"):
            prepare(model, modules_of(model), x.split(8), None)
    assert prepare(model, modules_of(model), x.split(8), 31).batches  # not used


def test_a_model_is_left_without_hooks(net, images) -> None:
    prepare(net, modules_of(net), [images], None)
    with pytest.raises(RuntimeError):
        prepare(net, modules_of(net), [images[:, :1]], None)
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
