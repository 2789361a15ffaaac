"""What other tools make of transformers: uniform bits, magnitude, torchao, modelopt.

Nothing here compensates or trains. Bytes of fixed-length codes are counted: b bits a
weight, 16 a scale, and all that is not on a grid as in our packed file. torchao and
NVIDIA's Model Optimizer come without their own files for such models on a processor, so
the same count is theirs.
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
from fitcompress.sensitivity.labels import logits_of
from fitcompress.storage.save_load import layer_bytes, packed_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__all__ = ["Peer", "auto_quantized", "pruned", "torchao_rounded", "uniform"]

SCALE_BITS = 16
MODELOPT_BITS = (2, 3, 4, 6, 8)
GROUP = 32  # weights that share a scale of torchao


@dataclass(frozen=True)
class Peer:
    """A compressed model and what it would take on disk.

    Attributes:
        model: It, for evaluation.
        bytes: Of its file.
        note: What else is to be said.
    """

    model: nn.Module
    bytes: int
    note: str = ""


def uniform(model: nn.Module, bits: int, *, coded: bool) -> Peer:
    """Round all weights, embeddings too, to b bits with a scale per row.

    Args:
        model: Unchanged.
        bits: b.
        coded: Count the packed file, whose codes are entropy-coded.
    """
    plan = _plan(model, dict.fromkeys(_names(model), bits))
    small = fc.apply(model, plan, progress=False)
    return Peer(small, len(packed_bytes(small)) if coded else _fixed_bytes(small, bits))


def pruned(model: nn.Module, bits: int, size: int) -> Peer:
    """Drop the smallest weights of each layer, round the others; entropy-coded.

    The share of weights to drop, the same everywhere, is the least, to a percent, at
    which the packed file is within ``size``.

    Raises:
        ValueError: There is none.
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
    small = made(many)
    return Peer(small, len(packed_bytes(small)), f"{many} % zeros")


def torchao_rounded(model: nn.Module, bits: int, *, grouped: bool) -> Peer:
    """Round all weights by torchao's ``IntxWeightOnlyConfig``, embeddings too.

    Args:
        model: Unchanged.
        bits: Of a weight.
        grouped: A scale for 32 weights, else one per row.
    """
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    small = copy.deepcopy(model)
    layers = compressible_layers(small)
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(GROUP) if grouped else PerAxis(0),
    )
    owners = {module for layer in layers for module in layer.modules}
    quantize_(small, config, filter_fn=lambda module, _: module in owners)
    for layer in layers:  # dense again, which is faster here, and ties hold
        weight = layer.module.weight
        dense = weight.dequantize() if hasattr(weight, "dequantize") else weight
        for module in layer.modules:
            module.weight = torch.nn.Parameter(dense.detach())
    scales = sum(x.size // GROUP if grouped else x.rows for x in layers)
    total = sum(x.size for x in layers) * bits + scales * SCALE_BITS
    return Peer(small, -(-total // 8) + _other_bytes(model))


def auto_quantized(
    model: nn.Module,
    batches: Iterable[Any],
    size: int,
    *,
    embedding_bits: int,
) -> Peer:
    """Choose bits of linear layers by modelopt's ``auto_quantize``, at its defaults.

    Its search knows no embeddings: they are rounded to ``embedding_bits`` with a scale
    per row, and linear layers get the bits that then are left of ``size``.

    Raises:
        ValueError: Nothing is left.
    """
    import modelopt.torch.quantization as mtq

    small = copy.deepcopy(model)
    layers = compressible_layers(small)
    linear = [x for x in layers if not x.rounded_alone]
    others = [x for x in layers if x.rounded_alone]
    for layer in others:
        _round_(layer.weight, embedding_bits)
    spent = 8 * _other_bytes(model)
    spent += sum(x.size * embedding_bits + x.rows * SCALE_BITS for x in others)
    spent += sum(x.rows * SCALE_BITS for x in linear)
    weights = sum(x.size for x in linear)
    effective = (8 * size - spent) / weights
    if effective < min(MODELOPT_BITS):
        message = f"embeddings in {embedding_bits} bits leave {effective:.2f} bits"
        raise ValueError(message)
    formats = [
        {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {
                    "quantizer_name": "*weight_quantizer",
                    "cfg": {"num_bits": bits, "axis": 0},
                    "enable": True,
                },
            ],
            "algorithm": "max",
        }
        for bits in MODELOPT_BITS
    ]
    given = list(batches)
    tied = [f"*{name}*" for layer in others for name, _ in layer.tied]
    loss_fn = fc.label_loss(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small, found = mtq.auto_quantize(
            small,
            {"effective_bits": effective},
            formats,
            given,
            forward_step=lambda net, batch: call_model(net, split_batch(batch)[0]),
            loss_func=lambda out, batch: loss_fn(logits_of(out), split_batch(batch)[1]),
            num_calib_steps=len(given),
            num_score_steps=len(given),
            disabled_layers=tied or None,
        )
        chosen = _chosen_bits(small, [x.name for x in linear])
    total = spent + sum(chosen[x.name] * x.size for x in linear)
    note = f"embeddings {embedding_bits} bits, others {effective:.2f}"
    del found
    return Peer(small.eval(), -(-total // 8), note)


def _chosen_bits(model: nn.Module, names: list[str]) -> dict[str, int]:
    modules, chosen = dict(model.named_modules()), {}
    for name in names:
        quantizer = modules[name].weight_quantizer
        chosen[name] = int(quantizer.num_bits) if quantizer.is_enabled else 32
    return chosen


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
def _round_(weight: torch.Tensor, bits: int) -> None:
    """Round a matrix to b bits with a scale per row, in place."""
    largest = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True) / largest
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    weight.copy_((weight / safe).round() * scale)
