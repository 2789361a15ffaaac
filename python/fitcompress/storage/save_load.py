"""``save`` and ``load``: a compressed model to a packed file and back, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fitcompress.errors import BudgetExceededError, FormatError, PlanMismatchError
from fitcompress.files import check_writable, read_bytes, write_atomically
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
from fitcompress.search.plan import Level, Plan
from fitcompress.storage.activations import (
    StoredActivation,
    activation_keys,
    quantizers_for,
    read_activations,
    stored_activations,
    write_activations,
)
from fitcompress.storage.container import ACTIVATIONS, Packed, pack, unpack
from fitcompress.storage.leftovers import grid_prefixes, leftovers_of
from fitcompress.storage.sections import (
    CodedWeight,
    Leftovers,
    read_coded,
    read_leftovers,
    smallest_name,
    write_coded,
    write_leftovers,
)

if TYPE_CHECKING:
    import os

    import torch
    from torch import nn

__all__ = [
    "PackedModel",
    "coded_weights",
    "layer_bytes",
    "load",
    "packed_bytes",
    "read",
    "save",
]


@dataclass(frozen=True)
class PackedModel:
    """A packed file, decoded.

    Attributes:
        plan: The plan with the levels as stored.
        weights: Module name → coded weight.
        leftovers: Everything else.
        size_bytes: Size of the file.
        activations: Module name → quantizer of its input.
    """

    plan: Plan
    weights: dict[str, CodedWeight]
    leftovers: Leftovers
    size_bytes: int
    activations: dict[str, StoredActivation] = field(default_factory=dict)

    def state(self) -> dict[str, torch.Tensor]:
        """Return a plain state dict with the dequantized weights."""
        state = {w.key: w.weight() for w in self.weights.values()}
        state |= self.leftovers.state()
        return state | {key: state[to] for key, to in self.leftovers.aliases.items()}


def packed_bytes(model: nn.Module) -> bytes:
    """Return the bytes of the packed file of a compressed model.

    Args:
        model: What ``apply``, ``compress`` or ``load(trainable=True)`` returned.

    Raises:
        PlanMismatchError: The model is not compressed.
        NonFiniteError: A weight or a step is NaN or infinite.
        CalibrationError: The quantizer of an activation is not calibrated.
        OptionError: It has steps along another dimension than the channels'.
    """
    plan = plan_of(model)
    check_finite(model)
    sections = [write_coded(w) for w in coded_weights(model)]
    sections.append(write_leftovers(leftovers_of(model)))
    if found := stored_activations(model):
        sections.append(write_activations(found))
    info = {
        "method": plan.method,
        "status": plan.status,
        "gap": plan.gap if plan.gap is None else float(f"{plan.gap:.3g}"),
        "distortion": float(f"{plan.distortion:.4g}"),
        "limit_bytes": plan.limit_bytes,
    }
    return pack(Packed(info, sections))


def layer_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes in the file of every layer, scales and checksum included."""
    return {w.name: len(write_coded(w).payload) + 4 for w in coded_weights(model)}


def save(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write a compressed model to a packed file, atomically.

    Args:
        model: What ``apply``, ``compress`` or ``load(trainable=True)`` returned.
        path: The file, usually ``*.safetensors``.

    Returns:
        The size of the file in bytes.

    Raises:
        BudgetExceededError: The file would exceed the plan's budget; nothing is
            written.
        PlanMismatchError: The model is not compressed.
        NonFiniteError: A weight or a step is NaN or infinite.
        CalibrationError: The quantizer of an activation is not calibrated.
        OptionError: It has steps along another dimension than the channels'.
        OutputError: The file cannot be written.
    """
    check_writable(path)
    data = packed_bytes(model)
    limit = plan_of(model).limit_bytes
    if limit is not None and len(data) > limit:
        raise BudgetExceededError(
            "the file would exceed its budget and is not written",
            size_bytes=len(data),
            got=f"{len(data)} bytes",
            wanted=f"at most {limit} bytes",
            fix="search again with a smaller budget, or calibrate in apply",
        )
    write_atomically(path, data)
    return len(data)


def read(path: str | os.PathLike[str]) -> PackedModel:
    """Read and decode a packed file without a model.

    Raises:
        FileNotFoundError: There is no such file.
        FormatError: The file is damaged, truncated, or something else.
    """
    data = read_bytes(path)
    packed = unpack(data)
    weights: dict[str, CodedWeight] = {}
    leftovers: Leftovers | None = None
    inputs: dict[str, StoredActivation] = {}
    for section in packed.sections:
        kind = section.entry.get("kind")
        if kind == "codes":
            weight = read_coded(section)
            if weight.name in weights:
                raise FormatError("a weight stands in the file twice", got=weight.name)
            weights[weight.name] = weight
        elif kind == "leftovers" and leftovers is None:
            leftovers = read_leftovers(section)
        elif kind == ACTIVATIONS and not inputs:
            inputs = read_activations(section)
        else:
            raise FormatError("an unknown or repeated section", got=str(kind)[:50])
    if leftovers is None or not weights:
        raise FormatError("the file has no coded weight or no leftovers")
    coded, others = {w.key for w in weights.values()}, set(leftovers.state())
    aliases = leftovers.aliases
    twice = (coded & others) | (set(aliases) & (coded | others))
    unknown = set(aliases.values()) - coded - others
    if unknown:
        raise FormatError(
            "a tensor shares another that is missing", got=sorted(unknown)[0][:100]
        )
    if twice:
        raise FormatError(
            "a tensor stands in the file twice", got=sorted(twice)[0][:100]
        )
    levels = {
        name: replace(w.level, activation_bits=inputs[name].bits)
        if name in inputs
        else w.level
        for name, w in weights.items()
    }
    plan = _plan(packed.plan, levels, len(data))
    return PackedModel(plan, weights, leftovers, len(data), inputs)


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
    packed = read(path)
    state = packed.state()
    _check_state(state, _plain_state(model))
    _check_views(packed, model)
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
            mask = None
            if weight.level.sparsity:
                mask = weight.codes != 0
            grid = WeightGrid(weight.scale, q, mask)
            module = layers[name].module
            latent = layers[name].weight.detach()
            attach_grid(module, grid.to(latent.device), latent)
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
    fix = "build the model that was compressed, with the same options and dtype"
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


def _check_views(packed: PackedModel, model: nn.Module) -> None:
    """Raise if a convolution is transposed, or grouped otherwise, on one side only."""
    for name, weight in packed.weights.items():
        view = MatrixView.of(model.get_submodule(name))
        if view != weight.view:
            raise PlanMismatchError(
                f"the file and the model differ in the kind of layer {name!r}",
                got=f"{view} in the model",
                wanted=f"{weight.view} as in the file",
                fix="build the model that was compressed, with the same options",
            )


def _plan(info: dict[str, Any], levels: dict[str, Level], size: int) -> Plan:
    try:
        limit = info.get("limit_bytes")
        gap = info.get("gap")
        return Plan(
            levels=levels,
            method=str(info.get("method")),
            distortion=float(info.get("distortion", 0.0)),
            size_bytes=size,
            bops=sum(level.bops for level in levels.values()),
            limit_bytes=limit,
            status=str(info.get("status")),
            gap=None if gap is None else float(gap),
        )
    except (TypeError, ValueError) as error:
        raise FormatError(
            "the plan in the file is impossible", got=str(info)[:200]
        ) from error


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
