"""The trace of a layer's input is that of this layer's use of it, and of no other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fitcompress as fc
from fitcompress.errors import UnsupportedLayerError

OPTIONS = {"samples": None, "activation_bits": (8, 4), "progress": False}


class Residual(nn.Module):
    """A small branch beside a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(x + 1e-2 * self.branch(x))


class Copied(Residual):
    """The same function, in which no tensor has two uses."""

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(x + 1e-2 * self.branch(x * 1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = self.first(x).relu()
        attended = self.q(input=x) * self.k(x).sigmoid() + self.v(x)
        return self.last(attended)


class InPlace(Residual):
    """The input of a layer is overwritten after its use."""

    def forward(self, x):
        x = self.first(x).relu() + 1
        small = 1e-2 * self.branch(x)
        x += small
        return self.last(x)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(32, 4)

    def forward(self, x):
        x = self.first(x.view(-1, 1, 2, 4)).relu()
        return self.last((x + self.branch(x)).flatten(1))


def built(kind):
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)  # so that inputs may be overwritten


def data():
    make = torch.Generator().manual_seed(1)
    return torch.randn(40, 8, generator=make), torch.arange(40) % 4


def reference(model, name):
    """Mean squared gradient of what a hook of this one layer hands to it."""
    caught, total = [], 0.0

    def replace(_, args, kwargs):
        x = args[0] if args else kwargs["input"]
        caught.append(x.clone().requires_grad_())
        caught[-1].retain_grad()
        return (caught[-1],), {}

    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(replace, with_kwargs=True)
    for x, y in zip(*data(), strict=True):
        caught.clear()
        loss = F.cross_entropy(model(x[None].requires_grad_()), y[None])
        (grad,) = torch.autograd.grad(loss, caught)
        total += float(grad.double().square().sum())
    handle.remove()
    return total / 40


@pytest.mark.parametrize(
    "kind",
    [Residual, Copied, Attention, InPlace, Convolutions],
    ids=lambda k: k.__name__,
)
def test_the_trace_is_that_of_the_layer_alone(kind):
    model = built(kind)
    table = fc.measure(model, [data()], F.cross_entropy, **OPTIONS)
    for name, trace in zip(table.names, table.activation_trace, strict=True):
        assert trace == pytest.approx(reference(model, name), rel=1e-4), name


class Functional(Residual):
    def forward(self, x):
        x = self.first(x).relu()
        return self.last(F.linear(x, self.branch.weight, self.branch.bias))


class Detached(Residual):
    def forward(self, x):
        return self.last(self.first(x).relu() + self.branch((x > 0).float()))


class Constant(Residual):
    def forward(self, x):
        return self.last(self.first(x).relu() + self.branch(self.one))

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(1, 8))


@pytest.mark.parametrize("kind", [Functional, Detached, Constant])
def test_inputs_that_cannot_be_quantized_are_found_early(kind, monkeypatch):
    monkeypatch.setattr(
        "fitcompress.sensitivity.measurement.estimate", lambda *_, **__: 1 / 0
    )
    with pytest.raises(UnsupportedLayerError, match="input of layer 'branch'"):
        fc.measure(built(kind), [data()], F.cross_entropy, **OPTIONS)


def test_functional_weights_can_be_measured_without_their_inputs():
    options = OPTIONS | {"activation_bits": ()}
    table = fc.measure(built(Functional), [data()], F.cross_entropy, **options)
    assert table.names == ("first", "branch", "last")


def test_one_function_written_in_two_ways_has_one_trace():
    one, two = (
        fc.measure(built(kind), [data()], F.cross_entropy, **OPTIONS)
        for kind in (Residual, Copied)
    )
    assert one.activation_trace == pytest.approx(two.activation_trace, rel=1e-6)
    assert one.activation_distortion == pytest.approx(
        two.activation_distortion, rel=1e-6
    )
    assert one.distortion == pytest.approx(two.distortion, rel=1e-6)
