"""Random crops and flips of whole batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["random_crop"]


def random_crop(
    x: torch.Tensor,
    generator: torch.Generator,
    *,
    padding: int,
    fill: torch.Tensor,
    flip: bool,
) -> torch.Tensor:
    """Return images shifted by up to ``padding`` pixels, half of them flipped.

    Args:
        x: Images, [B, C, H, W].
        generator: Draws shifts and flips.
        padding: Largest shift, pixels.
        fill: What the border shows, [C]; *black* in the units of ``x``, which is not 0
            for normalised images.
        flip: Whether to mirror.
    """
    batch, _, height, width = x.shape
    fill = fill.view(1, -1, 1, 1)
    padded = F.pad(x - fill, (padding,) * 4) + fill
    high = 2 * padding + 1
    top, left = torch.randint(0, high, (2, batch), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    if flip:
        mirrored = torch.rand(batch, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image = torch.arange(batch)[:, None, None]
    # Indices around a slice: the result is [B, H, W, C].
    cropped = padded[image, :, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()
