"""Losses for a Fisher estimate: of labels, given or drawn from the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fitcompress.errors import DataError, NonFiniteError
from fitcompress.model.positions import NO_LABEL, aligned_labels, position_shares

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["check_logits", "label_loss", "logits_of", "sampled_label_loss"]


def logits_of(output: Any) -> Any:
    """Return the logits in an output: itself, its ``logits``, or its first part."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, tuple) and output:
        return output[0]
    return output


def check_logits(out: Any) -> torch.Tensor:
    """Return the logits in a model's output, see :func:`logits_of`, classes last.

    Images, [B, classes, H, W] and more, have their classes moved there.

    Raises:
        DataError: It is something else.
    """
    out = logits_of(out)
    if torch.is_tensor(out) and out.is_floating_point() and out.dim() > 1:
        return out.movedim(1, -1) if out.dim() > 3 else out
    raise DataError(
        "the model's output cannot be used as logits",
        got=tuple(out.shape) if torch.is_tensor(out) else type(out).__name__,
        wanted="a float tensor [samples, …, classes]",
        fix="wrap the model so that it returns its logits",
    )


def label_loss(model: nn.Module) -> Callable[[Any, Any], torch.Tensor]:
    """Return the cross-entropy of labels as a ``loss_fn``, for sequences as well.

        (1/B) Σ_i (1/T_i) Σ_t −log softmax(z_it)[y_it]   in nats

    over the T_i positions of sequence i whose label is not −100. Samples count alike,
    however long they are, as an exact per-sample Fisher needs it; the ``loss`` of
    Hugging Face's models is the mean over the tokens of a batch, which is another one.

    Args:
        model: A causal language model of Hugging Face is compared with the labels of
            the next positions.

    Returns:
        (output, labels) → loss. It raises ``DataError`` if they do not fit.

    Example:
        >>> import torch, fitcompress as fc
        >>> loss = fc.label_loss(torch.nn.Linear(2, 3))
        >>> float(loss(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])))
        1.0986123085021973
    """

    def loss(output: Any, labels: Any) -> torch.Tensor:
        logits = check_logits(output).float()
        y = aligned_labels(model, labels)
        if not torch.is_tensor(y) or y.shape != logits.shape[:-1]:
            raise DataError(
                "the labels do not fit the model's output",
                got=tuple(y.shape) if torch.is_tensor(y) else type(y).__name__,
                wanted=tuple(logits.shape[:-1]),
            )
        y = y.to(logits.device).long()
        each = F.cross_entropy(
            logits.flatten(0, -2), y.flatten(), ignore_index=NO_LABEL, reduction="none"
        )
        shares = position_shares(
            tuple(y.shape), y != NO_LABEL if y.dim() == 2 else None, y.device
        )
        return (each * shares.flatten()).sum()

    return loss


def sampled_label_loss(
    output: Any,
    generator: torch.Generator,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean cross-entropy with labels drawn from the model itself.

    The gradients of this loss give the true Fisher information of the model, which
    needs no labels and does not vanish on memorised training data as fast as the
    empirical one. The loss of a sample is the mean over its positions.

    Args:
        output: Logits, [B, classes], [B, T, classes], or [B, classes, H, W] and more,
            as ``torch.nn.functional.cross_entropy`` takes images; or an object that
            holds them as ``logits``.
        generator: Draws the labels, on the CPU.
        mask: [B, T], non-zero for the positions of a sequence that count; None for all.

    Raises:
        DataError: The output is no such tensor, or a sample has no position.
        NonFiniteError: A logit is NaN or infinite.
    """
    output = logits_of(output)
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
    probability = logits.detach().softmax(-1).double().cpu()
    label = torch.multinomial(probability, 1, generator=generator).squeeze(1)
    label = label.to(logits.device)
    if mask is None or output.dim() != 3 or mask.shape[1:] != output.shape[1:2]:
        return F.cross_entropy(logits.float(), label)
    if len(mask) != len(output):
        raise DataError(
            "the mask is not one of these samples",
            got=f"{len(mask)} rows for {len(output)} samples",
        )
    weight = (mask != 0).to(logits.device).float()
    count = weight.sum(1, keepdim=True)
    if not bool((count > 0).all()):
        raise DataError(
            "a sample of the batch has no position that counts",
            got="an attention_mask of zeros, or labels that are all −100",
            fix="leave such samples out",
        )
    losses = F.cross_entropy(logits.float(), label, reduction="none")
    return (losses * (weight / count).flatten()).sum() / len(mask)
