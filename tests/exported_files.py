"""Exported files in ONNX Runtime, and models that observe their inputs."""

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.model import compressible_layers
from fitcompress.quantize import (
    ActivationQuantizer,
    MinMaxObserver,
    activations,
    attach_activation,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")


def run(path, *inputs: torch.Tensor, exact: bool = True) -> torch.Tensor:
    """The first output. ``exact``: no rewriting, so that only float32 rounds."""
    onnx.checker.check_model(path, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if exact:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    made = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    named = zip(made.get_inputs(), inputs, strict=True)
    found = made.run(None, {each.name: x.numpy() for each, x in named})
    return torch.from_numpy(found[0])


def rounded(model: nn.Module, grid: fc.Grid) -> nn.Module:
    """The model with every weight rounded to the same kind of grid."""
    layers = compressible_layers(model)
    plan = fc.Plan({x.name: fc.Level(grid, 0.0, x.shape) for x in layers})
    return fc.apply(model, plan, progress=False)


def observe(model: nn.Module, x: torch.Tensor, bits: int, **options) -> nn.Module:
    """Quantize the input of every layer but embeddings, calibrated on ``x``."""
    for layer in compressible_layers(model):
        if not layer.one_hot:
            made = ActivationQuantizer(bits, MinMaxObserver(), **options)
            attach_activation(layer.module, made)
    with torch.no_grad():
        model(x)
    for _, quantizer in activations(model):
        quantizer.freeze()
    return model


def equal(small: nn.Module, path, *inputs: torch.Tensor, **options) -> bool:
    with torch.no_grad():
        expected = small(*inputs)
    found = run(path, *inputs, **options)
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 2e-5, f"relative error {error}"
    return True


def types(path) -> dict[str, int]:
    """Initializer → type, of codes."""
    graph = onnx.load(path).graph
    return {i.name: i.data_type for i in graph.initializer if "_codes" in i.name}


GRIDS = {
    "2": fc.Grid(bits=2),
    "4": fc.Grid(bits=4),
    "8": fc.Grid(bits=8),
    "step": fc.Grid(step=0.02),
    "fine": fc.Grid(step=1e-4),
}


def nodes(folder):
    return onnx.load(folder / "f.onnx").graph.node
