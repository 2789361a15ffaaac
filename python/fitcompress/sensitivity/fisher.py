"""Fisher moments per layer, exact per sample.

For a sample i with inputs A_i ∈ R^{P×I} and output gradients E_i ∈ R^{P×O} of a layer
(P positions), the gradient of its loss with respect to the weight is G_i = E_iᵀ A_i,
and

    F = (1/N) Σ_i G_i ∘ G_i  ∈ R^{O×I},   T = Σ_j F_j   (nats²).

Squares are taken per sample: the square of a batch's mean gradient is another number.

An embedding's A_i are one-hot: row v of G_i is the sum of the output gradients at the
positions of sample i that hold v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fitcompress import ops
from fitcompress.data.batches import part
from fitcompress.errors import (
    CalibrationError,
    DataError,
    NonFiniteError,
    UnsupportedLayerError,
)
from fitcompress.model import patches
from fitcompress.model.patches import layer_input, output_columns

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fitcompress.model import Layer

__all__ = ["FisherEstimator", "Moments", "sampled_label_loss"]

CHUNK = 16  # samples whose squares go through the native op in one call


@dataclass
class Moments:
    """Sums over samples, so that estimates can be saved, merged and resumed.

    Attributes:
        squares: Layer name → Σ_i G_i ∘ G_i, float64 [rows, columns].
        trace: Layer name → [Σ_i ‖G_i‖², Σ_c m_c², number of chunks], with m_c the mean
            of ‖G_i‖² over a chunk of samples, for mean and standard error.
        samples: N.
        loss: Σ_i ℓ_i, nats.
        batches: Batches consumed, for resuming.
    """

    squares: dict[str, torch.Tensor] = field(default_factory=dict)
    trace: dict[str, torch.Tensor] = field(default_factory=dict)
    samples: int = 0
    loss: float = 0.0
    batches: int = 0

    def diagonal(self, name: str) -> torch.Tensor:
        """Return F of one layer, float32 [rows, columns]."""
        return (self.squares[name] / max(self.samples, 1)).float()

    def mean_trace(self, name: str) -> float:
        """Return T of one layer, nats²."""
        return float(self.trace[name][0]) / max(self.samples, 1)

    def relative_error(self, name: str) -> float:
        """Return the standard error of T divided by T, 0 where T is 0."""
        first, second, chunks = self.trace[name].tolist()
        mean = first / max(self.samples, 1)
        if chunks < 2 or mean == 0:
            return 0.0
        variance = max(second / chunks - mean * mean, 0.0) * chunks / (chunks - 1)
        return float((variance / chunks) ** 0.5 / mean)


def sampled_label_loss(
    output: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return the mean cross-entropy with labels drawn from the model itself.

    The gradients of this loss give the true Fisher information of the model, which
    needs no labels and does not vanish on memorised training data as fast as the
    empirical one.

    Args:
        output: Logits, [B, classes], [B, T, classes], or [B, classes, H, W] and more,
            as ``torch.nn.functional.cross_entropy`` takes images.
        generator: Draws the labels.

    Raises:
        DataError: The output is no such tensor.
        NonFiniteError: A logit is NaN or infinite.
    """
    if (
        not torch.is_tensor(output)
        or output.dim() < 2
        or not output.is_floating_point()
    ):
        shape = f" of shape {tuple(output.shape)}" if torch.is_tensor(output) else ""
        raise DataError(
            "labels cannot be sampled from the model's output",
            got=f"{type(output).__name__}{shape}",
            wanted="a tensor of logits [batch, …, classes]",
            fix="pass a loss_fn, or wrap the model so that it returns its logits",
        )
    if not bool(torch.isfinite(output).all()):
        raise NonFiniteError(
            "the model's output is NaN or infinite",
            wanted="finite logits",
            fix="look for NaN in the inputs and for overflow in half precision",
        )
    if output.dim() > 3:
        output = output.movedim(1, -1)
    logits = output.flatten(0, -2)
    probability = logits.detach().softmax(-1).double()
    label = torch.multinomial(probability, 1, generator=generator).squeeze(1)
    return F.cross_entropy(logits.float(), label)


