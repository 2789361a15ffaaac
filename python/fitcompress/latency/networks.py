"""Compressed networks to be timed: of a plan, without data to calibrate with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fitcompress.compensate import apply
from fitcompress.compensate.activations import input_bits
from fitcompress.errors import DataError, OptionError
from fitcompress.model import compressible_layers
from fitcompress.model.forward import call_model
from fitcompress.model.modes import evaluating
from fitcompress.quantize import (
    ActivationQuantizer,
    MinMaxObserver,
    activations,
    attach_activation,
)
from fitcompress.search.plan import Level, Plan
from fitcompress.sensitivity.table import Grid

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["integer_network", "layers_in_order", "planned_network"]


@torch.no_grad()
def layers_in_order(model: nn.Module, example: Any) -> list[str]:
    """Return the layers whose inputs can be quantized, in the order of first calls.

    Raises:
        DataError: The model does not run on the example.
        OptionError: There is none.
    """
    order: dict[str, None] = {}
    handles = []
    for layer in compressible_layers(model):
        if layer.one_hot:
            continue  # its inputs are indices

        def note(*_: Any, name: str = layer.name) -> None:
            order.setdefault(name)

        handles.append(layer.module.register_forward_pre_hook(note))
    try:
        with evaluating(model):
            call_model(model, example)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise DataError(
            "the model does not run on the example input",
            got=" ".join(str(error).split())[:200] or type(error).__name__,
            fix="give an input as the model takes it, with its batch dimension",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise OptionError(
            "the model calls no layer whose input could be quantized",
            got=type(model).__name__,
            wanted="a Linear or a convolution",
        )
    return list(order)


def integer_network(
    model: nn.Module,
    example: Any,
    layers: list[str],
    *,
    weight_bits: int,
    activation_bits: int,
) -> nn.Module:
    """Return a compressed copy with integer weights, inputs of ``layers`` quantized.

    Its weights are merely rounded and its ranges those of the example: it computes at
    the speed of a good one.
    """
    levels = {
        layer.name: Level(
            Grid(bits=weight_bits),
            0.0,
            layer.shape,
            activation_bits=activation_bits if layer.name in layers else None,
        )
        for layer in compressible_layers(model)
    }
    return planned_network(model, example, Plan(levels))


@torch.no_grad()
def planned_network(model: nn.Module, example: Any, plan: Plan) -> nn.Module:
    """Return a compressed copy at the levels of a plan, rounded, ranges by example.

    Raises:
        PlanMismatchError: The plan is for another model.
    """
    bits: Mapping[str, int] = input_bits(plan)
    weights = {
        name: Level(level.grid, level.sparsity, level.shape)
        for name, level in plan.levels.items()
    }
    small = apply(model, Plan(weights), progress=False)
    for name, number in bits.items():
        quantizer = ActivationQuantizer(number, MinMaxObserver())
        attach_activation(small.get_submodule(name), quantizer)
    with evaluating(small):
        call_model(small, example)
    for _, made in activations(small):
        made.freeze()
    return small
