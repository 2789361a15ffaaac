"""What is added to the outputs of layers: found, and repaired."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.compensate.lockstep import Lockstep
from fitcompress.compensate.options import Compensation
from fitcompress.compensate.outlets import find_outlets
from fitcompress.compensate.residual_search import find_residuals
from fitcompress.model import compressible_layers
from fitcompress.quantize import fold_norms_

if TYPE_CHECKING:
    from fitcompress.compensate.residuals import Residual

WIDTH = 16


class Block(nn.Module):
    """x + second(relu(first(x))), the sum by ``add``."""

    def __init__(self, add=None, *, norm=False, conv=False) -> None:
        super().__init__()
        kind = (
            (lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=not norm))
            if conv
            else (lambda: nn.Linear(WIDTH, WIDTH))
        )
        self.first, self.second = kind(), kind()
        self.norm = nn.BatchNorm2d(WIDTH) if norm else nn.Identity()
        self.add = add or (lambda x, y: x + y)

    def forward(self, x):
        return self.add(x, self.norm(self.second(torch.relu(self.first(x)))))


def added_in_place(x, y):
    y += x
    return torch.relu_(y)


def added_to_x(x, y):
    return x.add_(y)


def net(*blocks) -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks, head).eval()


def found(model: nn.Module, x: torch.Tensor) -> dict[str, Residual]:
    fold_norms_(model)
    layers = compressible_layers(model)
    return find_residuals(model, layers, find_outlets(model, layers, x), x)


def where(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[str, bool]]:
    return {name: (r.module, r.output) for name, r in found(model, x).items()}


@pytest.mark.parametrize(
    "add", [None, added_in_place, added_to_x, lambda x, y: y.view_as(y) + x]
)
def test_sums_are_found(add) -> None:
    expected = {"1.second": ("0", True), "2.second": ("1", True)}
    assert where(net(Block(add), Block(add)), torch.randn(2, 5, WIDTH)) == expected


@pytest.mark.parametrize(
    "add",
    [
        lambda x, y: x + 2 * y,  # a factor
        lambda x, y: torch.add(x, y, alpha=2),
        lambda x, y: x - y,
        lambda x, y: (x + y) * y.sigmoid(),  # read twice
        lambda x, y: (x + y) * y[0].mean(),  # a part of it is
        lambda x, y: y + y.detach(),
        lambda x, y: y + 1.0,
        lambda x, y: x[:1] + y,  # broadcast
        lambda x, y: (x.transpose(1, 2) + y.transpose(1, 2)).transpose(1, 2),
        lambda x, y: torch.cat([x, y], 1) + 0.0,
        lambda x, y: torch.relu(x) + y,  # no module has it
    ],
)
def test_other_uses_are_left_alone(add) -> None:
    assert where(net(Block(add)), torch.randn(2, WIDTH, WIDTH)) == {}


def test_what_comes_later_is_no_residual() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            a = self.a(x)
            return a + self.b(x)

    # b may repair what a did; a cannot know b.
    assert where(net(Later()), torch.randn(3, WIDTH)) == {"1.b": ("1.a", True)}


def test_layers_and_modules_that_run_twice_have_none() -> None:
    block = Block()
    assert where(net(block, block), torch.randn(3, WIDTH)) == {}


def test_what_the_model_returns_is_read() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            y = self.layer(x)
            return x + y, y

    assert where(nn.Sequential(nn.Identity(), Both()), torch.randn(3, WIDTH)) == {}


def test_a_norm_between_layer_and_sum_scales() -> None:
    torch.manual_seed(0)
    block = Block(norm=True, conv=True)
    with torch.no_grad():
        block.norm.weight.copy_(torch.linspace(0, 2, WIDTH))
        block.norm.running_var.fill_(4.0)
    model = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), block).eval()
    (residual,) = found(model, torch.randn(2, WIDTH, 4, 4)).values()
    assert (residual.module, residual.output) == ("0", True)
    assert residual.inverse is not None
    assert residual.inverse[0] == 0
    expected = 1 / (torch.linspace(0, 2, WIDTH)[1:] / 2)
    torch.testing.assert_close(residual.inverse[1:], expected, rtol=2e-3, atol=0)
    layer = compressible_layers(model)[-1]
    r = torch.randn(2, WIDTH, 4, 4)
    share = residual.share(layer, r)
    assert share.shape == (2, WIDTH, 1, 4, 4)
    torch.testing.assert_close(
        share[:, 1:, 0],
        r[:, 1:] / (torch.linspace(0, 2, WIDTH)[1:] / 2).reshape(-1, 1, 1),
        rtol=2e-3,
        atol=1e-6,
    )


def plan_of(model: nn.Module, bits: dict[str, int]) -> fc.Plan:
    levels = {
        x.name: fc.Level(fc.Grid(bits=bits.get(x.name, 8)), 0.0, x.shape)
        for x in compressible_layers(model)
    }
    return fc.Plan(levels, method="test")


def test_errors_of_the_states_are_repaired() -> None:
    """The first layer is crippled; the sum is nearer to what it was with the term."""
    model = net(Block())
    x = torch.randn(512, WIDTH)
    with torch.no_grad():
        dense = model[:2](x)
    plan = plan_of(model, {"0": 2})
    errors = {}
    for residual in (False, True):
        options = Compensation(residual=residual, drift=1.0)
        small = fc.apply(model, plan, x.split(64), compensation=options, progress=False)
        with torch.no_grad():
            errors[residual] = float((small[:2](x) - dense).square().mean())
    assert errors[True] < 0.7 * errors[False]


def test_the_input_of_a_layer_may_be_what_is_added() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + self.layer(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Skip()).eval()
    x = torch.randn(512, WIDTH)
    modules = {x.name: x.module for x in compressible_layers(model)}
    with torch.no_grad(), Lockstep(model, modules, [x], found(model, x)) as passes:
        first, second = passes.advance(), passes.advance()
        assert first is not None
        assert second is not None
        assert first.added is None
        assert torch.equal(second.added[0], second.inputs[0])


def test_remembered_answers_hold_the_sum() -> None:
    from fitcompress.compensate.compressor import Compressor
    from fitcompress.compensate.size_fit import Pace

    model = net(Block(), Block(added_in_place))
    x = torch.randn(256, WIDTH)
    made = Compressor(model, plan_of(model, {"0": 2}), x.split(32), progress=False)
    live = made.at(Pace("live", 1.0))
    made.remember_dense(1 << 30)
    kept = made.at(Pace("kept", 1.0))
    for a, b in zip(live.parameters(), kept.parameters(), strict=True):
        assert torch.equal(a, b)


def test_inputs_without_an_address_do_no_harm() -> None:
    with torch.inference_mode():
        x = torch.randn(4, WIDTH)
    assert where(net(Block()), x) == {"1.second": ("0", True)}

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, graph):
            x = graph.to_dense()
            return x + self.layer(x)

    found = where(nn.Sequential(Sparse()), torch.eye(WIDTH).to_sparse())
    assert found == {"0.layer": ("0.layer", False)}


def test_a_single_image_has_no_batch() -> None:
    model = nn.Sequential(nn.Identity(), Block(conv=True)).eval()
    assert where(model, torch.randn(WIDTH, 4, 4)) == {}
