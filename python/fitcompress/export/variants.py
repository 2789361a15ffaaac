"""One trace of a compressed model, many files: with other inputs quantized in each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fitcompress.errors import OptionError
from fitcompress.export.onnx_file import ExportOptions, converted_graph
from fitcompress.export.packages import check_packages
from fitcompress.storage.activations import stored_activations
from fitcompress.storage.save_load import coded_weights

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

__all__ = ["Variants"]


class Variants:
    """Writes what :func:`fitcompress.export_onnx` would, for a subset of quantizers.

    Tracing takes most of the time of an export, and is done once here.

    Args:
        model: A compressed model, its input quantizers calibrated; stays as it is.
        example_input: As for ``export_onnx``.
        options: As for ``export_onnx``.

    Attributes:
        layers: Names of the layers whose inputs have quantizers.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
        FitcompressError: As ``export_onnx`` raises them.
    """

    def __init__(
        self, model: nn.Module, example_input: Any, options: ExportOptions
    ) -> None:
        check_packages()
        from fitcompress.export.placeholders import trace
        from fitcompress.export.write_inputs import check_inputs

        self._model, self._options = model, options
        self._inputs = {stored.name: stored for stored in stored_activations(model)}
        check_inputs(self._inputs.values(), options.opset)
        self._graph = trace(
            model,
            example_input,
            [weight.name for weight in coded_weights(model)],
            self._inputs,
            opset=options.opset,
            dynamic_shapes=options.dynamic_shapes,
        )
        self.layers = tuple(self._inputs)

    def onnx_bytes(self, layers: Collection[str]) -> bytes:
        """Return the file in which the inputs of these layers are quantized.

        Raises:
            OptionError: A layer has no quantizer.
        """
        for name in layers:
            if name not in self._inputs:
                raise OptionError(
                    f"the input of layer {name!r} has no quantizer",
                    got=", ".join(list(self._inputs)[:6]) or "none",
                    wanted="names of these",
                )
        import onnx_ir as ir

        from fitcompress.export.graph import placeholders
        from fitcompress.export.placeholders import INPUT

        graph = ir.from_proto(ir.to_proto(self._graph))
        for name, node in placeholders(graph, INPUT):
            if name in layers:
                continue
            plain = node.inputs[0]
            assert plain is not None
            assert node.graph is not None
            node.outputs[0].replace_all_uses_with(plain, replace_graph_outputs=True)
            node.graph.remove(node, safe=True)
        kept = {name: self._inputs[name] for name in layers}
        data, _ = converted_graph(graph, self._model, kept, self._options)
        return data
