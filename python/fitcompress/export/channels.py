"""Channels that do nothing, taken out of the two layers that they connect.

Between a layer and those that alone use its output, through operators that treat
channels one by one, a channel goes if each user either

- multiplies it with zeros only, or
- finds the same number v in it everywhere, because its weights are zeros and it is its
  bias. With v = 0 nothing is lost; other v are added to the user's bias, v · Σ_k w,
  unless the user pads its input, where the sum differs at the edges.

Channels that reach a sum, a concatenation, an output or a grouped convolution stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fitcompress.export.channel_values import keeps_channels, pass_through
from fitcompress.export.graph import (
    attribute,
    constant,
    initializer,
    replace_input,
    set_dimension,
)
from fitcompress.export.layouts import single_uses

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from fitcompress.export.graph_weights import GraphWeight
    from fitcompress.export.layouts import Use
    from fitcompress.storage.activations import StoredActivation

    Paths = list[tuple["Use", NDArray[np.float32] | None]]

__all__ = ["remove_channels"]


def remove_channels(
    model: ir.Model,
    weights: dict[str, GraphWeight],
    inputs: dict[str, StoredActivation],
    multiple: int,
) -> dict[str, int]:
    """Remove channels that do nothing, in place, until there are none.

    Args:
        model: With placeholders.
        weights: Layer → weight.
        inputs: Layer → quantizer of its input.
        multiple: Layers whose channels are a multiple of this keep one.

    Returns:
        Layer → how many of its output channels are gone.
    """
    removed: dict[str, int] = {}
    changed = True
    while changed:
        changed = False
        users = {use.node: use for use in single_uses(model, weights)}
        for use in users.values():
            gone = _shrink(model, use, users, inputs, multiple)
            if gone:
                name = use.weight.name
                removed[name] = removed.get(name, 0) + gone
                changed = True
    return removed


def _shrink(
    model: ir.Model,
    use: Use,
    users: dict[ir.Node, Use],
    inputs: dict[str, StoredActivation],
    multiple: int,
) -> int:
    """Remove channels that a layer makes for nothing; return how many."""
    rows = use.weight.rows
    bias = np.zeros(rows, np.float32) if use.bias is None else constant(use.bias)
    known = use.groups == 1 and use.weight.dtype == "f4" and bias is not None
    if not known or bias is None or bias.shape != (rows,):
        return 0
    found = _follow(use.output, bias, users, inputs)
    if found is None or not found[0]:
        return 0
    paths, between = found
    empty = ~use.weight.by_rows.reshape(rows, -1).any(1)
    gone = np.ones(rows, bool)
    for user, values in paths:
        unused = ~_by_inputs(user).any(1)
        gone &= unused | (empty & _removable(user, values))
    _keep_multiple(gone, multiple)
    if not gone.any():
        return 0
    for user, values in paths:
        if values is not None:
            _add_to_bias(model, user, np.where(gone & empty, values, 0))
    kept = np.flatnonzero(~gone)
    use.weight.keep(use.outputs, kept)
    set_dimension(use.source.outputs[0], use.outputs, len(kept))
    if use.bias is not None:
        name = f"{use.weight.name}.kept_bias"
        replace_input(use.node, 2, initializer(model, name, bias[kept]))
    for user, _ in paths:
        user.weight.keep(user.inputs, kept)
        set_dimension(user.source.outputs[0], user.inputs, len(kept))
    for value in between:
        set_dimension(value, 1, len(kept))
    return int(gone.sum())


def _keep_multiple(gone: NDArray[np.bool_], multiple: int) -> None:
    """Let channels stay after all, the last ones, for a good number; in place."""
    if gone.all():
        gone[0] = False  # an operator without channels is none
    if len(gone) % multiple == 0:
        excess = int((~gone).sum()) % multiple
        spare = (multiple - excess) % multiple
        gone[np.flatnonzero(gone)[::-1][:spare]] = False


def _follow(
    value: ir.Value,
    values: NDArray[np.float32] | None,
    users: dict[ir.Node, Use],
    inputs: dict[str, StoredActivation],
) -> tuple[Paths, list[ir.Value]] | None:
    """Return the layers that use a value, and what lies between; None if others do."""
    if value.is_graph_output():
        return None
    paths: Paths = []
    between = [value]
    for each in value.uses():
        node, index = each.node, each.idx
        user = users.get(node)
        if user is not None and index == 0 and user.groups == 1:
            if user.weight.dtype != "f4":
                return None
            paths.append((user, values))
            continue
        if index != 0 or user is not None or not keeps_channels(node, inputs):
            return None
        after = None if values is None else pass_through(node, values, inputs)
        found = _follow(node.outputs[0], after, users, inputs)
        if found is None:
            return None
        paths, between = paths + found[0], between + found[1]
    return paths, between


def _by_inputs(user: Use) -> NDArray[np.int32]:
    """Return a layer's codes as [input channels, everything else]."""
    codes = np.moveaxis(user.weight.codes, user.inputs, 0)
    return codes.reshape(len(codes), -1)


def _removable(user: Use, values: NDArray[np.float32] | None) -> NDArray[np.bool_]:
    """Whether a layer can do without channels that are these numbers everywhere."""
    channels = user.weight.codes.shape[user.inputs]
    if values is None:
        return np.zeros(channels, bool)
    if _sees_edges(user) or (user.bias is not None and constant(user.bias) is None):
        zero: NDArray[np.bool_] = values == 0
        return zero
    return np.isfinite(values)


def _sees_edges(user: Use) -> bool:
    """Whether outputs near the edge of the input add fewer products than others."""
    if user.node.op_type == "Gemm":
        return False
    if user.node.op_type == "ConvTranspose":
        return True
    automatic = attribute(user.node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return automatic or any(attribute(user.node, "pads", (0,)))


def _add_to_bias(model: ir.Model, user: Use, values: NDArray[np.float32]) -> None:
    """Add what channels of one number contribute to a layer's bias."""
    if not values.any():
        return
    weight = np.moveaxis(user.weight.values(), user.outputs, 0)
    axis = user.inputs + 1 if user.inputs < user.outputs else user.inputs
    per_input = np.moveaxis(weight, axis, 1)
    sums = per_input.reshape(*per_input.shape[:2], -1).sum(2, dtype=np.float64)
    bias = constant(user.bias)
    more = sums @ values.astype(np.float64)
    total = more if bias is None else more + bias
    name = f"{user.weight.name}.bias_of_constants"
    value = initializer(model, name, total.astype(np.float32))
    replace_input(user.node, 2, value)
