"""Sums of residual networks in integers: 8 bits before and after each of them.

    a + b  →  Δ·(Q(relu(Δ₁·(k₁ − z₁) + Δ₂·(k₂ − z₂)); Δ, z) − z)

Runtimes compute a convolution in integers if its output is quantized, and a sum if both
summands and the result are. What a layer reads is on its quantizer's 8-bit grid anyway,
and a shortcut takes the same codes; other summands and results get grids of their own,
which cover what was measured. Slices and padding of shortcuts move codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from fitcompress.export.graph import (
    attribute,
    constant,
    initializer,
    insert,
    only_use,
    replace_input,
)

if TYPE_CHECKING:
    from fitcompress.model.value_ranges import Range

__all__ = ["BITS", "Sum", "find_sums", "without_grid", "write_sums"]

BITS = 8
MOVES = ("Identity", "Slice", "Pad")  # operators that move values and compute nothing


@dataclass
class Sum:
    """A sum whose convolutions can run in integers if it does.

    Attributes:
        summands: What is added, before slices and padding.
        result: Its output, or that of the ReLU that alone follows.
        moves: The slices and paddings between each summand and the sum, in order.
        node: The Add.
    """

    summands: tuple[ir.Value, ir.Value]
    result: ir.Value
    moves: tuple[list[ir.Node], list[ir.Node]]
    node: ir.Node


def find_sums(model: ir.Model) -> list[Sum]:
    """Return the sums to which an integer convolution contributes, in graph order.

    That is one of UINT8 codes and INT8 weights, as quantizers and weights were written.
    A sum that is an output of the graph stays in float.
    """
    found = []
    for node in model.graph:
        if node.op_type != "Add" or node.domain != "" or not _float(node.outputs[0]):
            continue
        (one, by_one), (two, by_two) = (_origin(value) for value in node.inputs)
        if one is None or two is None or not (_integer(one) or _integer(two)):
            continue
        result = node.outputs[0]
        following = only_use(result)
        if following is not None and following[0].op_type == "Relu":
            result = following[0].outputs[0]
        if not result.is_graph_output() and list(result.uses()):
            found.append(Sum((one, two), result, (by_one, by_two), node))
    return found


def without_grid(sums: list[Sum]) -> list[ir.Value]:
    """Return the values that no layer quantizes to 8 bits, so that a grid is needed."""
    return [value for value in _values(sums) if not _quantizers(value)]


def write_sums(model: ir.Model, sums: list[Sum], ranges: dict[str, Range]) -> None:
    """Put summands and results of sums on 8-bit grids, in place.

    Args:
        model: With quantizers and weights written.
        sums: Of :func:`find_sums`.
        ranges: Name of a value → its range, of all of :func:`without_grid`.
    """
    grids = {value: _put_on_grid(model, value, ranges) for value in _values(sums)}
    for made in sums:
        for side, value in enumerate(made.summands):
            if made.moves[side]:
                _move_codes(made, side, grids[value])
    model.graph.sort()


def _values(sums: list[Sum]) -> list[ir.Value]:
    """Return what sums read and write, each once, in the order of the graph."""
    each = (value for made in sums for value in (*made.summands, made.result))
    return list(dict.fromkeys(each))


def _float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


def _origin(value: ir.Value | None) -> tuple[ir.Value | None, list[ir.Node]]:
    """Return what a summand is before slices and padding, and those, in order."""
    moves: list[ir.Node] = []
    while value is not None and value.producer() is not None:
        node = value.producer()
        assert node is not None
        if not _moves(node) or only_use(value) is None:
            return value, moves[::-1]
        moves.append(node)
        value = node.inputs[0]
    return None, []


def _moves(node: ir.Node) -> bool:
    """Whether a node could do the same with codes: its other inputs are constants."""
    if node.domain != "" or node.op_type not in MOVES:
        return False
    rest = [v for v in node.inputs[1:] if v is not None]
    if any(constant(value) is None for value in rest):
        return False
    if node.op_type != "Pad":
        return True
    filler = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    zero = filler is None or not filler.any()
    return attribute(node, "mode", "constant") == "constant" and zero


def _integer(value: ir.Value) -> bool:
    """Whether a value is of an integer convolution, or the positive part of that."""
    node = value.producer()
    if node is not None and node.op_type == "Relu" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Conv" or node.domain != "":
        return False
    return _codes_of(node.inputs[0]) == "UINT8" and _codes_of(node.inputs[1]) == "INT8"


def _codes_of(value: ir.Value | None) -> str | None:
    """Return the type of the codes that a value is made from, or None."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    codes = node.inputs[0]
    array, source = constant(codes), codes.producer()
    if array is not None:
        return ir.DataType.from_numpy(array.dtype).name
    zero = None if source is None else constant(source.inputs[-1])
    return None if zero is None else ir.DataType.from_numpy(zero.dtype).name


