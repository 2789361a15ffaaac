"""Small steps on an ONNX graph in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fitcompress.export.placeholders import DOMAIN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = [
    "attribute",
    "constant",
    "initializer",
    "insert",
    "only_use",
    "placeholders",
    "replace_input",
    "set_dimension",
]


def placeholders(model: ir.Model, kind: str) -> list[tuple[str, ir.Node]]:
    """Return (layer, node) of every placeholder of a kind, subgraphs included."""
    return [
        (node.attributes["layer"].as_string(), node)
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.domain == DOMAIN and node.op_type == kind
    ]


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """Return the value of an attribute of a node."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the numbers of an initializer, or None if ``value`` is something else."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def initializer(
    model: ir.Model, name: str, array: NDArray[Any], dtype: str | None = None
) -> ir.Value:
    """Add numbers to the model under ``name``, or one like it that is free.

    Args:
        model: Gets the initializer.
        name: What to call it.
        array: The numbers.
        dtype: ONNX's name of their type; None takes that of the array.
    """
    initializers, free, count = model.graph.initializers, name, 1
    while free in initializers:
        count += 1
        free = f"{name}_{count}"
    kind = None if dtype is None else ir.DataType[dtype]
    numbers = array if kind is None else array.astype(kind.numpy())
    tensor = ir.Tensor(np.ascontiguousarray(numbers).reshape(array.shape), name=free)
    value = ir.Value(
        name=free,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return value


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    **attributes: Any,
) -> ir.Value:
    """Put a node before another one and return its output, called ``name``."""
    output = ir.Value(name=name)
    node = ir.node(op_type, inputs, attributes, outputs=[output], name=f"node_{name}")
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return output


def only_use(value: ir.Value) -> tuple[ir.Node, int] | None:
    """Return the node that takes a value, and as which input, if it is the only one."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    return uses[0].node, uses[0].idx


def replace_input(node: ir.Node, index: int, value: ir.Value) -> None:
    """Let a node take ``value`` as an input, also as one that it had left out."""
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def set_dimension(value: ir.Value, axis: int, size: int) -> None:
    """Note a changed size in the shape of a value, if it has one."""
    if value.shape is None:
        return
    shape: list[Any] = list(value.shape)
    shape[axis] = size
    value.shape = ir.Shape(shape)
