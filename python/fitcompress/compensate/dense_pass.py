"""What the layers of the dense network answer, batch by batch, live or remembered.

Compensation compares with the dense network again for every plan and every size that it
tries. Where many plans are applied to the same inputs its answers are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from fitcompress.compensate.lockstep import Lockstep, not_reached
from fitcompress.compensate.statistics import layer_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from torch import nn

    from fitcompress.compensate.residuals import Residual
    from fitcompress.model import Layer

__all__ = ["Answer", "Answers", "DensePass", "remembered"]


class Answer(NamedTuple):
    """What a layer answers to a batch.

    Attributes:
        y: `layer_outputs`, plus what is added to them.
        summed: Whether something is.
    """

    y: torch.Tensor
    summed: bool


class Answers(Protocol):
    """What one layer answers, to every batch."""

    def __getitem__(self, number: int, /) -> Answer:
        """Return that to a batch."""
        ...


class _Live:
    def __init__(
        self,
        layer: Layer,
        inputs: list[torch.Tensor],
        added: Callable[[int], torch.Tensor] | None,
    ) -> None:
        self._layer, self._inputs, self._added = layer, inputs, added

    def __getitem__(self, number: int, /) -> Answer:
        y = layer_outputs(self._layer, self._inputs[number])
        share = None if self._added is None else self._added(number)
        if share is None or share.shape != y.shape:  # it may be broadcast in a batch
            return Answer(y, False)
        return Answer(y.add_(share), True)


class DensePass:
    """The layers of a dense network in the order in which they run.

    Use as a context manager.

    Args:
        model: The network, in eval mode.
        layers: Name → layer.
        batches: Inputs.
        residuals: What is added to the outputs of layers, and so to their answers.
        kept: What `remembered` returned for the same, or None: the network runs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, Layer],
        batches: list[Any],
        residuals: dict[str, Residual],
        kept: dict[str, list[Answer]] | None = None,
    ) -> None:
        self._layers, self._residuals = layers, residuals
        modules = {name: layer.module for name, layer in layers.items()}
        self._pass = (
            None
            if kept is not None
            else Lockstep(model, modules, batches, self._residuals)
        )
        self._kept: Iterator[tuple[str, list[Answer]]] = iter((kept or {}).items())

    def __enter__(self) -> DensePass:
        if self._pass is not None:
            self._pass.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pass is not None:
            self._pass.__exit__(kind, error, trace)

    def advance(self) -> tuple[str, Answers] | None:
        """Go on to the next layer; return its name and answers, or None at the end.

        Raises:
            CalibrationError: Different batches reach different layers.
        """
        if self._pass is None:
            return next(self._kept, None)
        reached = self._pass.advance()
        if reached is None:
            return None
        name, layer = reached.name, self._layers[reached.name]
        if reached.added is None:
            return name, _Live(layer, reached.inputs, None)
        share, added = self._residuals[name].share, reached.added
        return name, _Live(
            layer, reached.inputs, lambda number: share(layer, added[number])
        )


@torch.no_grad()
def remembered(
    model: nn.Module,
    layers: dict[str, Layer],
    batches: list[Any],
    limit: int,
    residuals: dict[str, Residual],
) -> dict[str, list[Answer]] | None:
    """Return the answers of all layers, name → batch, or None if they take too much.

    Args:
        model: As for `DensePass`.
        layers: As for `DensePass`.
        batches: As for `DensePass`.
        limit: Bytes that they may take.
        residuals: As for `DensePass`.

    Raises:
        CalibrationError: A layer is never reached, or batches reach different ones.
    """
    kept: dict[str, list[Answer]] = {}
    with DensePass(model, layers, batches, residuals) as passes:
        for _ in layers:
            reached = passes.advance()
            if reached is None:
                raise not_reached(layers, kept)
            name, answers = reached
            kept[name] = []
            if layers[name].rounded_alone:  # nobody asks for them
                continue
            for number in range(len(batches)):
                answer = answers[number]
                limit -= answer.y.numel() * answer.y.element_size()
                if limit < 0:
                    return None
                kept[name].append(answer)
    return kept
