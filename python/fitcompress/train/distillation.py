"""The loss of distillation: outputs of a dense network as targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

from fitcompress.sensitivity.labels import check_logits

if TYPE_CHECKING:
    import torch

__all__ = ["TEMPERATURE", "distillation_loss"]

TEMPERATURE = 4.0


def distillation_loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return T² KL(softmax(wanted/T) ‖ softmax(found/T)) at T = 4, batch mean.

    Hinton, Vinyals and Dean 2015, arXiv 1503.02531.

    Args:
        found: Logits of the network under training, classes along the last dimension.
        wanted: Those of the teacher, of the same shape.

    Raises:
        DataError: An output is no tensor of logits.
    """
    p = check_logits(wanted).float() / TEMPERATURE
    q = check_logits(found).float() / TEMPERATURE
    soft = F.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return TEMPERATURE**2 * soft
