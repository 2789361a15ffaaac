"""Which positions of sequences count: what padding and labels leave of them.

A sample is a whole sequence. Its positions count alike, but for those that an
``attention_mask`` leaves out, which are padding, and those labelled −100, which have no
loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "NO_LABEL",
    "aligned_labels",
    "attention_masks",
    "counted",
    "counted_rows",
    "output_rows",
    "position_shares",
]

NO_LABEL = -100
"""Label of positions without loss, as for ``torch.nn.functional.cross_entropy``."""


def attention_masks(x: Any) -> list[torch.Tensor]:
    """Return the masks [B, T] among named inputs, true for what is no padding.

    That of the decoder first, whose positions are those of the output.
    """
    if not isinstance(x, dict):
        return []
    names = ["attention_mask"]
    if "decoder_input_ids" in x:
        names = ["decoder_attention_mask", "attention_mask"]
    found = [x.get(name) for name in names]
    return [mask != 0 for mask in found if torch.is_tensor(mask) and mask.dim() == 2]


def aligned_labels(model: nn.Module, y: Any) -> Any:
    """Return the label of every position of the output; −100 where there is none.

    A causal language model of Hugging Face predicts at position t what is labelled at
    t + 1. Other labels, and other models, stay as they are.
    """
    shifted = getattr(model, "loss_type", None) == "ForCausalLM"
    if not shifted or not torch.is_tensor(y) or y.dim() != 2:
        return y
    return torch.cat([y[:, 1:], torch.full_like(y[:, :1], NO_LABEL)], 1)


def counted(model: nn.Module, x: Any, y: Any = None) -> torch.Tensor | None:
    """Return which positions of the output count, bool [B, T], or None for all.

    Args:
        model: Tells how labels are aligned.
        x: Inputs of a batch.
        y: Its targets, if there are any.
    """
    decoding = isinstance(x, dict) and "decoder_input_ids" in x
    masks = attention_masks(x)
    if decoding and not torch.is_tensor(x.get("decoder_attention_mask")):
        masks = []
    mask = masks[0] if masks else None
    y = aligned_labels(model, y)
    labelled = torch.is_tensor(y) and y.dim() == 2 and not y.is_floating_point()
    if not labelled or not bool((y == NO_LABEL).any()):
        return mask
    given: torch.Tensor = y != NO_LABEL
    fits = mask is not None and mask.shape == given.shape
    return given & mask.to(given.device) if mask is not None and fits else given


def counted_rows(
    module: nn.Module, x: torch.Tensor, masks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the input of a layer without padding.

    Args:
        module: The layer. Only those that work position by position are told apart.
        x: Its input: [B, T, I] or [B·T, I]; indices [B, T] or [B·T].
        masks: Of the batch, see :func:`attention_masks`.

    Returns:
        [positions, …] if a mask fits, else ``x``: it has no padding.
    """
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        return x
    features = 0 if isinstance(module, nn.Embedding) else 1
    for mask in masks:
        if x.dim() == 2 + features and x.shape[:2] == mask.shape:
            kept = mask
        elif x.dim() == 1 + features and len(x) == mask.numel():
            kept = mask.flatten()
        else:
            continue
        return x if bool(kept.all()) else x[kept.to(x.device)]
    return x


def output_rows(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return logits [samples, …, classes] as rows, those that count."""
    if mask is None or logits.dim() != 3 or logits.shape[:2] != mask.shape:
        return logits.flatten(0, -2)
    return logits[mask.to(logits.device)]


def position_shares(
    shape: tuple[int, ...], mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return the share of each position in the mean over a batch, float32 ``shape``.

    Samples count alike, and so do the positions of one. Those without any count
    nothing.

    Args:
        shape: [B, …], of the positions.
        mask: Those that count, bool [B, T]; None, or of another shape: all.
        device: Where to.
    """
    if mask is None or shape != tuple(mask.shape):
        count = max(1, torch.Size(shape).numel())
        return torch.full(shape, 1 / count, device=device)
    weight = mask.to(device).float()
    return weight / weight.sum(1, keepdim=True).clamp_min(1) / len(weight)
