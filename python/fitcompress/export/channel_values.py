"""What a channel that is the same number everywhere becomes on its way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fitcompress.export.graph import attribute, constant
from fitcompress.export.placeholders import DOMAIN, INPUT

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from fitcompress.storage.activations import StoredActivation

    Values = NDArray[np.float32]

__all__ = ["keeps_channels", "pass_through"]

POOLS = ("MaxPool", "GlobalAveragePool", "GlobalMaxPool")
SAME = ("Identity", *POOLS)  # a constant stays as it is


def keeps_channels(node: ir.Node, inputs: dict[str, StoredActivation]) -> bool:
    """Whether channel c of a node's output depends on channel c of its input alone.

    Channels are axis 1, and the node has one input that is not a constant.
    """
    if node.domain == DOMAIN and node.op_type == INPUT:
        return not inputs[node.attributes["layer"].as_string()].per_channel
    if node.domain != "" or len(node.outputs) != 1:
        return False
    if node.op_type in ("Relu", "LeakyRelu", "Sigmoid", "Tanh", *SAME, "AveragePool"):
        return True
    if node.op_type == "Clip":
        return all(v is None or constant(v) is not None for v in node.inputs[1:])
    if node.op_type == "ReduceMean" and len(node.inputs) == 2:
        axes = constant(node.inputs[1])
        return axes is not None and axes.size > 0 and bool((axes >= 2).all())
    return False


def pass_through(
    node: ir.Node, values: Values, inputs: dict[str, StoredActivation]
) -> Values | None:
    """Return what a node of :func:`keeps_channels` makes of channels of one number.

    Args:
        node: The node.
        values: The number of every channel, float32 [channels].
        inputs: Layer → quantizer of its input.

    Returns:
        The numbers afterwards; None where they are not the same everywhere, at the
        edges of a padded mean.
    """
    kind = node.op_type
    if kind == INPUT:
        return _quantize(values, inputs[node.attributes["layer"].as_string()])
    if kind == "AveragePool":
        return None if any(attribute(node, "pads", (0,))) else values
    if kind == "Relu":
        positive: Values = np.maximum(values, np.float32(0))
        return positive
    if kind == "LeakyRelu":
        slope = np.float32(attribute(node, "alpha", 0.01))
        return np.where(values < 0, values * slope, values)
    if kind == "Tanh":
        return np.tanh(values)
    if kind == "Sigmoid":
        half = np.tanh(values / 2) / 2 + 0.5
        return half.astype(np.float32)
    if kind == "Clip":
        return _clip(node, values)
    return values  # SAME, and ReduceMean over places


def _clip(node: ir.Node, values: Values) -> Values:
    bounds: list[Any] = [constant(value) for value in node.inputs[1:3]]
    low, high = [*bounds, None, None][:2]
    values = values if low is None else np.maximum(values, low)
    return values if high is None else np.minimum(values, high)


def _quantize(values: Values, stored: StoredActivation) -> Values:
    step = stored.scale.detach().cpu().numpy().astype(np.float32)
    codes = np.clip(np.round(values / step), *stored.bounds)
    return (codes * step).astype(np.float32)
