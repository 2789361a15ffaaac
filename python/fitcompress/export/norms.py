"""Batch norms folded into the steps of the layer before them.

    a ∘ (Δ·k ∗ x + b) + c  =  (|a|Δ) · (sgn(a) k) ∗ x  +  (a∘b + c)

with a = γ / √(σ² + ε) and c = β − μa, per output channel: the codes keep their range,
one Δ per tensor becomes one per channel. Runtimes fuse a convolution with what follows
it only if no norm stands between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fitcompress.export.graph import (
    attribute,
    constant,
    initializer,
    only_use,
    replace_input,
)
from fitcompress.export.layouts import single_uses

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from fitcompress.export.graph_weights import GraphWeight
    from fitcompress.export.layouts import Use

__all__ = ["fold_norms"]


def fold_norms(model: ir.Model, weights: dict[str, GraphWeight]) -> int:
    """Fold every batch norm that alone follows a layer of ``weights``, in place.

    Equal in real numbers; in float32 outputs differ by its rounding.

    Returns:
        How many were folded.
    """
    return sum(_fold(model, use) for use in single_uses(model, weights))


def _fold(model: ir.Model, use: Use) -> bool:
    following = only_use(use.output)
    if following is None or following[1] != 0:
        return False
    norm = following[0]
    if norm.op_type != "BatchNormalization" or attribute(norm, "training_mode", 0):
        return False
    found = _affine(norm)
    bias = np.zeros(use.weight.rows) if use.bias is None else constant(use.bias)
    if found is None or bias is None or bias.shape != (use.weight.rows,):
        return False
    factor, shift = found
    if not use.weight.multiply_rows(factor):
        return False
    value = initializer(
        model,
        f"{use.weight.name}.folded_bias",
        (factor * bias.astype(np.float64) + shift).astype(np.float32),
        None if use.weight.dtype == "f4" else _name(norm.inputs[2]),
    )
    replace_input(use.node, 2, value)
    use.output.shape, use.output.type = norm.outputs[0].shape, norm.outputs[0].type
    norm.outputs[0].replace_all_uses_with(use.output, replace_graph_outputs=True)
    assert norm.graph is not None
    norm.graph.remove(norm, safe=True)
    return True


def _affine(norm: ir.Node) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return a and c of a norm whose parameters are constants, float64 [channels]."""
    parts: list[NDArray[Any]] = []
    for value in norm.inputs[1:5]:
        found = constant(value)
        if found is None:
            return None
        parts.append(found.astype(np.float64))
    gamma, beta, mean, variance = parts
    factor = gamma / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    return factor, beta - mean * factor


def _name(value: ir.Value | None) -> str | None:
    return None if value is None or value.dtype is None else value.dtype.name
