"""Ranges of the values that sums add, measured on inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from fitcompress.export.sessions import runner
from fitcompress.export.sums import BITS
from fitcompress.quantize import MSEObserver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fitcompress.model.value_ranges import Range

__all__ = ["measured_ranges"]


def measured_ranges(
    model: ir.Model, values: Sequence[ir.Value], batches: Sequence[Any]
) -> dict[str, Range]:
    """Return the 8-bit ranges of least squared error of values of a graph.

    One pass of the graph in ONNX Runtime over the inputs; memory for the values of one
    batch.

    Args:
        model: The graph, without placeholders; stays as it is.
        values: Of the graph.
        batches: Inputs as the model takes them.

    Returns:
        Name of the value → range.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        CalibrationError: There are no inputs.
        NonFiniteError: A value is NaN or infinite.
    """
    if not values:
        return {}
    copy = ir.from_proto(ir.to_proto(model))
    wanted = {value.name for value in values}
    for node in copy.graph:
        for value in node.outputs:
            if value.name in wanted and not value.is_graph_output():
                copy.graph.outputs.append(value)
    names = [value.name for value in copy.graph.outputs]
    observers = {name: MSEObserver() for name in names if name in wanted}
    run = runner(ir.to_proto(copy).SerializeToString(), exact=True)
    for x in batches:
        for name, found in zip(names, run(x), strict=True):
            if name in observers:
                observers[name].observe(found)
    return {str(name): each.range(BITS) for name, each in observers.items()}
