"""A tiny network, its search and its training by bit sharing."""

import torch
from torch import nn

import fitcompress as fc
from dying_batches import dying
from fitcompress.data import Batches
from fitcompress.methods import BitSharing
from fitcompress.methods.bit_sharing.network import SharedNetwork, build_network
from fitcompress.methods.bit_sharing.shared_bits import (
    Ladder,
)
from fitcompress.methods.bit_sharing.training import Trainer, Votes

LADDER = Ladder((2, 4, 8))


def make_net() -> nn.Module:
    """Three convolutions, the second with groups, and a linear layer: 25 088 MACs."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 24, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(24, 20, 1, bias=False),
        nn.BatchNorm2d(20),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(320, 4),
    )
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(64, 2, 8, 8))
    return net.eval()


def make_loader(count: int = 96, seed: int = 5) -> Batches:
    x = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    y = make_net()(x).argmax(1)
    return Batches(x, y, batch_size=16, shuffle=True, seed=1)


def dying_loader(last: int) -> Batches:
    return dying(make_loader(), last)


OPTIONS = {"epochs": 3, "threshold_rate": 0.05, "prune_groups": {"3": 4, "5": 2}}


def network(**options) -> SharedNetwork:
    groups = options.get("prune_groups", {"3": 4, "5": 2})
    return build_network(make_net(), make_loader(), LADDER, groups, 0.5)


def trainer(limit: float = 0.02, **options) -> Trainer:
    method = BitSharing(**(OPTIONS | options))
    shared = network()
    allowed = int(limit * shared.dense_bops)
    return Trainer(shared, make_loader(), method, allowed, None)


def fixed_gates(values: list[float]):
    """Return gates with these values, and the function that opens them."""
    tensors = [torch.tensor(v, requires_grad=True) for v in values]
    return tensors, lambda rung, measure: tensors[rung]


def trainer_votes(shared: SharedNetwork, bits: dict[str, tuple[int, int]]) -> Votes:
    measures = {x.name: [0.1, 0.01] for x in shared.free}
    return Votes({name: {b[1]: 5, 4: 1} for name, b in bits.items()}, measures)


def run(**more):
    options = OPTIONS | more.pop("options", {})
    loader = more.pop("loader") if "loader" in more else make_loader()
    budget = more.pop("budget", fc.Budget(bops="2.5%"))
    return BitSharing(**options).run(make_net(), loader, budget, progress=False, **more)
