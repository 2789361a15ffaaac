"""The loss of distillation: outputs of a dense network as targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from fitcompress.model.positions import position_shares
from fitcompress.sensitivity.labels import check_logits

if TYPE_CHECKING:
    import torch

__all__ = ["TEMPERATURE", "distillation_loss"]

TEMPERATURE = 4.0


def distillation_loss(
    found: Any, wanted: Any, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return T² KL(softmax(wanted/T) ‖ softmax(found/T)) at T = 4, batch mean.

    A sample of several positions, as a sequence, has the mean over those that count.
    Hinton, Vinyals and Dean 2015, arXiv 1503.02531.

    Args:
        found: Logits of the network under training, classes along the last dimension.
        wanted: Those of the teacher, of the same shape.
        mask: Positions of sequences that count, see
            :func:`fitcompress.model.positions.counted`; None for all.

    Raises:
        DataError: An output is no tensor of logits.
    """
    p = check_logits(wanted).float() / TEMPERATURE
    q = check_logits(found).float() / TEMPERATURE
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    if q.dim() == 2:
        soft = F.kl_div(q, p, log_target=True, reduction="batchmean")
        return TEMPERATURE**2 * soft
    each = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    shares = position_shares(tuple(each.shape), mask, each.device)
    return TEMPERATURE**2 * (each * shares).sum()
