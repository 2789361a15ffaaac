"""Masks of one bit a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["pack_mask", "unpack_mask"]


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask into bits, in the order of the flat contiguous mask.

    Args:
        mask: Any shape; non-zero keeps.

    Returns:
        uint8 [⌈n/8⌉]: element i is bit i mod 8 of byte ⌊i/8⌋; unused bits are 0.

    Example:
        >>> pack_mask(torch.tensor([[1, 0, 1], [1, 0, 0]])).tolist()
        [13]
    """
    bits = (mask != 0).flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits << shifts).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack the bits of `pack_mask`.

    Args:
        packed: uint8 [⌈n/8⌉].
        shape: Shape of the mask; n is the product of its elements.

    Returns:
        The mask, bool, of that shape.

    Raises:
        ValueError: If the number of bytes does not fit the shape.

    Example:
        >>> unpack_mask(torch.tensor([13], dtype=torch.uint8), (2, 3)).int().tolist()
        [[1, 0, 1], [1, 0, 0]]
    """
    count = 1
    for size in shape:
        count *= size
    if packed.dtype != torch.uint8 or packed.shape != ((count + 7) // 8,):
        message = (
            f"unpack_mask: a mask of shape {list(shape)} takes uint8 "
            f"[{(count + 7) // 8}], got {packed.dtype} {list(packed.shape)}"
        )
        raise ValueError(message)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] >> shifts) & 1
    return bits.flatten()[:count].bool().view(*shape)
