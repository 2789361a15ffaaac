"""Structured pruning: what can go, that it goes consistently, what makes up for it."""

import pytest
import torch
from torch import nn

import fitcompress as fc
from conftest import build_tiny_net
from fitcompress.errors import OptionError, PlanMismatchError, UnsupportedLayerError
from fitcompress.methods import prune_channels
from fitcompress.methods.galen import channels as channels_module
from fitcompress.methods.galen.channels import channel_groups
from fitcompress.methods.galen.groups import (
    kept_channels,
    strongest,
    without_channels,
)
from fitcompress.methods.galen.reconstruction import Reconstruction
from fitcompress.methods.galen.surgery import is_depthwise
from fitcompress.zoo import CifarResNet

IMAGE = torch.zeros(1, 3, 32, 32)


def resnet(*, projection: bool) -> nn.Module:
    """One block a stage; norms are not those of a fresh network."""
    torch.manual_seed(0)
    net = CifarResNet(1, projection=projection)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval()


def check_equal(net: nn.Module, x: torch.Tensor, counts: list[int]) -> nn.Module:
    """Prune all groups; the result computes what the dense net does with zeros."""
    groups, _ = channel_groups(net, x[:1])
    kept = [strongest(net, g, n) for g, n in zip(groups, counts, strict=True)]
    small, masked = prune_channels(net, kept_channels(groups, kept)), net
    for group, channels in zip(groups, kept, strict=True):
        gone = set(range(group.width)) - set(channels)
        masked = without_channels(masked, group, gone)
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(x), rtol=1e-4, atol=1e-4)
        assert (small(x) - net(x)).abs().max() > 1e-2
    return small


def test_layers_of_a_residual_sum_lose_the_same_channels() -> None:
    net = resnet(projection=True)
    groups, left_out = channel_groups(net, IMAGE)
    assert [group.layers for group in groups] == [
        ("conv1", "layer1.0.conv2"),
        ("layer1.0.conv1",),
        ("layer2.0.conv1",),
        ("layer2.0.conv2", "layer2.0.downsample.0"),
        ("layer3.0.conv1",),
        ("layer3.0.conv2", "layer3.0.downsample.0"),
    ]
    assert left_out == {"linear": "its channels are those of the output"}
    small = check_equal(net, torch.randn(4, 3, 32, 32), [8, 5, 16, 20, 64, 24])
    assert small.conv1.weight.shape == (8, 3, 3, 3)
    assert small.layer1[0].conv2.weight.shape == (8, 5, 3, 3)
    assert small.layer2[0].downsample[0].weight.shape == (20, 8, 1, 1)
    assert small.layer3[0].conv1.out_channels == 64
    assert small.linear.in_features == 24
    assert net.conv1.out_channels == 16


def test_shortcuts_that_pad_channels_keep_them() -> None:
    net = resnet(projection=False)
    groups, left_out = channel_groups(net, IMAGE)
    assert [group.layers for group in groups] == [
        ("layer1.0.conv1",),
        ("layer2.0.conv1",),
        ("layer3.0.conv1",),
    ]
    assert set(left_out) == {
        "conv1",
        "layer1.0.conv2",
        "layer2.0.conv2",
        "layer3.0.conv2",
        "linear",
    }
    check_equal(net, torch.randn(4, 3, 32, 32), [4, 32, 17])


class Flipped(nn.Module):
    """Adds its channels in reverse order: shapes fit when some go, the sum does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.third(self.second(x).relu() + x.flip(1))


class Rooted(Flipped):
    """NaN for inputs below zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.sqrt())


class Signed(Flipped):
    """NaN for all inputs but zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.sqrt() + (-x).sqrt())


class Offset(Flipped):
    """Its channels change little of a large output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1e5


