"""Compressed models without calibration, and files that were tampered with."""

import copy
import zlib

import numpy as np
import safetensors.numpy
import torch
from torch import nn

import fitcompress as fc
from fitcompress.storage.container import Packed, Section, pack, unpack
from fitcompress.storage.save_load import packed_bytes


def levels_for(model: nn.Module, grid: fc.Grid, sparsity: float = 0.0) -> fc.Plan:
    from fitcompress.model import compressible_layers

    return fc.Plan(
        {x.name: fc.Level(grid, sparsity, x.shape) for x in compressible_layers(model)}
    )


def rounded(model: nn.Module, grid: fc.Grid, sparsity: float = 0.0) -> nn.Module:
    return fc.apply(model, levels_for(model, grid, sparsity), progress=False)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All values of a model, as a plain one has them."""
    return fc.remove(copy.deepcopy(model)).state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype
        assert torch.equal(value, b[key]), key


def fresh(net: nn.Module) -> nn.Module:
    """Another model of the same architecture, with other values."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for value in (*other.parameters(), *other.buffers()):
            value.fill_(3)
    return other


def tiny_file() -> bytes:
    """A packed file of a few hundred bytes with every kind of section."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    return packed_bytes(rounded(model.eval(), fc.Grid(bits=4)), coding="adaptive")


def forged(tiny: bytes, change) -> bytes:
    """A file whose checksums are right and whose index says something else."""
    packed = unpack(tiny)
    sections = [
        Section(copy.deepcopy(s.entry), bytes(s.payload)) for s in packed.sections
    ]
    plan = dict(packed.plan)
    sections = change(sections, plan) or sections
    return pack(Packed(plan, sections))


def set_code(**values):
    """Change the description of the first coded weight."""
    return lambda sections, plan: sections[0].entry.update(values)


def reindexed(tiny: bytes, text: bytes) -> bytes:
    """A file with another index."""
    parts = dict(safetensors.deserialize(tiny))
    tensors = {
        "index": np.frombuffer(zlib.compress(text), np.uint8),
        "payload": np.frombuffer(bytes(parts["payload"]["data"]), np.uint8),
    }
    return safetensors.numpy.save(tensors)
