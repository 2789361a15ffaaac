"""Linear layers with quantized inputs as MatMul and Sub.

ONNX Runtime multiplies the integers themselves in DequantizeLinear, DequantizeLinear →
MatMul; a Gemm with a float bias it computes in float. An Add after the MatMul it would
make a Gemm again, so the bias is subtracted with its sign changed, which is the same
to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fitcompress.export.graph import constant, initializer, insert
from fitcompress.export.layouts import single_uses
from fitcompress.export.placeholders import DOMAIN, INPUT

if TYPE_CHECKING:
    import onnx_ir as ir

    from fitcompress.export.graph_weights import GraphWeight

__all__ = ["split_linears"]


def split_linears(model: ir.Model, weights: dict[str, GraphWeight]) -> None:
    """Replace Gemm by MatMul and Sub where the input is quantized, in place."""
    for use in single_uses(model, weights):
        node, x = use.node, use.node.inputs[0]
        source = None if x is None else x.producer()
        if node.op_type != "Gemm" or source is None:
            continue
        if source.domain != DOMAIN or source.op_type != INPUT:
            continue
        bias = constant(use.bias)
        if use.bias is not None and bias is None:
            continue
        weight = use.source.outputs[0]
        if use.outputs == 0:
            use.weight.transpose()
            if weight.shape is not None:
                weight.shape = type(weight.shape)(reversed(list(weight.shape)))
        name, output = use.weight.name, use.output
        value = insert(node, "MatMul", [x, weight], f"{name}.product")
        value.shape, value.type = output.shape, output.type
        if bias is not None:
            negative = initializer(model, f"{name}.negative_bias", -bias)
            value = insert(node, "Sub", [value, negative], f"{name}.sum")
            value.shape, value.type = output.shape, output.type
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
