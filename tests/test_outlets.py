"""Where the outputs of layers can be shifted and scaled, and by how much."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.compensate.outlets import Outlet, find_outlets
from fitcompress.errors import CalibrationError
from fitcompress.model import compressible_layers
from fitcompress.quantize import fold_norms_

CLOSE = {"rtol": 3e-3, "atol": 3e-3}  # norms and biases are rounded to 16 bits


def plan_for(model: nn.Module, grid: fc.Grid) -> fc.Plan:
    layers = compressible_layers(model)
    return fc.Plan({x.name: fc.Level(grid, 0.0, x.shape) for x in layers})


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Branches(nn.Module):
    """Layers with a norm, with a bias, with neither, and a norm behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.normed, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.both, self.second = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.biased, self.third = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.bare = nn.Linear(4, 3, bias=False)
        for norm in (self.norm, self.second, self.third):
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.normed(x)).relu()
        x = self.second(self.both(x))
        x = self.third(self.biased(x).relu())
        return self.bare(x.mean((2, 3)))


OUTLETS = {
    "normed": Outlet("norm", norm=True),
    "both": Outlet("both"),
    "biased": Outlet("biased"),
    "bare": Outlet(None),
}


@pytest.fixture
def branches() -> nn.Module:
    model = Branches().eval()
    fold_norms_(model)
    return model


def test_outlets_are_found(branches) -> None:
    layers = compressible_layers(branches)
    assert find_outlets(branches, layers, noise(2, 2, 6, 6)) == OUTLETS
    for module in branches.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("name", ["normed", "both", "biased"])
@torch.no_grad()
def test_a_shift_and_a_gain_are_those_of_the_outputs(branches, name) -> None:
    x, outlet = noise(5, 2, 6, 6), OUTLETS[name]
    shift = noise(4, seed=1)
    gain = 1 + 0.3 * noise(4, seed=2) if outlet.norm else None
    explicit = copy.deepcopy(branches)

    def moved(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        out = out if gain is None else out * gain[:, None, None]
        return out + shift[:, None, None]

    explicit.get_submodule(name).register_forward_hook(moved)
    before = branches(x)
    outlet.adjust(branches, shift, gain)
    torch.testing.assert_close(branches(x), explicit(x), **CLOSE)
    assert (branches(x) - before).norm() > 0.1 * before.norm()


@torch.no_grad()
def test_a_shift_or_a_gain_alone_and_none(branches) -> None:
    gain, shift = torch.tensor([1.0, 2.0, 0.5, 4.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    norm = copy.deepcopy(branches.norm)
    OUTLETS["normed"].adjust(branches, None, gain)
    torch.testing.assert_close(branches.norm.weight, norm.weight * gain)
    assert torch.equal(branches.norm.bias, norm.bias)
    before = copy.deepcopy(branches.state_dict())
    OUTLETS["normed"].adjust(branches, None, None)
    OUTLETS["bare"].adjust(branches, shift[:3], None)
    assert all(torch.equal(v, before[k]) for k, v in branches.state_dict().items())
    OUTLETS["biased"].adjust(branches, shift, None)
    moved = before["biased.bias"] + shift
    torch.testing.assert_close(branches.biased.bias, moved, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", [nn.ReLU(inplace=True), nn.SiLU(inplace=True)])
def test_a_norm_behind_an_operation_in_place_takes_nothing(change) -> None:
    model = nn.Sequential(nn.Linear(4, 4), change, nn.BatchNorm1d(4)).eval()
    fold_norms_(model)
    found = find_outlets(model, compressible_layers(model), noise(2, 4))
    assert found == {"0": Outlet("0")}


class Shared(nn.Module):
    """One layer before a norm twice, and one norm behind two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.a, self.b, self.both = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.twice(self.twice(x)))
        return self.both(self.a(x)) + self.both(self.b(x))


def test_norms_that_are_shared_take_nothing() -> None:
    model = Shared().eval()
    fold_norms_(model)
    found = find_outlets(model, compressible_layers(model), noise(2, 4))
    assert found == {"twice": Outlet(None), "a": Outlet("a"), "b": Outlet("b")}


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_layers_that_are_never_reached() -> None:
    model = Unreached()
    found = find_outlets(model, compressible_layers(model), noise(2, 4))
    assert found == {"used": Outlet("used"), "spare": Outlet(None)}
    plan = plan_for(model, fc.Grid(bits=4))
    with pytest.raises(CalibrationError, match=r"'spare'.*got 1 of 2.*To fix it"):
        fc.apply(model, plan, [noise(8, 4)], progress=False)


class ReadTwice(nn.Module):
    """A norm reads the layer's output, and so does a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.norm, self.alone = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.other = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return self.alone(self.other(y + self.norm(y)))


def test_outputs_that_others_read_too_are_not_shifted() -> None:
    torch.manual_seed(0)
    model = ReadTwice().eval()
    fold_norms_(model)
    found = find_outlets(model, compressible_layers(model), noise(5, 4))
    assert found == {"layer": Outlet(None), "other": Outlet("alone", norm=True)}
