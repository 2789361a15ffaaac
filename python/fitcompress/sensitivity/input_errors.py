"""What it costs to quantize the inputs of layers, from the activation trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fitcompress.data.batches import batch_size, part
from fitcompress.errors import UnsupportedLayerError
from fitcompress.model.forward import call_model
from fitcompress.model.modes import evaluating
from fitcompress.model.patches import layer_input
from fitcompress.model.value_histogram import ValueHistogram
from fitcompress.model.value_ranges import least_error
from fitcompress.progress import Bar
from fitcompress.sensitivity.fisher import FisherEstimator
from fitcompress.threads import FIXED, threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from fitcompress.model import Layer
    from fitcompress.sensitivity.moments import FisherMoments

__all__ = ["check_inputs", "input_distortion", "input_histograms"]


def check_inputs(
    model: nn.Module,
    layers: Sequence[Layer],
    x: Any,
    y: Any,
    loss_fn: Callable[[Any, Any], torch.Tensor],
) -> None:
    """Raise unless the inputs of layers can be quantized, as two samples show.

    Layers that these do not reach are passed over.

    Args:
        model: The network.
        layers: The layers to look at.
        x: Inputs of a batch.
        y: Its targets.
        loss_fn: As for ``FisherEstimator.update``.

    Raises:
        UnsupportedLayerError: A layer is used as a function of its weight, which no
            quantizer sees, or its input has no trace.
    """
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    estimator = FisherEstimator(model, layers, diagonal=False, activations=True)
    handles = [x.module.register_forward_pre_hook(note(x.name)) for x in layers]
    two = slice(0, min(2, batch_size(x)))
    try:
        with evaluating(model), threads(FIXED):
            estimator.update(part(x, two), part(y, two), loss_fn)
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        if layer.one_hot or layer.name not in estimator.moments.trace:
            continue
        if layer.name not in estimator.moments.activations:
            raise no_trace(layer.name)
        if layer.name not in called:
            raise not_called(layer.name)


def no_trace(name: str) -> UnsupportedLayerError:
    """Return the error for an input whose gradient says nothing."""
    return UnsupportedLayerError(
        f"the gradient of the input of layer {name!r} was not measured",
        got="an input that all samples share, or without gradient",
        fix="measure without activation_bits",
    )


def not_called(name: str) -> UnsupportedLayerError:
    """Return the error for a layer whose module is passed by."""
    return UnsupportedLayerError(
        f"the input of layer {name!r} cannot be quantized",
        got="a weight that the model uses without a call of its module",
        wanted="calls of the module, which a quantizer can attach to",
        fix="call the module in forward, or measure without activation_bits",
    )


def input_histograms(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[tuple[Any, Any]],
    *,
    samples: int | None,
    progress: bool,
) -> dict[str, ValueHistogram]:
    """Return the values that the input of every layer takes; embeddings have none.

    Raises:
        NonFiniteError: An input is NaN or infinite.
    """
    histograms = {each.name: ValueHistogram() for each in layers if not each.one_hot}

    def watch(layer: Layer) -> torch.utils.hooks.RemovableHandle:
        def count(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            histograms[layer.name].add(layer_input(args, named))

        return layer.module.register_forward_pre_hook(count, with_kwargs=True)

    handles = [watch(layer) for layer in layers if layer.name in histograms]
    try:
        with (
            evaluating(model),
            torch.no_grad(),
            threads(FIXED),
            Bar("measure: inputs of layers", samples, enabled=progress) as bar,
        ):
            for x, _ in batches:
                call_model(model, x)
                bar.advance(batch_size(x))
    finally:
        for handle in handles:
            handle.remove()
    return histograms


def input_distortion(
    layers: Sequence[Layer],
    moments: FisherMoments,
    histograms: dict[str, ValueHistogram],
    bits: Sequence[int],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return D_a = ½ T_a · mean (x − x̂)² in nats, and T_a in nats².

    Δ and the bounds of x̂ = Δ·clip(round(x/Δ), lo, hi) are those with the least mean
    square, as the observers of :mod:`fitcompress.quantize` choose them.

    Args:
        layers: L layers.
        moments: With activations.
        histograms: What :func:`input_histograms` returned.
        bits: Of the quantized inputs.

    Returns:
        [L, 1 + len(bits)], 0 in the first column, which stands for float; and [L].
        Embeddings, whose inputs are indices, have 0 throughout.

    Raises:
        UnsupportedLayerError: The trace of an input was not measured, or the module of
            a layer was not called.
    """
    distortion = np.zeros((len(layers), 1 + len(bits)))
    trace = np.zeros(len(layers))
    for row, layer in enumerate(layers):
        if layer.name not in histograms:
            continue
        if layer.name not in moments.activations:
            raise no_trace(layer.name)
        if histograms[layer.name].counts is None:
            raise not_called(layer.name)
        trace[row] = moments.mean_activation(layer.name)
        histogram = histograms[layer.name]
        count = int(histogram.total.sum())
        for column, wanted in enumerate(bits, 1):
            _, error = least_error(histogram, wanted)
            mean = float(error.sum()) / max(count, 1)
            distortion[row, column] = 0.5 * trace[row] * mean
    return distortion, trace
