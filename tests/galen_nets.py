"""A tiny network, and a target that counts what it would take."""

import contextlib

import torch
from torch import nn

from fitcompress.data import Batches
from fitcompress.latency.timing import Timing
from fitcompress.methods import Galen
from fitcompress.model.costs import count_macs
from fitcompress.quantize import activations

X = torch.zeros(1, 2, 8, 8)


def make_net() -> nn.Module:
    """Three convolutions, one with dropout behind it, and a linear layer."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(256, 4),
    )
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(64, 2, 8, 8))
    return net.eval()


def make_loader(count: int = 96, seed: int = 5, size: int = 16) -> Batches:
    x = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    y = make_net()(x).argmax(1)
    return Batches(x, y, batch_size=size, shuffle=True, seed=1)


class FakeTarget:
    """A multiply-accumulate takes a unit of time, with integer inputs a third of it.

    Args:
        stop_after: Stops then, as a kill would.
        weight_bits: What it is to be asked for.
    """

    fingerprint = "counts"

    def __init__(self, stop_after: int = 10**9, *, weight_bits: int = 8) -> None:
        self.stop_after, self.timed, self.weight_bits = stop_after, 0, weight_bits

    @contextlib.contextmanager
    def open(self, model, example_input, *, weight_bits, reference=None):
        assert weight_bits == self.weight_bits
        macs = count_macs(model, example_input)
        quantized = {name for name, _ in activations(model)}
        yield _Session(self, macs, quantized, reference)


class _Session:
    def __init__(self, target, macs, quantized, reference) -> None:
        self.target, self.macs, self.quantized = target, macs, quantized
        self.reference = reference or self

    def milliseconds(self, layers) -> Timing:
        assert set(layers) <= self.quantized
        if self.target.timed == self.target.stop_after:
            raise KeyboardInterrupt
        self.target.timed += 1
        ms = sum(n / 3 if name in layers else n for name, n in self.macs.items())
        return Timing.of([(ms, sum(self.reference.macs.values()))])


OPTIONS = {
    "episodes": 6,
    "warm_up": 2,
    "round_to": 2,
    "finetune_epochs": 2,
    "retrain_samples": 32,
    "calibration_samples": 64,
    "sensitivity_samples": 32,
    "target": 0.3,
}


def run(**more):
    options = OPTIONS | more.pop("options", {})
    loader = more.pop("loader") if "loader" in more else make_loader()
    target = more.pop("target") if "target" in more else FakeTarget()
    validation = make_loader(64, seed=9)
    method = Galen(**options)
    return method.run(make_net(), loader, validation, X, target, progress=False, **more)
