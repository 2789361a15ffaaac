"""The section of a packed file that holds the quantizers of activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fitcompress.errors import (
    CalibrationError,
    FormatError,
    OptionError,
    PlanMismatchError,
    UnsupportedLayerError,
)
from fitcompress.model.value_ranges import Range, check_bits
from fitcompress.quantize import (
    ActivationQuantizer,
    activations,
    channel_of,
)
from fitcompress.storage.container import ACTIVATIONS, Section
from fitcompress.storage.tensors import from_bytes, to_bytes

__all__ = [
    "StoredActivation",
    "activation_keys",
    "quantizers_for",
    "read_activations",
    "stored_activations",
    "write_activations",
]

STORED = "f4"  # dtype of Δ
FLAGS = {"static": (False, False), "symmetric": (False, True),
         "dynamic": (True, False), "dynamic symmetric": (True, True)}  # fmt: skip


@dataclass(frozen=True)
class StoredActivation:
    """The quantizer of one layer's input.

    Attributes:
        name: Qualified name of the module.
        bits: 2 … 16.
        kind: A key of ``FLAGS``.
        per_channel: Whether every channel has a Δ.
        bounds: lo and hi; both 0 of a dynamic one.
        scale: Δ > 0, float32; empty of a dynamic one.
    """

    name: str
    bits: int
    kind: str
    per_channel: bool
    bounds: tuple[int, int]
    scale: torch.Tensor


def stored_activations(model: nn.Module) -> list[StoredActivation]:
    """Return the quantizers of ``model``, in its order.

    Raises:
        CalibrationError: One is not calibrated.
        OptionError: One has a step for every entry of a dimension that is not the
            channels', which the file could not say.
    """
    found = []
    for name, quantizer in activations(model):
        if not quantizer.calibrated:
            raise CalibrationError(
                f"the input quantizer of {name!r} is not calibrated",
                fix="run calibration data and call freeze(), or detach it",
            )
        _check_channel(name, model.get_submodule(name), quantizer)
        flags = (quantizer.dynamic, quantizer.symmetric)
        kind = next(key for key, value in FLAGS.items() if value == flags)
        scale = torch.empty(0)
        if not quantizer.dynamic:
            scale = quantizer.step.detach()
        bounds = (quantizer.min_code, quantizer.max_code)
        wide = quantizer.channel is not None
        found.append(StoredActivation(name, quantizer.bits, kind, wide, bounds, scale))
    return found


def write_activations(found: list[StoredActivation]) -> Section:
    """Return the one section of all quantizers."""
    layers = [
        [a.name, a.bits, a.kind, a.per_channel, *a.bounds, a.scale.numel()]
        for a in found
    ]
    payload = b"".join(to_bytes(a.scale, STORED) for a in found)
    return Section({"kind": ACTIVATIONS, "layers": layers}, payload)


def read_activations(section: Section) -> dict[str, StoredActivation]:
    """Return module name → quantizer.

    Raises:
        FormatError: The section is not what :func:`write_activations` writes.
    """
    rows, payload, start = section.entry.get("layers"), section.payload, 0
    found: dict[str, StoredActivation] = {}
    if not isinstance(rows, list) or not rows:
        raise FormatError("quantizers of activations without a list of layers")
    for row in rows:
        if not _possible(row):
            raise FormatError(
                "the quantizer of an activation is impossible", got=str(row)[:200]
            )
        name, bits, kind, wide, lo, hi, scales = row
        if name in found:
            raise FormatError("an activation stands in the file twice", got=name[:100])
        end = start + 4 * scales
        if end > len(payload):
            raise FormatError("the steps of activations end outside their section")
        scale = from_bytes(payload[start:end], STORED, STORED, (scales,))
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise FormatError(
                f"a step of the input of {name[:100]!r} is not positive and finite"
            )
        found[name] = StoredActivation(name, bits, kind, wide, (lo, hi), scale)
        start = end
    if start != len(payload):
        raise FormatError(
            "the section of activations does not fit its description",
            got=f"{len(payload)} bytes",
            wanted=f"{start} bytes",
        )
    return found


def quantizers_for(
    model: nn.Module, found: dict[str, StoredActivation]
) -> list[tuple[nn.Module, ActivationQuantizer]]:
    """Return layers of ``model`` and the quantizers to attach to them.

    Raises:
        PlanMismatchError: A layer is missing, of another kind, or has other channels.
    """
    modules, made = dict(model.named_modules()), []
    for name, stored in found.items():
        try:
            module = modules[name]
            channel = channel_of(module)
        except (KeyError, UnsupportedLayerError) as error:
            raise _mismatch(name, "no such layer in the model") from error
        dynamic, symmetric = FLAGS[stored.kind]
        if stored.per_channel and not dynamic:
            linear = isinstance(module, nn.Linear)
            channels = module.in_features if linear else module.in_channels
            if len(stored.scale) != channels:
                raise _mismatch(name, f"{channels} channels in the model")
        quantizer = ActivationQuantizer(
            stored.bits,
            symmetric=symmetric,
            channel=channel if stored.per_channel else None,
            dynamic=dynamic,
        )
        if not dynamic:
            quantizer.set_range(Range(stored.scale, *stored.bounds))
        made.append((module, quantizer))
    return made


def activation_keys(model: nn.Module) -> set[str]:
    """Return the state dict's keys of quantizers, under every name of their layers."""
    return {
        f"{name}.input_quantizer.{key}".removeprefix(".")
        for name, quantizer in activations(model, every_name=True)
        for key in quantizer.state_dict()
    }


def _check_channel(
    name: str, module: nn.Module, quantizer: ActivationQuantizer
) -> None:
    """Raise unless the steps of a quantizer are one, or one per channel of its layer.

    Raises:
        OptionError: They are along another dimension.
    """
    usual = channel_of(module)
    # Counted from the front, in a batch, only convolutions have one place for channels.
    known = {None, usual} if isinstance(module, nn.Linear) else {None, usual, 1}
    if quantizer.channel not in known:
        raise OptionError(
            f"the input quantizer of {name!r} has steps along another dimension",
            got=f"channel={quantizer.channel}",
            wanted=f"None or {usual}",
            fix="give channel_of(module) as the channel",
        )


def _possible(row: Any) -> bool:
    """Whether a row of the index describes a quantizer."""
    if not isinstance(row, list) or len(row) != 7:
        return False
    name, bits, kind, wide, lo, hi, scales = row
    if not isinstance(name, str) or type(wide) is not bool or kind not in list(FLAGS):
        return False
    if any(type(n) is not int for n in (lo, hi, scales)):
        return False
    try:
        check_bits(bits)
    except OptionError:
        return False
    dynamic, symmetric = FLAGS[kind]
    if dynamic:
        return (lo, hi, scales) == (0, 0, 0)
    if not (lo <= 0 < hi and hi - lo < 2**bits) or (symmetric and lo != -hi):
        return False
    return 0 < int(scales) < 2**24 if wide else int(scales) == 1


def _mismatch(name: str, got: str) -> PlanMismatchError:
    return PlanMismatchError(
        f"the file and the model differ in the input of layer {name!r}",
        got=got,
        wanted="the layer whose input was quantized, with as many channels",
        fix="build the model that was compressed, with the same options",
    )
