"""QuantizeLinear and DequantizeLinear in the place of quantizers of inputs.

    x̂ = Δ · clip(round(x / Δ), lo, hi)  =  Dequantize(Quantize(x; Δ, z); Δ, z),  z = −lo

QuantizeLinear rounds half to even and saturates at the bounds of its type. Where lo
and hi are not those bounds, x is clipped to [Δ·lo, Δ·hi] first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fitcompress.errors import ExportError
from fitcompress.export.graph import initializer, insert, placeholders
from fitcompress.export.integers import activation_type
from fitcompress.export.placeholders import INPUT
from fitcompress.export.write_weights import FLOAT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fitcompress.export.integers import IntegerType
    from fitcompress.storage.activations import StoredActivation

__all__ = ["check_inputs", "write_inputs"]


def check_inputs(found: Iterable[StoredActivation], opset: int) -> None:
    """Raise if a quantizer has no equal among the operators of ONNX.

    Raises:
        ExportError: One is dynamic, or has more codes than the types of this opset.
    """
    for stored in found:
        if stored.kind.startswith("dynamic"):
            raise ExportError(
                f"the input quantizer of {stored.name!r} chooses its step batch by "
                "batch",
                got=f"{stored.bits} bits, {stored.kind}",
                wanted="a static one: DynamicQuantizeLinear chooses other steps",
                fix="calibrate it with an observer and freeze(), or detach it",
            )
        if activation_type(_count(stored), opset) is None:
            raise ExportError(
                f"the input quantizer of {stored.name!r} has too many codes",
                got=f"{_count(stored)} of {stored.bits} bits, opset {opset}",
                wanted="at most 256 before opset 21",
                fix="leave opset out, or give the input 8 bits",
            )


def write_inputs(
    model: ir.Model, found: dict[str, StoredActivation], channels: dict[str, int]
) -> dict[str, str]:
    """Replace every placeholder of an input, in place.

    Args:
        model: With placeholders.
        found: Layer → quantizer of its input.
        channels: Layer → dimension of its input that its channels are, from the end.

    Returns:
        Layer → ONNX's name of the type of its input.
    """
    kinds: dict[str, str] = {}
    for layer, node in placeholders(model, INPUT):
        kind = activation_type(_count(found[layer]), model.graph.opset_imports[""])
        assert kind is not None
        value = _write(model, node, found[layer], kind, channels[layer])
        value.shape, value.type = node.outputs[0].shape, node.outputs[0].type
        node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        kinds[layer] = kind.name
    return kinds


def _write(
    model: ir.Model,
    node: ir.Node,
    stored: StoredActivation,
    kind: IntegerType,
    channel: int,
) -> ir.Value:
    name, x = f"{stored.name}.input".removeprefix("."), node.inputs[0]
    assert x is not None
    dtype = FLOAT if x.dtype is None else x.dtype.name
    if dtype != FLOAT:
        x = insert(node, "Cast", [x], f"{name}_float", to=int(ir.DataType.FLOAT))
    lo, hi = stored.bounds
    step = stored.scale.detach().cpu().numpy().astype(np.float32)
    attributes: dict[str, Any] = {}
    if stored.per_channel:
        rank = None if x.shape is None else len(x.shape)
        attributes["axis"] = channel if rank is None else rank + channel
    else:
        step = step.reshape(())
    if hi - lo + 1 < 2**kind.bits:
        edges = step.reshape(-1, *[1] * (-1 - channel)) if stored.per_channel else step
        low = initializer(model, f"{name}_low", np.asarray(edges * np.float32(lo)))
        high = initializer(model, f"{name}_high", np.asarray(edges * np.float32(hi)))
        if stored.per_channel:
            x = insert(node, "Max", [x, low], f"{name}_above")
            x = insert(node, "Min", [x, high], f"{name}_clipped")
        else:
            x = insert(node, "Clip", [x, low, high], f"{name}_clipped")
    zeros = np.full(step.shape, -lo, np.int64)
    parts = [
        initializer(model, f"{name}_scale", step),
        initializer(model, f"{name}_zero", zeros, kind.name),
    ]
    codes = insert(node, "QuantizeLinear", [x, *parts], f"{name}_codes", **attributes)
    grid = f"{name}_grid"
    value = insert(node, "DequantizeLinear", [codes, *parts], grid, **attributes)
    if dtype != FLOAT:
        to = int(ir.DataType[dtype])
        value = insert(node, "Cast", [value], f"{name}_{dtype.lower()}", to=to)
    return value


def _count(stored: StoredActivation) -> int:
    lo, hi = stored.bounds
    return hi - lo + 1
