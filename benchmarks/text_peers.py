"""What other tools make of transformers: uniform bits, magnitude, torchao, modelopt.

Nothing here compensates or trains. Bytes of fixed-length codes are counted: b bits a
weight, 16 a scale, and all that is not on a grid as in our packed file. torchao and
NVIDIA's Model Optimizer come without their own files for such models on a processor, so
the same count is theirs. Where codes are known, what they take in our packed file is
told as well, so that the entropy coder is not the whole of a difference.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import fitcompress as fc
from fitcompress.data import split_batch
from fitcompress.model import compressible_layers
from fitcompress.model.forward import call_model
from fitcompress.quantize import grid_of, half_up
from fitcompress.sensitivity.labels import logits_of
from fitcompress.storage.save_load import layer_bytes, packed_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__all__ = ["Peer", "auto_quantized", "pruned", "torchao_rounded", "uniform"]

SCALE_BITS = 16
MODELOPT_BITS = range(2, 9)
UNTOUCHED_BITS = 16  # of layers that modelopt leaves alone
GROUP = 32  # weights that share a scale of torchao
SHARES = [1 - x / 40 for x in range(25)]  # of the largest weight, tried as a range


@dataclass(frozen=True)
class Peer:
    """A compressed model and what it would take on disk.

    Attributes:
        model: It, for evaluation.
        bytes: Of its file.
        note: What else is to be said.
        coded: Bytes of a file in which the same codes are entropy-coded, if that is
            another one.
    """

    model: nn.Module
    bytes: int
    note: str = ""
    coded: int | None = None


def uniform(model: nn.Module, bits: int, *, fitted: bool = False) -> Peer:
    """Round all weights, embeddings too, to b bits with a scale per row.

    Args:
        model: Unchanged.
        bits: b.
        fitted: Scales of least squared error; else the largest weight's.
    """
    widths = dict.fromkeys(_names(model), bits)
    if fitted:
        plain = copy.deepcopy(model)
        layers = compressible_layers(plain)
        scales = {x.name: _round_(x.weight, bits) for x in layers}
        small = _on_grids(plain, widths, scales)
    else:
        small = fc.apply(model, _plan(model, widths), progress=False)
    fixed = _fixed_bytes(small, bits)
    return Peer(small, fixed, coded=len(packed_bytes(small)))


def pruned(model: nn.Module, bits: int, size: int) -> Peer:
    """Drop the smallest weights of each layer, round the others; entropy-coded.

    The share of weights to drop, the same everywhere, is the least, to a percent, at
    which the packed file is within ``size``.

    Raises:
        ValueError: There is none, or it is 0.
    """

    def made(percent: int) -> nn.Module:
        levels = dict.fromkeys(_names(model), bits)
        plan = _plan(model, levels, percent / 100)
        return fc.apply(model, plan, progress=False)

    few, many = -1, 100
    while many - few > 1:
        middle = (few + many) // 2
        small = made(middle)
        if len(packed_bytes(small)) <= size:
            many = middle
        else:
            few = middle
    if many == 100:
        message = f"{bits} bits do not get into {size} bytes"
        raise ValueError(message)
    if many == 0:
        message = f"{bits} bits need no zeros to get into {size} bytes"
        raise ValueError(message)
    small = made(many)
    return Peer(small, len(packed_bytes(small)), f"{many} % zeros")


def torchao_rounded(model: nn.Module, bits: int, *, grouped: bool) -> Peer:
    """Round all weights by torchao's ``IntxWeightOnlyConfig``, embeddings too.

    Args:
        model: Unchanged.
        bits: Of a weight.
        grouped: A scale for 32 weights, where rows can be cut so; else one per row.
    """
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    small = copy.deepcopy(model)
    layers = compressible_layers(small)
    scales = 0
    for layer in layers:
        cut = grouped and layer.size // layer.rows % GROUP == 0
        scales += layer.size // GROUP if cut else layer.rows
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(GROUP) if cut else PerAxis(0),
        )
        owners = layer.modules
        quantize_(small, config, filter_fn=lambda module, _, o=owners: module in o)
    for layer in layers:  # dense again, which is faster here, and ties hold
        weight = layer.module.weight
        dense = weight.dequantize() if hasattr(weight, "dequantize") else weight
        shared = torch.nn.Parameter(dense.detach())
        for module in layer.modules:
            module.weight = shared
    total = sum(x.size for x in layers) * bits + scales * SCALE_BITS
    return Peer(small, -(-total // 8) + _other_bytes(model))


def auto_quantized(
    model: nn.Module,
    batches: Iterable[Any],
    size: int,
    *,
    embedding_bits: int,
) -> Peer:
    """Choose bits of linear layers by modelopt's ``auto_quantize``.

    Its scales are those of least squared error, a row each, which is better here than
    its default, the largest weight; all else is at the defaults. Its search knows no
    embeddings: they are rounded to ``embedding_bits`` with such scales, and linear
    layers get the bits that then are left of ``size``.

    Raises:
        ValueError: Nothing is left.
    """
    import modelopt.torch.quantization as mtq

    small = copy.deepcopy(model)
    layers = compressible_layers(small)
    linear = [x for x in layers if not x.rounded_alone]
    scales, bits = {}, {}
    for layer in layers:
        if layer.rounded_alone:
            bits[layer.name] = embedding_bits
            scales[layer.name] = _round_(layer.weight, embedding_bits)
    spent = 8 * _other_bytes(model) + sum(x.rows * SCALE_BITS for x in layers)
    spent += sum(x.size * bits.get(x.name, 0) for x in layers)
    effective = (8 * size - spent) / sum(x.size for x in linear)
    if effective < min(MODELOPT_BITS):
        message = f"embeddings in {embedding_bits} bits leave {effective:.2f} bits"
        raise ValueError(message)
    given, loss_fn = list(batches), fc.label_loss(model)
    # an output layer that shares the embedding is no choice, and has been counted
    tied = [name for layer in layers if layer.rounded_alone for name, _ in layer.tied]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small, _ = mtq.auto_quantize(
            small,
            {
                "effective_bits": effective,
                "cost": {"excluded_module_name_patterns": tied},
            },
            _modelopt_formats(),
            given,
            forward_step=lambda net, batch: call_model(net, split_batch(batch)[0]),
            loss_func=lambda out, batch: loss_fn(logits_of(out), split_batch(batch)[1]),
            num_calib_steps=1,  # scales of weights need no data
            num_score_steps=len(given),
            disabled_layers=tied or None,
        )
    modules = dict(small.named_modules())
    weights = {}
    for layer in linear:
        quantizer = modules[layer.name].weight_quantizer
        weight = modules[layer.name].weight.detach()
        if quantizer.is_enabled:
            bits[layer.name] = int(quantizer.num_bits)
            weights[layer.name] = quantizer(weight).detach()
            most = quantizer.amax.reshape(-1)
        else:  # it is left in half precision
            bits[layer.name] = UNTOUCHED_BITS
            weights[layer.name], most = weight, weight.abs().amax(1)
        scales[layer.name] = most / (2 ** (bits[layer.name] - 1) - 1)
    total = spent + sum(bits[x.name] * x.size for x in linear)
    plain = copy.deepcopy(model)
    for layer in compressible_layers(plain):
        with torch.no_grad():
            found = weights.get(layer.name)
            layer.weight.copy_(modules[layer.name].weight if found is None else found)
    note = f"embeddings {embedding_bits} bits, others {effective:.2f}"
    coded = len(packed_bytes(_on_grids(plain, bits, scales)))
    return Peer(plain, -(-total // 8), note, coded)


def _modelopt_formats() -> list[dict[str, Any]]:
    """Return what ``auto_quantize`` chooses from: weights in b bits, nothing else."""
    return [
        {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {
                    "quantizer_name": "*weight_quantizer",
                    "cfg": {"num_bits": bits, "axis": 0},
                    "enable": True,
                },
            ],
            "algorithm": "mse",
        }
        for bits in MODELOPT_BITS
    ]


@torch.no_grad()
def _on_grids(
    model: nn.Module, bits: dict[str, int], scales: dict[str, torch.Tensor]
) -> nn.Module:
    """Return a model with the same codes, as it can be packed.

    Args:
        model: Its weights are whole multiples of the scales of their rows.
        bits: By name of the layer.
        scales: One per row, by name of the layer.
    """
    # One bit more: two's complement has −2^(b−1), our b bits end before it.
    wider = {name: min(most + 1, UNTOUCHED_BITS) for name, most in bits.items()}
    small = fc.apply(model, _plan(model, wider), progress=False)
    for layer in compressible_layers(small):
        grid = grid_of(layer.module)
        assert grid is not None
        scale = scales[layer.name]
        safe = torch.where(scale > 0, scale, torch.ones_like(scale)).reshape(-1, 1)
        codes = (model.get_submodule(layer.name).weight / safe).round()
        grid.scale.copy_(half_up(scale))
        latent = layer.module.parametrizations.weight.original
        latent.copy_(codes * grid.scale.reshape(-1, 1))
    return small


def _names(model: nn.Module) -> list[str]:
    return [layer.name for layer in compressible_layers(model)]


def _plan(model: nn.Module, bits: dict[str, int], sparsity: float = 0.0) -> fc.Plan:
    layers = compressible_layers(model)
    levels = {
        x.name: fc.Level(fc.Grid(bits=bits[x.name]), sparsity, x.shape) for x in layers
    }
    return fc.Plan(levels, method="uniform")


def _fixed_bytes(small: nn.Module, bits: int) -> int:
    layers = compressible_layers(small)
    total = sum(x.size * bits + x.rows * SCALE_BITS for x in layers)
    return -(-total // 8) + _left(small)


def _other_bytes(model: nn.Module) -> int:
    """Return the bytes of all that is on no grid, as they stand in a packed file."""
    plan = _plan(model, dict.fromkeys(_names(model), 2))
    return _left(fc.apply(model, plan, progress=False))


def _left(small: nn.Module) -> int:
    return len(packed_bytes(small)) - sum(layer_bytes(small).values())


@torch.no_grad()
def _round_(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round a matrix to b bits, in place, and return its scales of least squares."""
    most = 2 ** (bits - 1)
    best = torch.full((len(weight),), torch.inf)
    rounded, scales = torch.empty_like(weight), torch.empty(len(weight))
    for share in SHARES:
        scale = half_up(share * weight.abs().amax(1) / (most - 1))
        safe = torch.where(scale > 0, scale, torch.ones_like(scale)).reshape(-1, 1)
        tried = (weight / safe).round().clamp(-most, most - 1) * safe
        error = (tried - weight).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        rounded = torch.where(better.reshape(-1, 1), tried, rounded)
    weight.copy_(rounded)
    return scales