def _put_on_grid(model: ir.Model, value: ir.Value, ranges: dict[str, Range]) -> ir.Node:
    """Let everything that reads a value read it quantized; return the quantizer.

    Of several grids, the one of the largest step: it covers what the others do.
    """
    uses, quantizers = list(value.uses()), _quantizers(value)
    if quantizers:
        first = max(quantizers, key=_step)
        grid = next(iter(first.outputs[0].uses())).node.outputs[0]
    else:
        assert value.name is not None
        first, grid = _new_grid(model, value, ranges[value.name])
    for use in uses:
        if use.node is first:
            continue
        if use.node in quantizers and _same(use.node, first):
            use.node.outputs[0].replace_all_uses_with(first.outputs[0])
            assert use.node.graph is not None
            use.node.graph.remove(use.node, safe=True)
        else:
            use.node.replace_input_with(use.idx, grid)
    return first


def _quantizers(value: ir.Value) -> list[ir.Node]:
    """Return what quantizes a value to UINT8 with one step, for a layer's input."""
    return [u.node for u in value.uses() if u.idx == 0 and _eight_bits(u.node)]


def _eight_bits(node: ir.Node) -> bool:
    if node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
        return False
    step, zero = constant(node.inputs[1]), constant(node.inputs[2])
    if step is None or zero is None or step.ndim or zero.dtype != np.uint8:
        return False
    following = only_use(node.outputs[0])
    return following is not None and following[0].op_type == "DequantizeLinear"


def _step(quantizer: ir.Node) -> float:
    found = constant(quantizer.inputs[1])
    assert found is not None
    return float(found)


def _same(one: ir.Node, two: ir.Node) -> bool:
    """Whether two quantizers of :func:`_eight_bits` have the same grid."""
    pairs = zip(one.inputs[1:], two.inputs[1:], strict=True)
    for left, right in pairs:
        step, other = constant(left), constant(right)
        if step is None or other is None or not np.array_equal(step, other):
            return False
    return True


def _new_grid(
    model: ir.Model, value: ir.Value, found: Range
) -> tuple[ir.Node, ir.Value]:
    """Insert a quantizer; return it and the value on its grid."""
    name, before = f"{value.name}_sum", model.graph[-1]  # sorted later
    parts = [
        initializer(model, f"{name}_scale", found.scale.numpy().reshape(())),
        initializer(model, f"{name}_zero", np.array(-found.min_code), "UINT8"),
    ]
    codes = insert(before, "QuantizeLinear", [value, *parts], f"{name}_codes")
    grid = insert(before, "DequantizeLinear", [codes, *parts], f"{name}_grid")
    codes.shape, grid.shape = value.shape, value.shape
    codes.type, grid.type = ir.TensorType(ir.DataType.UINT8), value.type
    node = codes.producer()
    assert node is not None
    return node, grid


def _move_codes(made: Sum, side: int, quantizer: ir.Node) -> None:
    """Let slices and padding of a summand work on codes, and decode them behind."""
    moves, (step, zero) = made.moves[side], quantizer.inputs[1:]
    moves[0].replace_input_with(0, quantizer.outputs[0])
    for node in moves:
        node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        if node.op_type == "Pad":
            assert zero is not None
            replace_input(node, 2, zero)
    last = moves[-1].outputs[0]
    grid = insert(
        made.node, "DequantizeLinear", [last, step, zero], f"{last.name}_grid"
    )
    grid.shape, grid.type = last.shape, ir.TensorType(ir.DataType.FLOAT)
    for index, value in enumerate(made.node.inputs):
        if value is last:
            made.node.replace_input_with(index, grid)
