"""How far outputs of a changed network are from those of the dense one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fitcompress.model.positions import output_rows
from fitcompress.sensitivity.labels import check_logits

if TYPE_CHECKING:
    from typing import Any

    import torch

__all__ = ["log_probabilities", "softened_divergence"]


def log_probabilities(
    output: Any, temperature: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return log softmax(z / τ) of a model's output, float64 [rows, classes].

    Args:
        output: Of the model.
        temperature: τ.
        mask: Positions of sequences that count, see
            :func:`fitcompress.model.positions.counted`; None for all.

    Raises:
        DataError: The output holds no logits.
    """
    logits = output_rows(check_logits(output), mask).double()
    return (logits / temperature).log_softmax(-1)


def softened_divergence(
    dense: torch.Tensor, changed: torch.Tensor, temperature: float
) -> float:
    """Return τ² Σ_rows KL(p ‖ q), in nats.

    At τ = 1 this is the rise of the loss. Nearly all of that comes from few samples,
    those that the network is unsure of, so that its mean over some hundred samples is
    noisy; a higher τ counts more of them. To second order it is
    ½ Σ (z_c − ẑ_c)² p_c less the square of the mean, p softened by τ.

    Args:
        dense: `log_probabilities` of the dense network at τ.
        changed: Of the other one.
        temperature: τ.
    """
    p = dense.exp()
    return float((p * (dense - changed)).sum()) * temperature**2