class NaN(Flipped):
    """Never finite."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * torch.nan


@pytest.mark.parametrize("kind", [Rooted, Signed, Offset, NaN])
def test_trials_are_not_blind(kind) -> None:
    torch.manual_seed(0)
    groups, left_out = channel_groups(kind().eval(), torch.zeros(1, 6))
    assert not groups
    why = "not finite" if kind is NaN else "mixes up"
    assert why in left_out["first"]
    assert why in left_out["second"]


class Strict(nn.Module):
    """Only float32, a parameter of integers, and a check of its own in one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.third = nn.Linear(4, 3)
        self.order = nn.Parameter(torch.tensor([1, 0]), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32
        x = self.first(input=x).relu()
        assert x.shape[1] == 8
        return self.third(self.second(input=x).relu())


def test_assertions_of_a_model_do_not_end_the_search() -> None:
    net, x = Strict().eval(), torch.randn(32, 6)
    groups, left_out = channel_groups(net, x[:1])
    assert [group.layers for group in groups] == [("second",)]
    assert "does not run without" in left_out["first"]
    kept = kept_channels(groups, [[0, 1, 2]])
    small = prune_channels(net, kept)
    Reconstruction(net, groups, [x]).apply_(small, kept)
    assert small.third.weight.shape == (3, 3)


def test_a_group_that_fits_in_shape_alone_is_left_out(caplog) -> None:
    torch.manual_seed(0)
    with caplog.at_level("INFO", channels_module.__name__):
        groups, left_out = channel_groups(Flipped(), torch.zeros(1, 6))
    assert not groups
    assert "mixes up" in left_out["first"]
    assert "first keeps its channels: what follows mixes up" in caplog.text


def test_depthwise_layers_go_along_and_flattened_ones_lose_positions() -> None:
    net = build_tiny_net()
    groups, left_out = channel_groups(net, torch.zeros(1, 2, 6, 6))
    assert [group.layers for group in groups] == [("conv",), ("head",)]
    assert "depthwise" in left_out["deep"]
    assert groups[0].indices([1])[("head", "in")] == list(range(9, 18))
    small = check_equal(net, torch.randn(5, 2, 6, 6), [3, 4])
    assert (small.deep.groups, small.deep.in_channels) == (3, 3)
    assert is_depthwise(small.deep)
    assert small.head.weight.shape == (4, 27)


def test_grouped_convolutions_and_layer_norms_keep_channels() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 3),
    ).eval()
    groups, left_out = channel_groups(net, torch.zeros(1, 2, 1, 1))
    assert not groups
    assert "grouped" in left_out["2"]
    assert "LayerNorm" in left_out["4"]


def test_the_channels_of_smallest_norm_go() -> None:
    net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0], [2.0], [1.0]]))
        net[1].weight.copy_(torch.tensor([[0.0, 1.0, 4.0], [0.0, 1.0, 0.0]]))
    groups, _ = channel_groups(net, torch.zeros(1, 1))
    # 9, 4, 1 over 14/3 and 0, 2, 16 over 6: 1.93, 1.19 and 2.88
    assert strongest(net, groups[0], 2) == [0, 2]
    assert strongest(net, groups[0], 1) == [2]


def test_least_squares_make_up_for_channels_that_others_know() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 16, 4),
    ).eval()
    with torch.no_grad():  # channel 5 is channel 0, up to a factor
        net[0].weight[5] = 0.5 * net[0].weight[0]
        net[0].bias[5] = 0.5 * net[0].bias[0]
    x = torch.randn(256, 2, 4, 4)
    groups, _ = channel_groups(net, x[:1])
    solver = Reconstruction(net, groups, [x[:128], x[128:]])
    kept = kept_channels(groups, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
    dropped = prune_channels(net, kept)
    solved = prune_channels(net, kept)
    solver.apply_(solved, kept)
    with torch.no_grad():
        errors = [(each(x) - net(x)).square().mean() for each in (dropped, solved)]
    assert errors[1] < 1e-3 * errors[0]


def test_least_squares_change_nothing_where_nothing_goes() -> None:
    net = resnet(projection=True)
    groups, _ = channel_groups(net, IMAGE)
    solver = Reconstruction(net, groups, [torch.randn(8, 3, 32, 32)])
    whole = {"layer1.0.conv1": {"in": list(range(16))}}
    small = prune_channels(net, whole)
    solver.apply_(small, whole)
    before, after = net.layer1[0].conv1.weight, small.layer1[0].conv1.weight
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kept", "error"),
    [
        ({"nothing": {"out": [0]}}, PlanMismatchError),
        ({"conv": {"out": [0, 8]}}, PlanMismatchError),
        ({"conv": {"out": [1, 0]}}, OptionError),
        ({"conv": {"out": []}}, OptionError),
        ({"conv": {"middle": [0]}}, OptionError),
        ({"norm": {"in": [0]}}, UnsupportedLayerError),
        ({"": {"out": [0]}}, UnsupportedLayerError),
        ({"conv": {"out": [0.0, 1.5]}}, OptionError),
        ({"conv": {"out": ["0", "1"]}}, OptionError),
        ({"conv": {"out": [True]}}, OptionError),
        ({"conv": {"out": "01"}}, OptionError),
        ({"conv": {"out": None}}, OptionError),
        ({"conv": [0, 1]}, OptionError),
        (["conv"], OptionError),
        (None, OptionError),
    ],
)
def test_what_is_no_list_of_channels(kept, error) -> None:
    with pytest.raises(error):
        fc.methods.prune_channels(build_tiny_net(), kept)


def test_what_is_on_a_grid_is_not_pruned() -> None:
    levels = {
        name: fc.Level(fc.Grid(bits=8), 0.0, tuple(module.weight.shape))
        for name, module in build_tiny_net().named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    small = fc.apply(build_tiny_net(), fc.Plan(levels), progress=False)
    with pytest.raises(OptionError, match="then load the packed file"):
        fc.methods.prune_channels(small, {"head": {"out": [0]}})
