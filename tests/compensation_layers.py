"""Layers, their inputs and moments, and the plain options."""

from __future__ import annotations

import torch
from torch import nn

import fitcompress as fc
from fitcompress.compensate.options import Compensation
from fitcompress.compensate.statistics import Moments
from fitcompress.model import Layer, patches

PLAIN = Compensation(drift=1.0, bias=False, beam=1, damping=0.01)


def layer_of(module: nn.Module) -> Layer:
    return Layer("layer", module, getattr(module, "groups", 1))


KINDS = [
    (nn.Linear(5, 3), (7, 5)),
    (nn.Linear(5, 3, bias=False), (7, 4, 5)),
    (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (5, 4, 6, 7)),
    (nn.Conv2d(4, 4, 3, groups=4, padding="same"), (5, 4, 6, 6)),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (5, 2, 6, 6)),
    (nn.Conv1d(3, 2, 4, dilation=2), (6, 3, 12)),
    (nn.Conv3d(2, 2, 2), (3, 2, 3, 4, 3)),
    (nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), (5, 4, 4, 3)),
    (nn.ConvTranspose1d(3, 2, 4, stride=3), (6, 3, 5)),
]


def columns(module: nn.Module, batches: torch.Tensor) -> torch.Tensor:
    """All inputs of one output, float64 [groups, positions, columns]."""
    return torch.cat([patches(module, x).flatten(1, 2) for x in batches], 1).double()


def outputs(module: nn.Module, a: torch.Tensor) -> torch.Tensor:
    """W x, float64 [groups, positions, rows / groups]."""
    weight = layer_of(module).matrix().double()
    return a @ weight.reshape(len(a), -1, a.shape[-1]).transpose(1, 2)


def correlated(samples: int, width: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(samples, width) @ torch.randn(width, width) / width**0.5


def moments_of(x: torch.Tensor, y: torch.Tensor, groups: int = 1) -> Moments:
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    second = (x.T @ x).expand(groups, -1, -1).clone()
    rows = y.shape[1] // groups
    return Moments(second, (y.double().T @ x).reshape(groups, rows, -1))


def level_of(grid: fc.Grid, weight: torch.Tensor, sparsity: float = 0.0) -> fc.Level:
    return fc.Level(grid, sparsity, tuple(weight.shape))
