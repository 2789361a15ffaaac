"""``PruningTernary``: most weights zero, the others ±1, by training."""

from __future__ import annotations

import copy
import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.data.batches import take
from fitcompress.errors import DataError, OptionError
from fitcompress.files import check_writable
from fitcompress.methods.dense import dense_layers
from fitcompress.methods.pruning_ternary.result import compressed_copy, finish_
from fitcompress.methods.pruning_ternary.training import TernaryTraining
from fitcompress.model import fingerprint
from fitcompress.model.devices import device_of, to_device
from fitcompress.threads import FIXED, threads
from fitcompress.train.loop import one_pass

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from torch import nn

__all__ = ["PruningTernary"]


@dataclass(frozen=True)
class PruningTernary:
    """Trains ternary weights: codes −1, 0, 1 and one scale per output filter.

    A reconstruction of Pruning Ternary, of which only abstracts are public. For a
    latent filter w

        u = w/‖w‖₂,   t = sign(u) · 1[|u| > δ],   ŵ = s · t/‖t‖₂,   s = ‖w‖₂ of the
        dense filter, fixed,

    with gradients straight from t/‖t‖₂ to u. In each layer δ follows a share of zeros
    that rises during the training; a weight that is out comes back only above
    δ·(1 + h). Signs and masks are frozen for the last steps, in which the rest is
    trained. The statistics of batch norms are estimated anew at the switch to ternary
    weights and at the end.

    Attributes:
        zeros: Share of the weights of every ternary layer that end as zero.
        epochs: Passes over the loader.
        learning_rate: Peak, of SGD with momentum .9, for latent filters of length 1,
            norms and biases; a short warm-up, then a cosine to zero.
        weight_decay: Of the latent weights.
        hysteresis: h, relative to δ.
        first_and_last: Bits of the fixed-point grids, 2 to 8, on which the first and
            the last layer, in the order of definition, are trained instead: one scale
            per filter, no mask. 8 by default, since a filter of nine weights has hardly
            any left. None makes them ternary too, as the sizes reported for Pruning
            Ternary imply; for models whose last layer holds many weights.
        ramp: Share of the steps in which zeros rise.
        frozen: Share of the steps, the last ones, in which signs and masks stay.

    Example:
        >>> import torch, fitcompress as fc
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 4))
        >>> method = fc.methods.PruningTernary(zeros=0.8, epochs=2, first_and_last=None)
        >>> small = method.run(net, [torch.randn(64, 64)], progress=False)
        >>> sorted(small[0].weight[0].sign().unique().tolist())
        [-1.0, 0.0, 1.0]
    """

    zeros: float = 0.85
    epochs: int = 30
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    hysteresis: float = 0.1
    first_and_last: int | None = 8
    ramp: float = 0.6
    frozen: float = 0.15

    def __post_init__(self) -> None:
        for name, wanted, good in (
            ("zeros", "a share, 0 up to but not 1", 0 <= self.zeros < 1),
            ("learning_rate", "a number > 0", 0 < self.learning_rate < math.inf),
            ("weight_decay", "a number ≥ 0", 0 <= self.weight_decay < math.inf),
            ("hysteresis", "a number ≥ 0", 0 <= self.hysteresis < math.inf),
            ("ramp", "a share, 0 to 1", 0 <= self.ramp <= 1),
            ("frozen", "a share, 0 up to but not 1", 0 <= self.frozen < 1),
            (
                "epochs",
                "a whole number ≥ 1",
                type(self.epochs) is int and self.epochs >= 1,
            ),
        ):
            if not good:
                raise OptionError(name, got=repr(getattr(self, name)), wanted=wanted)
        bits = self.first_and_last
        if bits is not None and not (type(bits) is int and 2 <= bits <= 8):
            raise OptionError(
                "first_and_last", got=repr(bits), wanted="2 to 8 bits, or None"
            )

    def run(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        *,
        teacher: bool | nn.Module = True,
        checkpoint: str | os.PathLike[str] | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> nn.Module:
        """Return a ternary copy of ``model``, compressed as ``apply`` returns it.

        The loss is T² KL(teacher ‖ network) at T = 4, if there is a teacher, plus
        ``loss_fn(output, targets)``, if given. Batches are moved to the device of the
        model's first parameter. After a kill, the same call with the same checkpoint
        ends with the identical model.

        Args:
            model: The trained network, in float32; unchanged.
            loader: Yields inputs or (inputs, targets), the same for the same epoch; if
                it has an attribute ``epoch``, that is set before each pass.
            loss_fn: (output, targets) → loss averaged over the batch.
            teacher: True for the dense model itself, False for none, or another one.
            checkpoint: File to save progress to and resume from; removed at the end.
            seed: Seeds dropout; the loader draws for itself.
            progress: Show a bar with the time left.

        Returns:
            A model in eval mode, its weights on 2-bit grids with a mask and a scale per
            filter, for ``save``, ``finetune`` and ``report``. ``details`` of its plan
            tell the mean cosine of latent and ternary filters of every layer
            (``cosine``; ``cosine_dense`` is without training), the ``losses`` of the
            epochs run in this call, and ``two_bit_bytes``, see :func:`two_bit_bytes`.
            Its plan is no budget.

        Raises:
            DataError: There is neither a teacher nor a loss, or a batch or an output
                does not serve.
            OptionError: The model is compressed already or not in float32, or all its
                layers are first or last ones with bits of their own.
            NoCompressibleLayerError: The model has no layer that can be compressed.
            EmptyLoaderError: The loader yields nothing.
            NonFiniteError: A weight or the loss is NaN or infinite.
            OutputError: The checkpoint cannot be written.
        """
        if teacher is False and loss_fn is None:
            raise DataError(
                "nothing to train for", wanted="a teacher, a loss function, or both"
            )
        self._check(model)
        if checkpoint is not None:
            check_writable(checkpoint)
        guide = model if teacher is True else teacher
        if guide is not False:
            guide = copy.deepcopy(guide).eval().to(device_of(model))
        wanted = guide or None
        key = f"{seed}-{astuple(self)}-{wanted and fingerprint(wanted, [])}"
        with threads(FIXED), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            training = TernaryTraining(model, self, loader, wanted, loss_fn)
            details: dict[str, Any] = {"cosine_dense": training.dense_cosines}
            details["losses"] = training.run(checkpoint, key, progress=progress)
            details["cosine"] = training.cosines()
            small = compressed_copy(model, training.model)
            training.estimate_norms(small)
            x, _ = next(take(one_pass(loader, 0), 1))
            finish_(small, to_device(x, training.device), details)
        if checkpoint is not None:
            check_writable(checkpoint).unlink(missing_ok=True)
        return small

    def _check(self, model: nn.Module) -> None:
        layers = dense_layers(model)
        if self.first_and_last is not None and len(layers) < 3:
            raise OptionError(
                "no layer is left to be ternary",
                got=f"{len(layers)} layers and first_and_last={self.first_and_last}",
                wanted="three layers, or first_and_last=None",
            )
