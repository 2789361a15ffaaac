"""The Fisher estimator: exact moments of per-sample gradients, batch by batch.

The model runs as it is. Calls that multiply by a weight are caught (:mod:`.capture`),
the gradient of each one's result is contracted with its input when backpropagation
passes by (:mod:`.contraction`, :mod:`.forms`), and both are let go. No weight gets a
gradient of autograd's, and no per-sample gradient is ever stored.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fitcompress.data.batches import batch_size, part
from fitcompress.errors import CalibrationError, NonFiniteError, UnsupportedLayerError
from fitcompress.model.forward import call_model
from fitcompress.sensitivity.capture import Capture, capturing
from fitcompress.sensitivity.contraction import (
    Contraction,
    Entries,
    contraction,
    entries,
    joined,
)
from fitcompress.sensitivity.forms import accumulate, accumulate_entries
from fitcompress.sensitivity.layout import SINGLE, Layout
from fitcompress.sensitivity.moments import FisherMoments
from fitcompress.sensitivity.probe import Probe, probe
from fitcompress.sensitivity.weights import WeightIndex, measured_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fitcompress.model import Layer
    from fitcompress.sensitivity.calls import Call
    from fitcompress.sensitivity.weights import Part, Weight

__all__ = ["FisherEstimator"]

logger = logging.getLogger(__name__)

MEMORY = 2 << 30  # bytes that the activations of a micro-batch may take

NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(eq=False)
class _Use:
    """A caught call on its way through backpropagation."""

    call: Call
    layout: Layout
    version: int


class FisherEstimator:
    """Accumulates moments of per-sample gradients; see :class:`FisherMoments`.

    Weights of linear maps, convolutions (transposed, grouped and depthwise ones, of one
    to three dimensions), embeddings, matrix products such as Hugging Face's ``Conv1D``,
    and the packed projections of attention. A weight that is used several times, tied
    or not, sums its gradients before they are squared. Weights that are used otherwise
    are named in a warning once and in ``moments.unsupported``.

    Args:
        model: The network, in eval mode: batch statistics would couple samples.
        layers: Measure the weights of these layers only; None: all weights.
        diagonal: Accumulate F beside T.
        activations: Accumulate ‖∂ℓ_i/∂x_i‖² of the inputs of linear maps and
            convolutions, too. It is the gradient of the tensor x: where several layers
            read x, that of all of them. Costs the input gradient of the first layer.
        memory: Bytes that the activations of a micro-batch may take, about; larger
            batches are cut. At least one sample is taken.
        moments: Sums to continue, from an interrupted estimate.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False).eval()
        >>> estimator = FisherEstimator(model)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> loss = estimator.update(x, None, lambda out, _: out.mean())
        >>> estimator.moments.mean_trace("weight")  # (1 + 4 + 9 + 0) / 2
        7.0
        >>> estimator.moments.diagonal("weight").tolist()
        [[5.0, 2.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[Layer] | None = None,
        *,
        diagonal: bool = True,
        activations: bool = False,
        memory: int = MEMORY,
        moments: FisherMoments | None = None,
    ) -> None:
        self.model = getattr(model, "_orig_mod", model)  # of torch.compile
        self.diagonal, self.activations, self.memory = diagonal, activations, memory
        self.moments = moments or FisherMoments()
        self._required = layers is not None
        self._index = WeightIndex(measured_weights(self.model, layers))
        self._probe: Probe | None = None
        self._copy_inputs = False
        for weight in self._index.weights:
            trace = torch.zeros(2, dtype=torch.float64)
            self.moments.trace.setdefault(weight.name, trace)

    def update(
        self, x: Any, y: Any, loss_fn: Callable[[Any, Any], torch.Tensor]
    ) -> float:
        """Add the samples of one batch.

        Args:
            x: Inputs: a tensor, a tuple of arguments, or a dict of named ones.
            y: Targets; cut together with the inputs where a batch is cut.
            loss_fn: (output, targets) → the mean of the losses of the samples, nats.

        Returns:
            The mean loss of the batch, nats.

        Raises:
            NonFiniteError: The loss or a gradient is NaN or infinite.
            CalibrationError: The loss has no gradient, or a norm uses the statistics of
                the batch.
            UnsupportedLayerError: A layer mixes samples.
            DataError: The inputs have no common number of samples.
        """
        self._check_modes()
        batch = batch_size(x)
        if self._probe is None or (batch > 1 and self._probe.single):
            self._probe = probe(self.model, self._index, x, batch)
        size = self._micro_batch(batch)
        total = 0.0
        for start in range(0, batch, size):
            cut = slice(start, min(start + size, batch))
            whole = cut == slice(0, batch)
            loss = self._update(
                x if whole else part(x, cut),
                y if whole else part(y, cut),
                loss_fn,
                cut.stop - cut.start,
            )
            total += loss * (cut.stop - cut.start)
        self.moments.samples += batch
        self.moments.loss += total
        self.moments.batches += 1
        return total / batch

    def _micro_batch(self, batch: int) -> int:
        """Return how many samples are run at once: parts of nearly equal size."""
        assert self._probe is not None
        if self._probe.alone:
            return 1
        most = max(1, int(self.memory // max(self._probe.bytes_per_sample, 1)))
        return -(-batch // -(-batch // most))

    def _check_modes(self) -> None:
        coupled = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, NORMS)
            and (module.training or module.running_mean is None)
        ]
        if coupled:
            raise CalibrationError(
                "batch norm would couple the samples of a batch",
                got=f"{len(coupled)} in train mode or without running statistics, "
                f"such as {coupled[0]!r}",
                wanted="norms with running statistics, in eval mode",
                fix="call model.eval() first",
            )

    def _update(
        self,
        x: Any,
        y: Any,
        loss_fn: Callable[[Any, Any], torch.Tensor],
        batch: int,
    ) -> float:
        """Add the squares of a micro-batch, and return its mean loss."""
        run = _Run(self, batch)
        with capturing(self.model, run.capture), torch.enable_grad():
            loss = loss_fn(call_model(self.model, run.inputs(x)), y)
            _check_loss(loss)
        if run.stale():
            # Something after a layer changed its input in place: catch copies.
            self._copy_inputs = True
            return self._update(x, y, loss_fn, batch)
        if run.capture.irregular and batch > 1:  # which the first batch did not show
            assert self._probe is not None
            self._probe.alone = True
            singles = [slice(i, i + 1) for i in range(batch)]
            losses = [self._update(part(x, i), part(y, i), loss_fn, 1) for i in singles]
            return sum(losses) / batch
        run.backward(loss)
        for name, reason in run.capture.unsupported.items():
            self._leave_out(name, reason)
        run.finish()
        if self._required:
            self._check_reached()
        return float(loss.detach())

    def _check_reached(self) -> None:
        """Raise if a layer that was asked for has no moments."""
        for weight in self._index.weights:
            name = weight.name
            if name in self.moments.unsupported:
                raise UnsupportedLayerError(
                    f"the gradient of layer {name!r} cannot be measured",
                    got=self.moments.unsupported[name],
                    wanted="a weight that is only multiplied with inputs",
                    fix="leave the layer out, or move that use out of the forward pass",
                )
            if name not in self.moments.forms:
                raise CalibrationError(
                    f"the loss does not depend on layer {name!r}",
                    wanted="a forward pass that reaches every compressible layer",
                    fix="pass data that exercise it, or take it out of the model",
                )

    def drop_unreached(self) -> None:
        """Take weights that no gradient has reached out of the moments, and say so."""
        for weight in self._index.weights:
            if weight.name not in self.moments.forms:
                self._leave_out(weight.name, "no gradient of the loss reaches it")

    def _leave_out(self, name: str, reason: str) -> None:
        if name in self.moments.unsupported:
            return
        logger.warning("no Fisher moments of %s: %s", name, reason)
        self.moments.unsupported[name] = reason
        for sums in (
            self.moments.trace,
            self.moments.squares,
            self.moments.activations,
        ):
            sums.pop(name, None)

    def squares(self, weight: Weight, device: torch.device) -> torch.Tensor | None:
        """Return where the squares of a weight are summed, or None if they are not."""
        if not self.diagonal:
            return None
        found = self.moments.squares.get(weight.name)
        if found is None or found.device != device:
            shape = (weight.rows, weight.columns)
            zeros = torch.zeros(shape, device=device)
            found = zeros if found is None else found.to(device)
            self.moments.squares[weight.name] = found
        return found


class _Run:
    """One micro-batch, from the forward pass to its norms."""

    def __init__(self, estimator: FisherEstimator, batch: int) -> None:
        self.estimator, self.batch = estimator, batch
        self.capture = Capture(estimator._index, self._caught)
        self._uses: dict[Weight, list[_Use]] = {}
        self._waiting: dict[Weight, list[tuple[_Use, torch.Tensor]]] = {}
        self._norms: dict[str, torch.Tensor] = {}
        self._activations: dict[str, torch.Tensor] = {}

    def inputs(self, x: Any) -> Any:
        """Return the inputs cut off from any graph, differentiable if that is asked."""
        if isinstance(x, dict):
            return {key: self.inputs(value) for key, value in x.items()}
        if isinstance(x, (tuple, list)):
            return type(x)(self.inputs(value) for value in x)
        if not isinstance(x, torch.Tensor):
            return x
        x = x.detach()
        wanted = self.estimator.activations and x.is_floating_point()
        return self.capture.anchored(x.clone()) if wanted else x

    def _caught(self, call: Call, out: torch.Tensor) -> torch.Tensor:
        probe = self.estimator._probe
        assert probe is not None
        assert call.input is not None
        uses = self._uses.setdefault(call.part.weight, [])
        layout = SINGLE
        if self.batch > 1:
            layout = probe.layout(call.part.weight, len(uses))
        if layout.expanded:
            call.input = call.input.expand(self.batch, *call.input.shape[1:])
            out = out.expand(self.batch, *out.shape[1:])
        if self.estimator._copy_inputs:
            call.input = call.input.clone()
        if self.estimator.activations and call.input.requires_grad:
            self._watch(call, layout)
        call.input = call.input.detach()
        use = _Use(call, layout, call.input._version)
        uses.append(use)
        out = self.capture.anchored(out)
        out.register_hook(lambda grad: self._arrived(use, grad))  # type: ignore[no-untyped-call]
        return out

    def _watch(self, call: Call, layout: Layout) -> None:
        """Sum up the squares of the gradient of a call's input."""
        assert call.input is not None
        name = call.part.weight.name

        def arrived(grad: torch.Tensor) -> None:
            found = layout.by_sample(grad.detach(), self.batch).reshape(self.batch, -1)
            norms = found.float().square().sum(1, dtype=torch.float64)
            self._activations[name] = self._activations.get(name, 0) + norms.sum()

        call.input.register_hook(arrived)  # type: ignore[no-untyped-call]

    def stale(self) -> bool:
        """Whether an input was changed in place since it was caught."""
        return not self.estimator._copy_inputs and any(
            use.call.input is not None and use.call.input._version != use.version
            for uses in self._uses.values()
            for use in uses
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Run backpropagation; gradients arrive at the hooks."""
        # Times B: of the sum of the losses. Done here, halves do not underflow.
        torch.autograd.grad(
            loss,
            [self.capture.anchor],
            grad_outputs=torch.full_like(loss, self.batch),
            allow_unused=True,
        )

    def _arrived(self, use: _Use, grad: torch.Tensor) -> None:
        weight = use.call.part.weight
        if len(self._uses[weight]) == 1:
            self._add(weight, [(use, grad.detach())])
        else:
            self._waiting.setdefault(weight, []).append((use, grad.detach()))

    def _add(self, weight: Weight, pairs: list[tuple[_Use, torch.Tensor]]) -> None:
        """Add the squares of a weight whose gradient is the sum over ``pairs``."""
        device = pairs[0][1].device
        norms = self._norms.get(weight.name)
        if norms is None:
            norms = torch.zeros(self.batch, dtype=torch.float64, device=device)
            self._norms[weight.name] = norms
        squares = self.estimator.squares(weight, device)
        for first, rows, members in _groups(weight, pairs):
            target = None if squares is None else squares[first : first + rows]
            form = self._accumulate(weight, rows, members, target, norms)
            self.estimator.moments.forms[weight.name] = form
        for use, _ in pairs:
            use.call.input = None

    def _accumulate(
        self,
        weight: Weight,
        rows: int,
        pairs: list[tuple[_Use, torch.Tensor]],
        squares: torch.Tensor | None,
        norms: torch.Tensor,
    ) -> str:
        found: list[Contraction | Entries] = [
            (entries if use.call.kind == "entries" else contraction)(
                use.call, grad, use.layout, self.batch
            )
            for use, grad in pairs
        ]
        if all(isinstance(each, Entries) for each in found):
            looked_up = Entries(
                torch.cat([e.indices for e in found], 1),  # type: ignore[union-attr]
                torch.cat([e.values for e in found], 1),  # type: ignore[union-attr]
            )
            return accumulate_entries(looked_up, squares, norms, rows)
        products = [
            each.dense(rows) if isinstance(each, Entries) else each for each in found
        ]
        product = products[0] if len(products) == 1 else joined(products)
        return accumulate(product, squares, norms)

    def finish(self) -> None:
        """Count what has arrived, weights with several uses included."""
        for weight, pairs in self._waiting.items():
            self._add(weight, pairs)
        moments = self.estimator.moments
        for name, norms in self._norms.items():
            if name in moments.unsupported:
                continue
            if not bool(torch.isfinite(norms).all()):
                raise NonFiniteError(
                    f"a gradient of layer {name!r} is not finite",
                    got=f"squared norms of {norms.sum().item()} in all",
                    wanted="finite gradients",
                    fix="look for NaN in the data, and for overflow in half precision",
                )
            moments.add_norms(name, norms)
        for name, total in self._activations.items():
            if name not in moments.unsupported:
                before = moments.activations.get(
                    name, torch.zeros((), dtype=torch.float64)
                )
                moments.activations[name] = before + total.cpu()


def _groups(
    weight: Weight, pairs: list[tuple[_Use, torch.Tensor]]
) -> list[tuple[int, int, list[tuple[_Use, torch.Tensor]]]]:
    """Split the uses of a weight by the rows that they use: (first, count, uses).

    Parts of a packed projection are apart; where they overlap they are widened to the
    whole weight.
    """
    by_rows: dict[tuple[int, int], list[tuple[_Use, torch.Tensor]]] = {}
    for use, grad in pairs:
        key = (use.call.part.first, use.call.part.rows)
        by_rows.setdefault(key, []).append((use, grad))
    ends = sorted(by_rows)
    apart = all(a + n <= b for (a, n), (b, _) in itertools.pairwise(ends))
    if apart:
        return [(first, rows, members) for (first, rows), members in by_rows.items()]
    widened = [(use, _widened(use.call.part, grad)) for use, grad in pairs]
    return [(0, weight.rows, widened)]


def _widened(part: Part, grad: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a call with some rows as that of one with all of them."""
    if part.whole:
        return grad
    after = part.weight.rows - part.first - part.rows
    return torch.nn.functional.pad(grad, (part.first, after))


def _check_loss(loss: Any) -> None:
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
