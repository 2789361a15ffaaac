"""Integers behind DequantizeLinear in the place of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fitcompress.export.graph import initializer, insert, placeholders
from fitcompress.export.integers import weight_type
from fitcompress.export.placeholders import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Collection

    from fitcompress.export.graph_weights import GraphWeight
    from fitcompress.export.integers import IntegerType

__all__ = ["FLOAT", "write_weights"]

FLOAT = "FLOAT"
DTYPES = {"f4": "FLOAT", "f2": "FLOAT16", "bf2": "BFLOAT16"}


def write_weights(
    model: ir.Model,
    weights: dict[str, GraphWeight],
    *,
    opset: int,
    min_bits: int,
    floats: Collection[str] = (),
) -> dict[str, str]:
    """Replace every placeholder of a weight, in place.

    By DequantizeLinear(codes, Δ) with the narrowest integers that hold the codes; by
    plain numbers where none does.

    Args:
        model: With placeholders.
        weights: Layer → weight.
        opset: Version of the operator set.
        min_bits: No narrower integers than these.
        floats: Layers whose weights become plain numbers whatever their codes.

    Returns:
        Layer → ONNX's name of the type that the file has its weight in.
    """
    kinds: dict[str, str] = {}
    made: dict[str, ir.Value] = {}
    for layer, node in placeholders(model, WEIGHT):
        if layer not in made:
            place = _front(model, node)
            weight = weights[layer]
            kind = None if layer in floats else _kind(weight, opset, min_bits)
            made[layer] = _write(model, place, weight, kind)
            kinds[layer] = DTYPES[weight.dtype] if kind is None else kind.name
            made[layer].shape = node.outputs[0].shape
            made[layer].type = node.outputs[0].type
        node.outputs[0].replace_all_uses_with(made[layer], replace_graph_outputs=True)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    return kinds


def _front(model: ir.Model, node: ir.Node) -> ir.Node:
    """Return the node before which a weight is made: of the main graph, its first."""
    return node if node.graph is model.graph else model.graph[0]


def _kind(weight: GraphWeight, opset: int, min_bits: int) -> IntegerType | None:
    """Return the type of integers that holds all codes, or None."""
    lowest, highest = int(weight.codes.min()), int(weight.codes.max())
    return weight_type(lowest, highest, opset, min_bits)


def _write(
    model: ir.Model, place: ir.Node, weight: GraphWeight, kind: IntegerType | None
) -> ir.Value:
    """Return the value of a weight; its initializer has integers of that kind."""
    name = f"{weight.name}.weight" if weight.name else "weight"
    target = DTYPES[weight.dtype]
    if kind is None:
        return initializer(model, name, weight.values(), target)
    wide = weight.scale.size > 1
    regrouped = wide and weight.row_axis is None
    codes = weight.regrouped() if regrouped else weight.codes
    attributes: dict[str, Any] = {}
    if wide:
        attributes["axis"] = 0 if weight.row_axis is None else weight.row_axis
    scale = weight.scale if wide else weight.scale.reshape(())
    stored = initializer(model, f"{name}_codes", codes, kind.name)
    steps = initializer(model, f"{name}_scale", scale)
    steps_last = name if target == FLOAT and not regrouped else f"{name}_rows"
    inputs = [stored, steps]
    value = insert(place, "DequantizeLinear", inputs, steps_last, **attributes)
    if regrouped:
        value = _in_groups(model, place, weight, value, name)
    if target != FLOAT:
        to = int(ir.DataType[target])
        value = insert(place, "Cast", [value], f"{name}_{target.lower()}", to=to)
    return value


def _in_groups(
    model: ir.Model, place: ir.Node, weight: GraphWeight, rows: ir.Value, name: str
) -> ir.Value:
    """Bring rows of a transposed convolution with groups into its layout."""
    inputs, outputs, *kernel = weight.codes.shape
    groups = weight.groups
    split = np.array([groups, outputs, inputs // groups, *kernel], np.int64)
    whole = np.array(weight.codes.shape, np.int64)
    shapes = [
        initializer(model, f"{name}_{key}", shape)
        for key, shape in (("split", split), ("shape", whole))
    ]
    apart = insert(place, "Reshape", [rows, shapes[0]], f"{name}_apart")
    order = [0, 2, 1, *range(3, 3 + len(kernel))]
    swapped = insert(place, "Transpose", [apart], f"{name}_swapped", perm=order)
    return insert(place, "Reshape", [swapped, shapes[1]], f"{name}_grouped")
