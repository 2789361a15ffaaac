"""How far the outputs of a file are from those of the model it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fitcompress.data.batches import tensors
from fitcompress.errors import DataError, NonFiniteError
from fitcompress.export.sessions import runner
from fitcompress.model.devices import device_of, to_device
from fitcompress.model.forward import call_model
from fitcompress.model.modes import evaluating

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

__all__ = ["Agreement", "agreement_with"]


@dataclass(frozen=True)
class Agreement:
    """A file in ONNX Runtime, all optimizations on, against PyTorch.

    The first output counts. Where it is [samples, …, classes] with two classes or more,
    it is taken as logits: every position of a sequence counts as a sample. Other
    outputs, one number a sample or images, have no classes to compare.

    Attributes:
        samples: How many logits, or samples, were compared.
        same_class: Per cent of them with the same largest class; None without classes.
        divergence: mean of KL(p ‖ q), p of PyTorch and q of the file, nats; None
            without classes.
        largest_difference: max |x − y| / max |x|, x the outputs of PyTorch.
    """

    samples: int
    same_class: float | None
    divergence: float | None
    largest_difference: float

    def __str__(self) -> str:
        largest = f"{100 * self.largest_difference:.2g} % of the largest output"
        if self.same_class is None:
            return f"largest difference {largest} on {self.samples} samples"
        return (
            f"same class on {self.same_class:.2f} % of {self.samples} samples, "
            f"KL {self.divergence:.2e}, largest difference {largest}"
        )


@torch.no_grad()
def agreement_with(model: nn.Module, data: bytes, batches: Sequence[Any]) -> Agreement:
    """Return how a file and the model agree on inputs.

    Args:
        model: In PyTorch; its mode is left as it was.
        data: The bytes of the file.
        batches: Inputs: tensors, or dicts of named ones.

    Raises:
        DataError: The first output is no float tensor.
        NonFiniteError: An output is NaN or infinite.
    """
    run, device = runner(data), device_of(model)
    samples, same, total, apart, largest = 0, 0, 0.0, 0.0, 0.0
    with evaluating(model):
        for x in batches:
            q = _output(run(x)[0])
            p = _output(next(tensors(call_model(model, to_device(x, device))), None))
            apart = max(apart, float((p - q).abs().max()))
            largest = max(largest, float(p.abs().max()))
            classes = _has_classes(p)
            samples += p[..., 0].numel() if classes else len(p)
            if classes:
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
                p, q = p.log_softmax(-1), q.log_softmax(-1)
                total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
    difference = apart / max(largest, torch.finfo(torch.float32).tiny)
    if not classes:
        return Agreement(samples, None, None, difference)
    return Agreement(samples, 100 * same / samples, total / samples, difference)


def _output(out: Any) -> torch.Tensor:
    if not torch.is_tensor(out) or not out.is_floating_point() or not out.dim():
        raise DataError(
            "the model's output cannot be compared",
            got=tuple(out.shape) if torch.is_tensor(out) else type(out).__name__,
            wanted="a float tensor [samples, …]",
            fix="wrap the model so that it returns its logits first",
        )
    if not bool(out.isfinite().all()):
        raise NonFiniteError(
            "outputs are NaN or infinite",
            wanted="finite numbers",
            fix="look for NaN in the data and for overflow",
        )
    return out.float().cpu()


def _has_classes(out: torch.Tensor) -> bool:
    return out.dim() in (2, 3) and out.shape[-1] > 1
