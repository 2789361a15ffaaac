"""Tracing a copy of a compressed model whose grids are named nodes.

Each weight on a grid becomes a node ``fitcompress::Weight``, each quantizer of an input
a node ``fitcompress::Input``. The exporter knows nothing about them, so that it
neither computes their values nor merges them into others; later steps put integers in
their place.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fitcompress.errors import DataError, ExportError
from fitcompress.model.forward import call_model
from fitcompress.quantize import remove

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import onnx_ir as ir

__all__ = ["DOMAIN", "INPUT", "WEIGHT", "trace"]

DOMAIN, WEIGHT, INPUT = "fitcompress", "Weight", "Input"
NOISY = "torch.onnx._internal.exporter._registration"  # names optional packages


class _WeightNode(nn.Module):
    """Stands for a weight, as its parametrization."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a tensor that the graph shows as a node without inputs."""
        made: torch.Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{WEIGHT}",
            (),
            {"layer": self.layer},
            dtype=weight.dtype,
            shape=weight.shape,
            version=1,
        )
        return made


def trace(
    model: nn.Module,
    example: Any,
    weights: Collection[str],
    inputs: Collection[str],
    *,
    opset: int,
    dynamic_shapes: Any,
) -> ir.Model:
    """Return the ONNX graph of ``model`` in eval mode, with placeholders.

    Args:
        model: A compressed model; stays as it is.
        example: A tensor, a tuple of arguments or a dict of named ones.
        weights: Layers whose weights become placeholders.
        inputs: Layers whose input quantizers do.
        opset: Version of the operator set.
        dynamic_shapes: As ``torch.onnx.export`` takes them; None makes the first
            dimension of every tensor one dynamic batch.

    Raises:
        DataError: The model does not run on the example.
        ExportError: It cannot be traced, or not with a free batch size.
    """
    plain = copy.deepcopy(model).cpu().eval()
    for module in plain.modules():
        module.training = False
    example = _batched(example)
    try:
        with torch.no_grad():
            call_model(plain, example)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise DataError(
            "the model does not run on the example input",
            got=" ".join(str(error).split())[:200] or type(error).__name__,
            fix="give an input as the model takes it, with its batch dimension",
        ) from error
    remove(plain, activations=True)
    for name in weights:
        node = _WeightNode(name)
        module = plain.get_submodule(name)
        parametrize.register_parametrization(module, "weight", node, unsafe=True)
    for name in inputs:
        _mark_input(plain.get_submodule(name), name)
    named = isinstance(example, dict)
    arguments = () if named else _tuple(example)
    if dynamic_shapes is None:
        dynamic_shapes = _batch_dimensions(example)
    try:
        with _quiet():
            program = torch.onnx.export(
                plain,
                arguments,
                kwargs=example if named else None,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        raise ExportError(
            "the model cannot be traced",
            got=_reason(error),
            wanted="a forward that depends on values only through tensors, and runs "
            "with any batch size",
            fix="rewrite it as torch.export asks, say in dynamic_shapes what is free, "
            "or export a part of the model",
        ) from error
    assert program is not None
    return program.model


def _mark_input(module: nn.Module, layer: str) -> None:
    """Let the input of a module pass through a placeholder."""

    def mark(x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{INPUT}",
            (x,),
            {"layer": layer},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        return made

    def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if args:
            return (mark(args[0]), *args[1:]), named
        return args, {**named, "input": mark(named["input"])}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _tuple(example: Any) -> tuple[Any, ...]:
    return tuple(example) if isinstance(example, (tuple, list)) else (example,)


def _batch_size(example: Any) -> int:
    values = example.values() if isinstance(example, dict) else _tuple(example)
    sizes = [x.shape[0] for x in values if torch.is_tensor(x) and x.dim()]
    if not sizes or sizes[0] < 1:
        raise DataError(
            "the example input holds no batch",
            got=type(example).__name__,
            wanted="a tensor, a tuple of arguments or a dict of named ones, "
            "with at least one sample",
        )
    return int(sizes[0])


def _each(example: Any, change: Any) -> Any:
    """Return the example with ``change`` made to each argument."""
    if isinstance(example, dict):
        return {key: change(value) for key, value in example.items()}
    changed = tuple(change(value) for value in _tuple(example))
    return changed if isinstance(example, (tuple, list)) else changed[0]


def _batched(example: Any) -> Any:
    """Return an example of two samples at least: a single one would be traced as 1."""
    size = _batch_size(example)

    def double(x: Any) -> Any:
        alone = torch.is_tensor(x) and x.dim() and x.shape[0] == 1
        return torch.cat([x, x]) if alone else x

    on_cpu = _each(example, lambda x: x.detach().cpu() if torch.is_tensor(x) else x)
    return on_cpu if size > 1 else _each(on_cpu, double)


def _batch_dimensions(example: Any) -> Any:
    size = _batch_size(example)

    def dimensions(x: Any) -> Any:
        batched = torch.is_tensor(x) and x.dim() and x.shape[0] == size
        return {0: "batch"} if batched else None

    shapes = _each(example, dimensions)
    return shapes if isinstance(example, dict) else _tuple_of(shapes)


def _tuple_of(shapes: Any) -> tuple[Any, ...]:
    return shapes if isinstance(shapes, tuple) else (shapes,)


def _reason(error: BaseException) -> str:
    """Return what lies behind an error of the exporter, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(str(error).split()))
    return text[:300] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks about itself from the user."""
    logger = logging.getLogger(NOISY)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
