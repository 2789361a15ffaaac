"""How the nodes of a graph use weights: which axis counts outputs, which inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fitcompress.export.graph import attribute, only_use, placeholders
from fitcompress.export.placeholders import WEIGHT

if TYPE_CHECKING:
    import onnx_ir as ir

    from fitcompress.export.graph_weights import GraphWeight

__all__ = ["Use", "absorb_transposes", "single_uses"]


@dataclass
class Use:
    """A weight that exactly one node uses, as a layer with a bias.

    Attributes:
        weight: The weight.
        source: Its placeholder.
        node: Conv, ConvTranspose or Gemm.
        outputs: The axis of the codes that counts output channels.
        inputs: The axis that counts input channels (of the group).
        groups: Groups of a convolution.
    """

    weight: GraphWeight
    source: ir.Node
    node: ir.Node
    outputs: int
    inputs: int
    groups: int

    @property
    def output(self) -> ir.Value:
        """What the layer computes; its channels are axis 1."""
        return self.node.outputs[0]

    @property
    def bias(self) -> ir.Value | None:
        """The layer's bias, or None."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None


def single_uses(model: ir.Model, weights: dict[str, GraphWeight]) -> list[Use]:
    """Return the weights that one node uses in a known way and no other touches."""
    found = placeholders(model, WEIGHT)
    names = [layer for layer, _ in found]
    uses = []
    for layer, source in found:
        use = only_use(source.outputs[0])
        if use is None or names.count(layer) > 1 or use[1] != 1:
            continue
        made = _use(weights[layer], source, use[0])
        if made is not None and weights[layer].row_axis == made.outputs:
            uses.append(made)
    return uses


def absorb_transposes(model: ir.Model, weights: dict[str, GraphWeight]) -> None:
    """Store matrices as they are used, where every use of one is transposed."""
    found = placeholders(model, WEIGHT)
    names = [layer for layer, _ in found]
    for layer, source in found:
        value = source.outputs[0]
        users = [use.node for use in value.uses()]
        swapped = all(
            node.op_type == "Transpose"
            and node.domain == ""
            and attribute(node, "perm", ()) in ((1, 0), [1, 0])
            and not node.outputs[0].is_graph_output()
            for node in users
        )
        if not users or not swapped or names.count(layer) > 1:
            continue
        if value.is_graph_output() or weights[layer].codes.ndim != 2:
            continue
        weights[layer].transpose()
        value.shape = users[0].outputs[0].shape
        for node in users:
            node.outputs[0].replace_all_uses_with(value)
            assert node.graph is not None
            node.graph.remove(node, safe=True)


def _use(weight: GraphWeight, source: ir.Node, node: ir.Node) -> Use | None:
    """Return how a node uses a weight as its second input, if that is known."""
    if node.domain != "":
        return None
    groups = attribute(node, "group", 1)
    if node.op_type == "Conv":
        return Use(weight, source, node, 0, 1, groups)
    if node.op_type == "ConvTranspose" and groups == 1:
        return Use(weight, source, node, 1, 0, groups)
    if node.op_type == "Gemm":
        whole = all(attribute(node, key, 1.0) == 1.0 for key in ("alpha", "beta"))
        if whole and not attribute(node, "transA", 0):
            outputs = 0 if attribute(node, "transB", 0) else 1
            return Use(weight, source, node, outputs, 1 - outputs, 1)
    return None
