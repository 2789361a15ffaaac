"""A small network with branches, its inputs, and levels that tables of it have."""

import torch
from torch import nn

import fitcompress as fc
from fitcompress.compensate.options import Compensation

BITS = (8, 4, 3, 2)
STEPS = [0.03 * 2 ** (i / 2) for i in range(8)]
GRIDS = [*(fc.Grid(bits=b) for b in BITS), *(fc.Grid(step=s) for s in STEPS)]
FAST = Compensation(beam=1, clipping=False)


class Branched(nn.Module):
    """Convolutions, one of them used twice, in-place sums and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm(self.first(x)).relu_()
        y = self.shared(x)
        y += x
        y = self.shared(y.relu_())
        return self.last(y.mean((2, 3)))


def branched_net() -> Branched:
    torch.manual_seed(0)
    return Branched().eval()


def branched_batches() -> list[torch.Tensor]:
    """Four batches of eight."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 6, 6, generator=generator) for _ in range(4)]


def branched_table() -> fc.Sensitivity:
    """Bits, steps and sparsities of that network."""
    return fc.measure(
        branched_net(),
        branched_batches(),
        samples=32,
        grids=GRIDS,
        sparsities=(0, 0.3, 0.6),
        progress=False,
    )
