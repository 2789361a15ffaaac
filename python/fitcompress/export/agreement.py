"""How far the outputs of a file are from those of the model it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fitcompress.data.batches import tensors
from fitcompress.export.sessions import runner
from fitcompress.model.devices import device_of, to_device
from fitcompress.model.forward import call_model
from fitcompress.model.modes import evaluating
from fitcompress.sensitivity.labels import check_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

__all__ = ["Agreement", "agreement_with"]


@dataclass(frozen=True)
class Agreement:
    """A file in ONNX Runtime, all optimizations on, against PyTorch.

    Outputs are taken as logits, classes last; positions of sequences and places of
    images count as samples of their own.

    Attributes:
        samples: How many logits were compared.
        same_class: Per cent of them with the same largest class.
        divergence: mean of KL(p ‖ q), p of PyTorch and q of the file, nats.
        largest_difference: max |x − y| / max |x|, x the outputs of PyTorch.
    """

    samples: int
    same_class: float
    divergence: float
    largest_difference: float

    def __str__(self) -> str:
        return (
            f"same class on {self.same_class:.2f} % of {self.samples} samples, "
            f"KL {self.divergence:.2e}, largest difference "
            f"{100 * self.largest_difference:.2g} % of the largest output"
        )


@torch.no_grad()
def agreement_with(model: nn.Module, data: bytes, batches: Sequence[Any]) -> Agreement:
    """Return how a file and the model agree on inputs.

    Args:
        model: In PyTorch; its mode is left as it was.
        data: The bytes of the file.
        batches: Inputs: tensors, or dicts of named ones.

    Raises:
        DataError: The first output are no logits.
    """
    run, device = runner(data), device_of(model)
    samples, same, total, apart, largest = 0, 0, 0.0, 0.0, 0.0
    with evaluating(model):
        for x in batches:
            out = call_model(model, to_device(x, device))
            p = check_logits(next(tensors(out), None)).float().cpu()
            q = check_logits(run(x)[0]).float()
            apart = max(apart, float((p - q).abs().max()))
            largest = max(largest, float(p.abs().max()))
            samples += p[..., 0].numel()
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
    scale = max(largest, torch.finfo(torch.float32).tiny)
    return Agreement(samples, 100 * same / samples, total / samples, apart / scale)