class FisherEstimator:
    """Accumulates Fisher moments of compressible layers through hooks.

    The model is not changed and no weight gets an autograd gradient: inputs and output
    gradients of each layer are caught, and the native op squares and sums their
    products.

    Args:
        model: The network, in eval mode (batch statistics would couple samples).
        layers: Layers to measure.
        moments: Sums to continue, from an interrupted estimate.
    """

    def __init__(
        self, model: nn.Module, layers: list[Layer], moments: Moments | None = None
    ) -> None:
        self.model, self.layers = model, layers
        self.moments = moments or Moments()
        self._copy_inputs = False
        self._alone: bool | None = None
        for layer in layers:
            shape = (layer.rows, layer.columns)
            self.moments.squares.setdefault(
                layer.name, torch.zeros(shape, dtype=torch.float64)
            )
            self.moments.trace.setdefault(
                layer.name, torch.zeros(3, dtype=torch.float64)
            )

    def update(
        self, x: torch.Tensor, y: Any, loss_fn: Callable[[Any, Any], torch.Tensor]
    ) -> float:
        """Add the samples of one batch; ``loss_fn`` must average over the batch.

        Returns:
            The mean loss of the batch, nats.

        Raises:
            NonFiniteError: The loss or a gradient is NaN or infinite.
            CalibrationError: The loss does not depend on a layer.
            UnsupportedLayerError: A layer mixes samples.
        """
        batch = len(x)
        if self._alone is None and batch > 1:
            self._alone = self._shares_indices(x)
        if self._alone:
            singles = [slice(i, i + 1) for i in range(batch)]
            losses = [self._update(x[i], part(y, i), loss_fn) for i in singles]
            loss = sum(losses) / batch
        else:
            loss = self._update(x, y, loss_fn)
        self.moments.samples += batch
        self.moments.loss += loss * batch
        self.moments.batches += 1
        return loss

    def _shares_indices(self, x: torch.Tensor) -> bool:
        """Whether an embedding looks up the same for all samples of a batch at once.

        As for the positions of a sequence: the gradient of what it returns is then a
        sum over samples, which are apart only in batches of one.
        """
        found: list[list[int]] = []
        for count in (1, 2):
            lengths: list[int] = []

            def note(
                _: nn.Module,
                args: tuple[Any, ...],
                named: dict[str, Any],
                lengths: list[int] = lengths,
            ) -> None:
                shape = layer_input(args, named).shape
                lengths.append(shape[0] if shape else 1)

            handles = [
                layer.module.register_forward_pre_hook(note, with_kwargs=True)
                for layer in self.layers
                if layer.one_hot
            ]
            try:
                if handles:
                    with torch.no_grad():
                        self.model(x[:count])
            finally:
                for handle in handles:
                    handle.remove()
            found.append(lengths)
        return found[1] != [2 * length for length in found[0]]

    def _update(
        self, x: torch.Tensor, y: Any, loss_fn: Callable[[Any, Any], torch.Tensor]
    ) -> float:
        """Add the squares of one batch, and return its mean loss."""
        batch = len(x)
        caught, loss, grads = self._gradients(x, y, loss_fn)
        uses: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for (layer, inputs, _), grad in zip(caught, grads, strict=True):
            if grad is not None:
                pair = (inputs, grad.detach() * batch)
                uses.setdefault(layer.name, []).append(pair)
        for layer in self.layers:
            if layer.name not in uses:
                raise CalibrationError(
                    f"the loss does not depend on layer {layer.name!r}",
                    wanted="a forward pass that reaches every compressible layer",
                    fix="pass data that exercise it, or take it out of the model",
                )
            if layer.one_hot:
                self._add_entries(layer, uses[layer.name], batch)
            else:
                self._add(layer, uses[layer.name], batch)
        return loss

    def _gradients(
        self, x: torch.Tensor, y: Any, loss_fn: Callable[[Any, Any], torch.Tensor]
    ) -> tuple[list[tuple[Layer, torch.Tensor, torch.Tensor]], float, tuple[Any, ...]]:
        """Return each use's layer and input, the loss, and the output gradients."""
        caught: list[tuple[Layer, torch.Tensor, torch.Tensor]] = []
        versions: list[int] = []
        copying = self._copy_inputs

        def catch(layer: Layer) -> Callable[..., torch.Tensor]:
            def hook(
                _: nn.Module,
                args: tuple[Any, ...],
                named: dict[str, Any],
                out: torch.Tensor,
            ) -> torch.Tensor:
                if not out.requires_grad:  # every earlier parameter is frozen
                    out = out.detach().requires_grad_()
                x = layer_input(args, named).detach()
                caught.append((layer, x.clone() if self._copy_inputs else x, out))
                versions.append(x._version)
                return out.clone()  # what follows may work in place

            return hook

        handles = [
            layer.module.register_forward_hook(catch(layer), with_kwargs=True)
            for layer in self.layers
        ]
        frozen = [p for p in self.model.parameters() if p.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                loss = loss_fn(self.model(x), y)
            self._check_loss(loss)
            inputs = [x for _, x, _ in caught]
            if not self._copy_inputs and versions != [x._version for x in inputs]:
                # Something after a layer changed its input in place: catch copies.
                self._copy_inputs = True
            outputs = [out for _, _, out in caught]
            grads = torch.autograd.grad(loss, outputs, allow_unused=True)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for handle in handles:
                handle.remove()
        if self._copy_inputs and not copying:
            return self._gradients(x, y, loss_fn)
        return caught, float(loss.detach()), grads

    def _check_loss(self, loss: Any) -> None:
        if not torch.is_tensor(loss) or loss.numel() != 1:
            shape = f"shape {tuple(loss.shape)}" if torch.is_tensor(loss) else ""
            raise CalibrationError(
                "the loss is not a tensor of one number",
                got=shape or type(loss).__name__,
                wanted="the mean loss of the batch",
                fix="use reduction='mean'",
            )
        if not torch.isfinite(loss):
            raise NonFiniteError(
                "the loss is not finite",
                got=float(loss.detach()),
                wanted="a finite mean loss",
                fix="look for NaN in the inputs, the labels and the loss function",
            )
        if not loss.requires_grad:
            raise CalibrationError(
                "the loss has no gradient",
                wanted="a loss that autograd can differentiate",
                fix="do not detach the model's output or use torch.no_grad inside it",
            )

    def _add(
        self, layer: Layer, uses: list[tuple[torch.Tensor, torch.Tensor]], batch: int
    ) -> None:
        # A layer that runs twice sums its gradients before they are squared: positions
        # of all uses stand side by side.
        parts = [patches(layer.module, a, output_shape=e.shape) for a, e in uses]
        inputs = torch.cat([_by_sample(layer, p, batch) for p in parts], dim=2)
        parts = [output_columns(layer.module, e) for _, e in uses]
        grads = torch.cat([_by_sample(layer, p, batch) for p in parts], dim=2)
        squares = self.moments.squares[layer.name]
        per_group = squares.view(layer.groups, -1, layer.columns)
        for start in range(0, inputs.shape[1], CHUNK):
            chunk = slice(start, start + CHUNK)
            added = torch.zeros_like(per_group)
            for group in range(layer.groups):
                e, a = grads[group, chunk], inputs[group, chunk]
                ops.square_accumulate_(added[group], e.contiguous(), a.contiguous())
            self._trace(layer, float(added.sum()), min(CHUNK, batch - start))
            per_group += added

    def _add_entries(
        self, layer: Layer, uses: list[tuple[torch.Tensor, torch.Tensor]], batch: int
    ) -> None:
        """Add the squares of an embedding, whose inputs are indices of its rows."""
        samples = [a.shape[0] if a.dim() else 1 for a, _ in uses]  # or rows of them
        parts = [
            _by_sample(layer, a.reshape(1, n, -1, 1), batch)
            for n, (a, _) in zip(samples, uses, strict=True)
        ]
        indices = torch.cat(parts, dim=2)[0, :, :, 0]
        parts = [
            _by_sample(layer, e.reshape(1, n, -1, layer.columns), batch)
            for n, (_, e) in zip(samples, uses, strict=True)
        ]
        grads = torch.cat(parts, dim=2)[0]
        squares = self.moments.squares[layer.name]
        for start in range(0, batch, CHUNK):
            chunk = slice(start, start + CHUNK)
            own, e = indices[chunk], grads[chunk].float()
            # One number for a sample and an entry; few of all possible ones occur.
            pairs = own + layer.rows * torch.arange(len(own))[:, None]
            found, place = torch.unique(pairs.flatten(), return_inverse=True)
            sums = torch.zeros(len(found), layer.columns)
            sums.index_add_(0, place, e.flatten(0, 1))
            added = sums.double().square()
            self._trace(layer, float(added.sum()), len(own))
            squares.index_add_(0, found % layer.rows, added)

    def _trace(self, layer: Layer, total: float, samples: int) -> None:
        """Count a chunk of samples whose squares sum to ``total``."""
        if not math.isfinite(total):
            raise NonFiniteError(
                f"a gradient of layer {layer.name!r} is not finite",
                got=f"a sum of squares of {total}",
                wanted="finite gradients",
                fix="look for NaN in the data, and for overflow in half precision",
            )
        mean = total / samples
        self.moments.trace[layer.name] += torch.tensor(
            [total, mean * mean, 1.0], dtype=torch.float64
        )


def _by_sample(layer: Layer, columns: torch.Tensor, batch: int) -> torch.Tensor:
    """Return [groups, B·k, P, I] as [groups, B, k·P, I].

    Models may fold windows or time steps of a sample into the batch, sample by sample.
    """
    groups, rows, positions, width = columns.shape
    if rows % batch:
        raise UnsupportedLayerError(
            f"layer {layer.name!r} does not see the samples one by one",
            got=f"{rows} along its first dimension",
            wanted=f"{batch}, or a multiple: the samples of the batch",
            fix="let the batch be the first dimension of the layer's input",
        )
    return columns.reshape(groups, batch, rows // batch * positions, width)
