"""Networks of rounded weights, stored in the file that `fitcompress.save` writes."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

import fitcompress as fc
from fitcompress.quantize import (
    WeightGrid,
    attach_grid,
    attach_plan,
    fold_norms_,
    round_leftovers_,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Compressed(NamedTuple):
    """What a peer made.

    Attributes:
        model: A plain network, in eval mode, as read back from the file.
        bytes: Size of the whole file.
    """

    model: nn.Module
    bytes: int


@torch.no_grad()
def reestimate_norms_(model: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Replace the batch norms' means and variances by those of `inputs`, in place.

    Batch statistics, averaged over the batches; each norm sees what the norms before it
    make of the same batch. Everything else stays in eval mode.
    """
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS)]
    norms = [m for m in norms if m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.train()
    for x in inputs if norms else ():
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@dataclass(frozen=True)
class Coded:
    """A layer's integers [rows, columns], its scales [rows] or [1], bits or None."""

    codes: torch.Tensor
    scale: torch.Tensor
    bits: int | None

    def weight(self) -> torch.Tensor:
        """Return what the integers stand for, float32 [rows, columns]."""
        return self.codes.float() * self.scale.float().reshape(-1, 1)


def store(
    model: nn.Module,
    layers: Mapping[str, Coded],
    norm_inputs: Sequence[torch.Tensor] | None,
) -> Compressed:
    """Write the network with these weights to a file and read it back."""
    small = copy.deepcopy(model).eval()
    for name, coded in layers.items():
        set_weight(small, name, coded)
    if norm_inputs is not None:
        reestimate_norms_(small, norm_inputs)
    fold_norms_(small)
    round_leftovers_(small)
    levels = {}
    for name, coded in layers.items():
        module = small.get_submodule(name)
        q = 0 if coded.bits is None else largest_code(coded.bits)
        grid = (
            fc.Grid(step=float(coded.scale))
            if coded.bits is None
            else fc.Grid(bits=coded.bits)
        )
        levels[name] = fc.Level(grid, 0.0, tuple(module.weight.shape))
        attach_grid(module, WeightGrid(coded.scale, q), coded.weight())
    attach_plan(small, fc.Plan(levels))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peer.safetensors"
        size = fc.save(small, path)
        return Compressed(fc.load(path, copy.deepcopy(model)), size)


def set_weight(model: nn.Module, name: str, coded: Coded) -> None:
    """Give a layer the weight that its integers stand for, in place."""
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        weight.copy_(coded.weight().reshape(weight.shape))


def bits_of(bits: int | Mapping[str, int], name: str) -> int:
    """Return the bits of one layer."""
    return bits if isinstance(bits, int) else bits[name]


def largest_code(bits: int) -> int:
    """Return q: codes of fixed point are −q … q."""
    return 2 ** (bits - 1) - 1


def nearest(matrix: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the nearest codes, float64 [rows, columns]."""
    q = largest_code(bits)
    step = torch.where(scale > 0, scale, 1.0).double().reshape(-1, 1)
    return (matrix / step).round().clamp(-q, q)


def scales(matrix: torch.Tensor, bits: int, clip: bool) -> torch.Tensor:
    """Return a scale per row, of float16 values as they are stored."""
    widest = matrix.abs().amax(1) / largest_code(bits)
    if not clip:
        return widest.half().float()
    best = widest.half().float()
    least = torch.full_like(widest, torch.inf)
    for percent in range(100, 20, -1):  # the published search: down to a fifth
        scale = (widest * percent / 100).half().float()
        rounded = nearest(matrix, scale, bits) * scale.double().reshape(-1, 1)
        error = (rounded - matrix).square().sum(1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best
