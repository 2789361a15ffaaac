"""``save`` and ``load``: a compressed model to a packed file and back, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.errors import BudgetExceededError, PlanMismatchError
from fitcompress.files import check_writable, write_atomically
from fitcompress.model import MatrixView, check_finite, compressible_layers
from fitcompress.quantize import (
    WeightGrid,
    attach_activation,
    attach_grid,
    attach_plan,
    grid_of,
    plan_of,
    remove,
)
from fitcompress.storage.activations import (
    StoredActivation,
    activation_keys,
    quantizers_for,
    stored_activations,
    write_activations,
)
from fitcompress.storage.coded_weight import (
    CodedWeight,
    Coding,
    StoredWeight,
    check_coding,
    dense_weights,
    write_all,
)
from fitcompress.storage.container import Packed, pack
from fitcompress.storage.leftovers import grid_prefixes, leftovers_of
from fitcompress.storage.packed_file import PackedFile
from fitcompress.storage.sections import Leftovers, write_leftovers
from fitcompress.storage.tensors import DTYPES, smallest_name

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from torch import nn

    from fitcompress.search.plan import Plan

__all__ = [
    "PackedModel",
    "coded_weights",
    "layer_bytes",
    "load",
    "packed_bytes",
    "plan_info",
    "read",
    "save",
]


@dataclass(frozen=True)
class PackedModel:
    """A packed file, decoded.

    Attributes:
        plan: The plan with the levels as stored.
        weights: Module name → weight as it is stored.
        dense: Module name → the weight.
        leftovers: Everything else.
        size_bytes: Size of the file.
        activations: Module name → quantizer of its input.
    """

    plan: Plan
    weights: dict[str, StoredWeight]
    dense: dict[str, torch.Tensor]
    leftovers: Leftovers
    size_bytes: int
    activations: dict[str, StoredActivation] = field(default_factory=dict)

    def state(self) -> dict[str, torch.Tensor]:
        """Return a plain state dict with the dequantized weights."""
        state = {self.weights[name].key: value for name, value in self.dense.items()}
        state |= self.leftovers.state()
        return state | {key: state[to] for key, to in self.leftovers.aliases.items()}


def packed_bytes(model: nn.Module, *, coding: Coding = "smallest") -> bytes:
    """Return the bytes of the packed file of a compressed model.

    Args:
        model: What ``apply``, ``compress`` or ``load(trainable=True)`` returned.
        coding: How codes are coded, see :func:`save`.

    Raises:
        PlanMismatchError: The model is not compressed.
        NonFiniteError: A weight or a step is NaN or infinite.
        CalibrationError: The quantizer of an activation is not calibrated.
        OptionError: It has steps along another dimension than the channels'.
    """
    plan = plan_of(model)
    check_finite(model)
    sections = write_all(coded_weights(model), check_coding(coding))
    sections.append(write_leftovers(leftovers_of(model)))
    if found := stored_activations(model):
        sections.append(write_activations(found))
    return pack(Packed(plan_info(plan), sections))


def plan_info(plan: Plan) -> dict[str, Any]:
    """Return what the index of a packed file says about a plan."""
    return {
        "method": plan.method,
        "status": plan.status,
        "gap": plan.gap if plan.gap is None else float(f"{plan.gap:.3g}"),
        "distortion": float(f"{plan.distortion:.4g}"),
        "limit_bytes": plan.limit_bytes,
    }


def layer_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes in the file of every layer, scales and checksum included."""
    weights = coded_weights(model)
    sections = write_all(weights, "smallest")
    return {
        w.name: len(section.payload) + 4
        for w, section in zip(weights, sections, strict=True)
    }


def save(
    model: nn.Module, path: str | os.PathLike[str], *, coding: Coding = "smallest"
) -> int:
    """Write a compressed model to a packed file, atomically.

    Args:
        model: What ``apply``, ``compress`` or ``load(trainable=True)`` returned.
        path: The file, usually ``*.safetensors``.
        coding: How codes are coded. ``"smallest"``: each weight in the way that takes
            fewest bytes, which almost always is ``"adaptive"``; that learns from
            neighbours, rows and columns, and decodes some 20 million weights a second.
            ``"static"``: within 1 % of the order-0 entropy, decoded many times as fast;
            for large models. The plan's budget is kept either way, or nothing written.

    Returns:
        The size of the file in bytes.

    Raises:
        BudgetExceededError: The file would exceed the plan's budget; nothing is
            written.
        PlanMismatchError: The model is not compressed.
        NonFiniteError: A weight or a step is NaN or infinite.
        CalibrationError: The quantizer of an activation is not calibrated.
        OptionError: It has steps along another dimension than the channels', or there
            is no such coding.
        OutputError: The file cannot be written.
    """
    check_writable(path)
    data = packed_bytes(model, coding=coding)
    limit = plan_of(model).limit_bytes
    if limit is not None and len(data) > limit:
        raise BudgetExceededError(
            "the file would exceed its budget and is not written",
            size_bytes=len(data),
            got=f"{len(data)} bytes",
            wanted=f"at most {limit} bytes",
            fix="search again with a smaller budget, or calibrate in apply"
            + ("" if coding == "smallest" else ', or use coding="smallest"'),
        )
    write_atomically(path, data)
    return len(data)


def read(path: str | os.PathLike[str]) -> PackedModel:
    """Read and decode a packed file without a model.

    Raises:
        FileNotFoundError: There is no such file.
        FormatError: The file is damaged, truncated, or something else.
    """
    return _read(path, lambda file, weights: None)


