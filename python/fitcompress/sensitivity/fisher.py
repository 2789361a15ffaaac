"""The Fisher estimator: exact moments of per-sample gradients, batch by batch.

The model runs as it is. Calls that multiply by a weight are caught (:mod:`.capture`),
the gradient of each one's result is contracted with its input when backpropagation
passes by (:mod:`.contraction`, :mod:`.forms`), and both are let go. No weight gets a
gradient of autograd's, and no per-sample gradient is ever stored.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fitcompress.data.batches import batch_size, part, sample_shapes
from fitcompress.errors import (
    CalibrationError,
    DistributedError,
    NonFiniteError,
    UnsupportedLayerError,
)
from fitcompress.model.forward import call_model
from fitcompress.model.sharding import unwrapped
from fitcompress.sensitivity.capture import capturing
from fitcompress.sensitivity.moments import FisherMoments
from fitcompress.sensitivity.probe import Probe, probe
from fitcompress.sensitivity.run import Run
from fitcompress.sensitivity.weights import WeightIndex, measured_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fitcompress.model import Layer
    from fitcompress.sensitivity.lockstep import Lockstep
    from fitcompress.sensitivity.weights import Weight

__all__ = ["FisherEstimator"]

logger = logging.getLogger(__name__)

MEMORY = 512 << 20  # bytes that the activations of a micro-batch may take

NORMS = nn.modules.batchnorm._BatchNorm


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
            Inputs that all samples share, as positions, have none.
        memory: Bytes that the activations of a micro-batch may take, about; larger
            batches are cut. At least one sample is taken.
        moments: Sums to continue, from an interrupted estimate.
        lockstep: Of a sharded model, what its processes agree on. They must call
            ``update`` together, with batches of equal shapes, and hold some rows of F
            each in ``moments.squares``.

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
        lockstep: Lockstep | None = None,
    ) -> None:
        model = unwrapped(model)
        self.model = getattr(model, "_orig_mod", model)  # of torch.compile
        self.diagonal, self.activations, self.memory = diagonal, activations, memory
        self.moments = moments or FisherMoments()
        self._required = layers is not None
        self._index = WeightIndex(measured_weights(self.model, layers))
        self._probes: dict[tuple[Any, ...], Probe] = {}
        self._broken = False
        self._lockstep = lockstep

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
        if self._broken:
            raise CalibrationError(
                "an earlier batch failed half-way and left wrong sums",
                wanted="an estimator whose updates have all succeeded",
                fix="start again from the last checkpoint",
            )
        batch = batch_size(x)
        known = self.look_at(x)
        size = self._micro_batch(batch, known)
        total = 0.0
        for start in range(0, batch, size):
            cut = slice(start, min(start + size, batch))
            whole = cut == slice(0, batch)
            total += self._update(
                x if whole else part(x, cut),
                y if whole else part(y, cut),
                loss_fn,
                cut.stop - cut.start,
                known,
            )
        if self._counting:
            self.moments.batches += 1
        return total / batch

    @property
    def _counting(self) -> bool:
        """Whether the samples are this process's own."""
        return self._lockstep is None or self._lockstep.counted

    def unknown(self, x: Any) -> bool:
        """Whether the model has not been looked at with inputs of these shapes."""
        known = self._probes.get(sample_shapes(x))
        return known is None or (batch_size(x) > 1 and known.single)

    def look_at(self, x: Any) -> Probe:
        """Return how the model treats inputs of these shapes: others it may not."""
        shapes = sample_shapes(x)
        if self.unknown(x):
            with self._reaching():
                found = probe(self.model, self._index, x, batch_size(x))
            self._probes[shapes] = found
        return self._probes[shapes]

    def _micro_batch(self, batch: int, probe: Probe) -> int:
        """Return how many samples are run at once: parts of nearly equal size."""
        if probe.alone:
            return 1
        most = max(1, int(self.memory // max(probe.bytes_per_sample, 1)))
        return -(-batch // -(-batch // most))

    def _check_modes(self) -> None:
        random = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.modules.dropout._DropoutNd)
            and module.training
            and module.p > 0
        ]
        if random:
            raise CalibrationError(
                "dropout would measure another network in every batch",
                got=f"{len(random)} in train mode, such as {random[0]!r}",
                wanted="dropout in eval mode",
                fix="call model.eval() first",
            )
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
        probe: Probe,
    ) -> float:
        """Add the squares of a micro-batch, and return the sum of its losses."""
        run = Run(
            self._index,
            probe,
            batch,
            self._squares,
            self._squared,
            activations=self.activations,
        )
        try:
            loss, irregular, stale = self._forward(run, x, y, loss_fn)
            if irregular:  # the first batch did not show it, or the loss has layers
                probe.alone = True
            elif stale:
                if probe.copy_inputs:
                    raise UnsupportedLayerError(
                        "the inputs of a layer are changed in place in a way that "
                        "copies do not undo",
                        fix="use operations that are not in place",
                    )
                probe.copy_inputs = True
            else:
                assert loss is not None
                self._broken = True
                with self._together():
                    with self._reaching():
                        run.backward(loss)
                    if self._counting:
                        self._count(run, float(loss.detach()), batch)
                self._broken = False
                return float(loss.detach()) * batch
        finally:
            run.close()
        if not probe.alone or batch == 1:
            return self._update(x, y, loss_fn, batch, probe)
        singles = [slice(i, i + 1) for i in range(batch)]
        return sum(
            self._update(part(x, i), part(y, i), loss_fn, 1, probe) for i in singles
        )

    def _forward(
        self,
        run: Run,
        x: Any,
        y: Any,
        loss_fn: Callable[[Any, Any], torch.Tensor],
    ) -> tuple[torch.Tensor | None, bool, bool]:
        """Return the loss, and whether the run is irregular or stale in a process."""
        loss: torch.Tensor | None = None
        error: Exception | None = None
        try:
            with capturing(self.model, run.capture), torch.enable_grad():
                with self._reaching():
                    out = call_model(self.model, run.inputs(x))
                if not run.irregular and not run.stale:
                    loss = loss_fn(out, y)
                    _check_loss(loss)
        except Exception as caught:
            if self._lockstep is None or isinstance(caught, DistributedError):
                raise
            error = caught
        if self._lockstep is None:
            return loss, run.irregular, run.stale
        agreed = self._lockstep.ranks.agree(error, run.irregular, run.stale)
        return loss, agreed[0], agreed[1]

    def _reaching(self) -> contextlib.AbstractContextManager[None]:
        """Run a block in which the processes of a sharded model talk to each other."""
        if self._lockstep is None:
            return contextlib.nullcontext()
        return self._lockstep.ranks.reaching()

    def _together(self) -> contextlib.AbstractContextManager[None]:
        """Run a block that fails in all processes of a sharded model, or in none."""
        if self._lockstep is None:
            return contextlib.nullcontext()
        return self._lockstep.ranks.together()

    def _count(self, run: Run, loss: float, batch: int) -> None:
        """Add what a micro-batch has found to the moments."""
        moments = self.moments
        for name, reason in run.capture.unsupported.items():
            self._leave_out(name, reason)
        for weight in self._index.weights:  # in the order of the model
            name = weight.name
            if name in moments.unsupported or weight not in run.norms:
                continue
            moments.add_norms(name, run.norms[weight])
            moments.forms[name] = run.forms[weight]
            if weight in run.activations:
                zero = torch.zeros((), dtype=torch.float64)
                before = moments.activations.get(name, zero)
                moments.activations[name] = before + run.activations[weight].cpu()
        moments.samples += batch
        moments.loss += loss * batch
        if self._required:
            self._check_reached()

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
            if weight.name not in self.moments.trace:
                reason = "no gradient of the loss reaches a product with it"
                self._leave_out(weight.name, reason)

    def _leave_out(self, name: str, reason: str) -> None:
        if name in self.moments.unsupported:
            return
        logger.warning("no Fisher moments of %s: %s", name, reason)
        self.moments.unsupported[name] = reason
        for sums in (
            self.moments.trace,
            self.moments.squares,
            self.moments.activations,
            self.moments.forms,
        ):
            sums.pop(name, None)

    def _squares(self, weight: Weight, device: torch.device) -> torch.Tensor | None:
        """Return where the squares of a weight are summed, or None if they are not."""
        if not self.diagonal or weight.name in self.moments.unsupported:
            return None
        if self._lockstep is not None:
            return torch.zeros((weight.rows, weight.columns), device=device)
        found = self.moments.squares.get(weight.name)
        if found is None or found.device != device:
            shape = (weight.rows, weight.columns)
            zeros = torch.zeros(shape, device=device)
            found = zeros if found is None else found.to(device)
            self.moments.squares[weight.name] = found
        return found

    def _squared(self, weight: Weight, squares: torch.Tensor | None) -> None:
        """Take the squares of a weight in a micro-batch, which are complete."""
        if squares is not None and self._lockstep is not None:
            self._lockstep.keep(self.moments.squares, weight, squares)


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
