"""``export_onnx``: a compressed model as an ONNX file with integer weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fitcompress.errors import ExportError
from fitcompress.export.agreement import agreement_with
from fitcompress.export.checks import check_compressed, check_sums
from fitcompress.export.integers import check_options
from fitcompress.export.packages import check_packages
from fitcompress.export.report import ExportedLayer, ExportReport
from fitcompress.export.sessions import calibration_inputs
from fitcompress.files import check_writable, write_atomically
from fitcompress.model import check_finite
from fitcompress.quantize import channel_of
from fitcompress.storage.activations import stored_activations
from fitcompress.storage.save_load import coded_weights, load

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    import onnx_ir as ir
    from torch import nn

    from fitcompress.export.graph_weights import GraphWeight
    from fitcompress.storage.activations import StoredActivation

__all__ = ["ExportOptions", "converted_graph", "export_onnx", "serialized"]

LARGEST = 2**31 - 1  # bytes of a protocol buffer


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Any,
    *,
    packed: str | os.PathLike[str] | None = None,
    opset: int = 21,
    min_bits: int = 2,
    channel_multiple: int = 16,
    fold_weights: bool = False,
    integer_sums: Iterable[Any] | None = None,
    dynamic_shapes: Any = None,
) -> ExportReport:
    """Write a compressed model to an ONNX file, its weights as integers.

    A weight on a grid, Δ·k as a matrix [rows, columns], becomes DequantizeLinear(k, Δ):
    k in the narrowest of INT2 (from opset 25 on), INT4, INT8 and INT16 that holds all
    of them, Δ float32 [1] or [rows] along the axis of output channels. Codes that no
    integer holds stay in float. Quantizers of inputs become QuantizeLinear →
    DequantizeLinear with Δ and the zero point −lo.

    Batch norms are folded into Δ, and channels that do nothing are removed (see
    ``export.norms`` and ``export.channels``). Outputs equal those of ``model`` in eval
    mode up to the rounding of float32; where inputs are quantized, up to single steps
    that such a rounding may tip over. Only ``integer_sums`` makes another function.

    Args:
        model: What ``apply``, ``compress`` or ``load(trainable=True)`` returned; stays
            as it is. With ``packed``, any model of the architecture.
        path: The file to write, usually ``*.onnx``.
        example_input: As the model takes it: a tensor, a tuple of arguments or a dict
            of named ones. Its values do not matter, its shapes and types do.
        packed: A packed file to take weights from, instead of those of ``model``.
        opset: Version of the operator set, 18 … 25. Below 21 there are no 4-bit and
            16-bit integers.
        min_bits: 2, 4, 8 or 16: no narrower integers than these for weights. With 8,
            runtimes can run integer kernels where inputs are quantized.
        channel_multiple: A layer that has a multiple of so many channels keeps one:
            kernels work on blocks of 8 or 16, and odd numbers cost them more than the
            channels do. 1 removes every channel that does nothing.
        fold_weights: Write the weights of layers whose inputs stay in float as floats:
            a larger file, for runtimes that are slow where weights are not constant.
        integer_sums: A loader of inputs, or of (inputs, …), the first 1024 of which are
            used. What convolutions of 8-bit inputs and weights add to shortcuts is
            rounded to 8 bits, as are the shortcuts and the sums, so that runtimes
            compute all of it in integers (see ``export.sums``). Ranges are measured on
            these inputs, and the report says how far outputs are from ``model``'s.
            None leaves sums in float.
        dynamic_shapes: As ``torch.onnx.export`` takes them; None leaves the first
            dimension of every tensor free, as the batch.

    Returns:
        What became of every layer, and bytes before ⇒ after.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed; with
            ``integer_sums``, onnxruntime.
        PlanMismatchError: The model is not compressed, or the file belongs to another.
        FormatError: The packed file is damaged.
        OptionError: An option cannot work, or a quantizer has steps along another
            dimension than the channels'.
        CalibrationError: A quantizer is not calibrated, or ranges of sums cannot be
            measured.
        NonFiniteError: A weight or a step is NaN or infinite.
        EmptyLoaderError: ``integer_sums`` yields nothing.
        DataError: The model does not run on the example, or ``integer_sums`` has other
            inputs than it.
        ExportError: It cannot be traced, a quantizer is dynamic, or the file would
            exceed 2 GiB.
        OutputError: The file cannot be written.

    Example::

        report = fc.export_onnx(small, "small.onnx", torch.zeros(1, 3, 32, 32))
        print(report)
    """
    path = check_writable(path)
    check_packages()
    check_options(opset, min_bits, channel_multiple)
    if packed is not None:
        model = load(packed, copy.deepcopy(model), trainable=True)
    check_compressed(model)
    check_finite(model)
    sums = None if integer_sums is None else calibration_inputs(integer_sums)
    options = ExportOptions(
        opset, min_bits, channel_multiple, fold_weights, dynamic_shapes, sums
    )
    data, report = _converted(model, example_input, options)
    if sums is not None:
        check_sums(report["integer_sums"], report["layers"])
        report["agreement"] = agreement_with(model, data, sums)
    write_atomically(path, data)
    return ExportReport(path, **report)


@dataclass(frozen=True)
class ExportOptions:
    """Options of :func:`export_onnx`, checked; ``integer_sums`` are the inputs."""

    opset: int = 21
    min_bits: int = 2
    channel_multiple: int = 16
    fold_weights: bool = False
    dynamic_shapes: Any = None
    integer_sums: list[Any] | None = None


def _converted(
    model: nn.Module, example: Any, options: ExportOptions
) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of the file and what the report says of it."""
    from fitcompress.export.placeholders import trace
    from fitcompress.export.write_inputs import check_inputs

    weights = [w.name for w in coded_weights(model)]
    inputs = {stored.name: stored for stored in stored_activations(model)}
    check_inputs(inputs.values(), options.opset)
    graph = trace(
        model,
        example,
        weights,
        inputs,
        opset=options.opset,
        dynamic_shapes=options.dynamic_shapes,
    )
    return converted_graph(graph, model, inputs, options)