def _read(
    path: str | os.PathLike[str],
    check: Callable[[PackedFile, dict[str, StoredWeight]], None],
) -> PackedModel:
    """Read and decode a packed file; ``check`` may raise before codes are decoded."""
    with PackedFile(path) as file:
        weights = {name: file.stored(name) for name in file.names}
        plan, leftovers = file.plan_with(weights), file.leftovers
        inputs, size = file.activations, file.size_bytes
        check(file, weights)
        dense = dense_weights(list(weights.values()))
    named = dict(zip(weights, dense, strict=True))
    return PackedModel(plan, weights, named, leftovers, size, inputs)


def load(
    path: str | os.PathLike[str], model: nn.Module, *, trainable: bool = False
) -> nn.Module:
    """Load a packed file into ``model``, in place; weights and outputs are bit-exact.

    Args:
        path: What :func:`save` wrote.
        model: A model of the same architecture; its weights do not matter.
        trainable: Put the weights back on their grids, to go on fine-tuning and to save
            again; zeros of a layer with a mask stay zero. Otherwise plain modules with
            dense weights, fast to run. Activations are quantized either way, and
            their steps can be trained, whether ``learn`` was set or not.

    Returns:
        ``model``, in eval mode.

    Raises:
        FileNotFoundError: There is no such file.
        FormatError: The file is damaged, truncated, or something else.
        PlanMismatchError: The file belongs to another architecture.
    """

    def check(file: PackedFile, weights: dict[str, StoredWeight]) -> None:
        outline = {
            w.key: torch.empty(w.level.shape, dtype=DTYPES[w.dtype], device="meta")
            for w in weights.values()
        } | file.leftovers.state()
        outline |= {key: outline[to] for key, to in file.leftovers.aliases.items()}
        _check_state(outline, _plain_state(model))
        _check_views(weights, model)

    packed = _read(path, check)
    state = packed.state()
    if trainable:
        packed.plan.check(
            {layer.name: layer.shape for layer in compressible_layers(model)}
        )
    inputs = quantizers_for(model, packed.activations)
    remove(model, activations=True)
    model.load_state_dict(state)
    for module, quantizer in inputs:
        attach_activation(module, quantizer)
    model.eval()
    if trainable:
        layers = {layer.name: layer for layer in compressible_layers(model)}
        for name, weight in packed.weights.items():
            q = (
                0
                if weight.level.grid.bits is None
                else 2 ** (weight.level.grid.bits - 1) - 1
            )
            mask = weight.codes != 0 if weight.level.sparsity else None
            grid = WeightGrid(weight.scale, q, mask)
            module = layers[name].module
            latent = layers[name].weight.detach()
            tied = [each for _, each in layers[name].tied]
            attach_grid(module, grid.to(latent.device), latent, tied)
        attach_plan(model, packed.plan)
    return model


def _plain_state(model: nn.Module) -> dict[str, Any]:
    """Return the state dict that ``model`` has without grids and quantizers."""
    held, inputs, state = grid_prefixes(model), activation_keys(model), {}
    for key, value in model.state_dict().items():
        if key in inputs:
            continue
        module, found, rest = key.partition("parametrizations.weight.")
        if f"{module}{found}" not in held:
            state[key] = value
        elif rest == "original":
            state[f"{module}weight"] = value
    return state


def _check_state(state: dict[str, torch.Tensor], own: dict[str, Any]) -> None:
    fix = (
        "build the model that was compressed, with the same options and dtype; if "
        "channels were pruned: methods.prune_channels, or --channels PLAN"
    )
    for key in [*state, *own]:
        if key not in own or key not in state:
            raise PlanMismatchError(
                f"the file and the model differ in tensor {key!r}",
                got="a model that lacks it"
                if key not in own
                else "a file that lacks it",
                fix=fix,
            )
        a, b = state[key], own[key]
        if a.shape != b.shape or a.dtype != b.dtype:
            raise PlanMismatchError(
                f"the file and the model differ in tensor {key!r}",
                got=f"{tuple(b.shape)} {b.dtype} in the model",
                wanted=f"{tuple(a.shape)} {a.dtype} as in the file",
                fix=fix,
            )


def _check_views(weights: dict[str, StoredWeight], model: nn.Module) -> None:
    """Raise if a convolution is transposed, or grouped otherwise, on one side only."""
    for name, weight in weights.items():
        view = MatrixView.of(model.get_submodule(name))
        if view != weight.view:
            raise PlanMismatchError(
                f"the file and the model differ in the kind of layer {name!r}",
                got=f"{view} in the model",
                wanted=f"{weight.view} as in the file",
                fix="build the model that was compressed, with the same options",
            )


def coded_weights(model: nn.Module) -> list[CodedWeight]:
    """Return codes and scales of every compressed layer.

    Raises:
        PlanMismatchError: The model is not compressed.
    """
    plan, coded = plan_of(model), []
    modules = dict(model.named_modules())
    for name, level in plan.levels.items():
        grid = grid_of(modules[name]) if name in modules else None
        if grid is None:
            raise PlanMismatchError(
                f"layer {name!r} of the plan is on no grid",
                fix="save the model that apply returned, before remove()",
            )
        weight = modules[name].weight.detach()
        if weight.numel():
            shape = tuple(weight.shape)
            coded.append(
                CodedWeight(
                    name,
                    grid.codes(weight),
                    grid.scale.detach(),
                    smallest_name(weight),
                    replace(level, shape=shape),
                    grid.view,
                )
            )
    return coded
