"""Layers and sums that look like a residual connection and are none, or nearly."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fitcompress as fc
from fitcompress.model import compressible_layers
from fitcompress.storage.save_load import layer_bytes
from test_residuals import WIDTH, Block, net, plan_of, where


class Scaled(nn.Linear):
    def forward(self, x):
        return 8 * F.linear(x, self.weight, self.bias)


class Same(nn.Conv2d):
    """Pads by itself."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Skip(nn.Module):
    def __init__(self, layer: nn.Module, add=lambda x, y: x + y) -> None:
        super().__init__()
        self.layer, self.add = layer, add

    def forward(self, x):
        return self.add(x, self.layer(x))


def applied(model: nn.Module, batches: list[torch.Tensor], residual: bool = True):
    options = fc.Compensation(residual=residual)
    plan = plan_of(model, {"0": 2})
    return fc.apply(model, plan, batches, compensation=options, progress=False)


def error(model: nn.Module, small: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - small(x)).square().mean())


def test_a_layer_that_scales_its_answer_repairs_nothing() -> None:
    torch.manual_seed(0)
    layer = Scaled(WIDTH, WIDTH)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), Skip(layer)).eval()
    x = torch.randn(512, WIDTH)
    assert where(model, x[:2]) == {}
    with_term, without = (applied(model, x.split(64), r) for r in (True, False))
    assert error(model, with_term, x) == error(model, without, x)


def test_nor_does_one_whose_answer_a_hook_changes() -> None:
    model = net(Block())
    model[1].second.register_forward_hook(lambda _, __, out: 2 * out)
    assert where(model, torch.randn(2, WIDTH)) == {}


def test_layers_that_pad_by_themselves_or_are_told_their_size() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)
            self.up = nn.ConvTranspose2d(WIDTH, WIDTH, 3, stride=2, padding=1)

        def forward(self, x):
            return x + self.up(self.down(x), output_size=x.shape)

    torch.manual_seed(0)
    images = torch.randn(32, WIDTH, 8, 8)
    same = Skip(Same(WIDTH, WIDTH, 3))
    for block in (Up(), same):
        model = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), block).eval()
        assert where(model, images[:2]) == {}
    applied(nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), Up()).eval(), images.split(8))


def test_what_is_broadcast_in_some_batches_only() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.v = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            place = self.table(torch.arange(x.shape[1])[None])
            return place + self.v(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Positions()).eval()
    batches = [torch.randn(1, 7, WIDTH), *torch.randn(32, 9, WIDTH).split(8)]
    with_term, without = (applied(model, batches, r) for r in (True, False))
    assert torch.equal(with_term[1].v.weight, without[1].v.weight)


def test_rows_that_a_norm_all_but_drops_cost_no_bytes() -> None:
    """779 bytes without the term, 864 with it; 2331 if 1/s counted for all rows."""
    torch.manual_seed(0)
    block = Block(norm=True, conv=True)
    model = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), block).eval()
    images = torch.randn(64, WIDTH, 6, 6)
    with torch.no_grad():
        block.norm.weight[: WIDTH // 2] = 0.002
        block.norm.weight[-1] = 300.0  # and one channel that had died
    shapes = {x.name: x.shape for x in compressible_layers(model)}
    levels = {
        n: fc.Level(fc.Grid(step=0.03), 0.0, shape) for n, shape in shapes.items()
    }
    levels["0"] = fc.Level(fc.Grid(bits=2), 0.0, shapes["0"])
    sizes = {}
    for residual in (False, True):
        options = fc.Compensation(residual=residual)
        small = fc.apply(
            model,
            fc.Plan(levels, method="test"),
            images.split(8),
            compensation=options,
            progress=False,
        )
        sizes[residual] = layer_bytes(small)["1.second"]
    assert sizes[True] < 1.25 * sizes[False]


def test_tensors_without_an_address() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x):
            return torch.vmap(self.norm)(x)

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Mapped(), Block()).eval()
    assert where(model, torch.randn(3, WIDTH)) == {"2.second": ("1", True)}


@pytest.mark.parametrize("kind", ["dataclass", "object"])
def test_what_is_returned_in_an_object_is_read(kind) -> None:
    @dataclass
    class Answer:
        total: torch.Tensor
        own: torch.Tensor

    class Plain:
        def __init__(self, total, own) -> None:
            self.total, self.parts = total, [own, self]

    made = {"dataclass": Answer, "object": Plain}[kind]
    model = Skip(nn.Linear(WIDTH, WIDTH), lambda x, y: made(x + y, y)).eval()
    assert where(model, torch.randn(3, WIDTH)) == {}
    model.add = lambda x, y: made(x + y, x)
    assert where(model, torch.randn(3, WIDTH)) == {"layer": ("", False)}


def test_channels_last_is_found() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), Block(norm=True, conv=True))
    x = torch.randn(2, WIDTH, 6, 6)
    expected = where(model.eval(), x)
    assert list(expected) == ["1.second"]
    last = torch.channels_last
    assert where(model.to(memory_format=last), x.to(memory_format=last)) == expected


def test_what_is_added_lies_as_it_was_seen() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            z = self.a(x).transpose(1, 2)
            return z + self.b(torch.relu(z))

    assert where(Turned().eval(), torch.randn(2, WIDTH, WIDTH)) == {}