def converted_graph(
    graph: ir.Model,
    model: nn.Module,
    inputs: dict[str, StoredActivation],
    options: ExportOptions,
) -> tuple[bytes, dict[str, Any]]:
    """Put numbers in the place of all placeholders, in place.

    Args:
        graph: The trace of ``model``, with placeholders.
        model: The compressed model.
        inputs: Layer → quantizer, of the placeholders of inputs in the graph.
        options: Of the export.

    Returns:
        The bytes of the file and what the report says of it.
    """
    from fitcompress.export.channels import remove_channels
    from fitcompress.export.graph_weights import GraphWeight
    from fitcompress.export.layouts import absorb_transposes
    from fitcompress.export.linears import split_linears
    from fitcompress.export.norms import fold_norms
    from fitcompress.export.write_inputs import write_inputs
    from fitcompress.export.write_weights import write_weights

    weights = {w.name: GraphWeight.of(w) for w in coded_weights(model)}
    before = len(serialized(graph)) + _float_bytes(weights)
    absorb_transposes(graph, weights)
    folded = fold_norms(graph, weights)
    removed = remove_channels(graph, weights, inputs, options.channel_multiple)
    split_linears(graph, weights)
    channels = {name: channel_of(model.get_submodule(name)) for name in inputs}
    input_kinds = write_inputs(graph, inputs, channels)
    kinds = write_weights(
        graph,
        weights,
        opset=options.opset,
        min_bits=options.min_bits,
        floats=weights.keys() - inputs.keys() if options.fold_weights else (),
    )
    sums = 0 if options.integer_sums is None else _sum(graph, options.integer_sums)
    data = serialized(graph)
    layers = tuple(
        _layer(weight, kinds.get(name), input_kinds.get(name))
        for name, weight in weights.items()
    )
    return data, {
        "opset": options.opset,
        "bytes_before": before,
        "bytes_after": len(data),
        "layers": layers,
        "folded_norms": folded,
        "removed_channels": removed,
        "integer_sums": sums,
    }


def _sum(graph: ir.Model, batches: list[Any]) -> int:
    """Bring sums to integers, in place; return how many."""
    from fitcompress.export.sum_ranges import measured_ranges
    from fitcompress.export.sums import find_sums, without_grid, write_sums

    sums = find_sums(graph)
    write_sums(graph, sums, measured_ranges(graph, without_grid(sums), batches))
    return len(sums)


def serialized(model: ir.Model) -> bytes:
    """Return the bytes of a model, without what it does not need to run.

    Raises:
        ExportError: They are more than a file can hold.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    if size > LARGEST:
        raise ExportError(
            "the model is too large for one ONNX file",
            got=f"{size:,} bytes of weights",
            wanted=f"at most {LARGEST:,}",
            fix="compress more of its layers, or export it in parts",
        )
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def _float_bytes(weights: dict[str, GraphWeight]) -> int:
    """Return the bytes of the same weights in their own float type."""
    width = {"f4": 4, "f2": 2, "bf2": 2}
    return sum(width[w.dtype] * w.codes.size for w in weights.values())


def _layer(
    weight: GraphWeight, kind: str | None, input_kind: str | None
) -> ExportedLayer:
    bits = {"INT2": 2, "INT4": 4, "INT8": 8, "INT16": 16, "FLOAT": 32}
    if kind is None:
        return ExportedLayer(weight.name, weight.codes.shape, "unused", 0, None, 0)
    scales = weight.scale.size if kind.startswith("INT") else 0
    size = math.ceil(bits.get(kind, 16) * weight.codes.size / 8) + 4 * scales
    return ExportedLayer(
        weight.name, weight.codes.shape, kind, scales, input_kind, size
    )
