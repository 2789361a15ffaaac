"""The two 16-bit numbers per channel of folded norms, entropy-coded.

All norms of a network together: row 0 of a matrix has their factors a, row 1 their
shifts c. A float16 is its sign and its pattern without it, an integer that grows with
the magnitude. Patterns lose the zeros that all of them end with, which is what rounding
to few digits leaves, and the rounded mean of their row; then the coder of the weights
takes each row, and the signs.
"""

from __future__ import annotations

import struct

import numpy as np
import torch

from fitcompress import _core
from fitcompress.errors import FormatError

__all__ = ["decode_norms", "encode_norms"]

HEADER = struct.Struct("<BHHII")  # zeros cut off, two means, bytes of two streams
SIGN, MOST_CUT = 1 << 15, 10


def encode_norms(values: torch.Tensor) -> bytes:
    """Return numbers as bytes.

    Args:
        values: float16 [2, channels], at least one channel.
    """
    patterns = values.contiguous().view(torch.int16).numpy().astype(np.int32)
    magnitudes, signs = patterns & (SIGN - 1), (patterns < 0).astype(np.int32)
    cut = 0
    while cut < MOST_CUT and not (magnitudes & ((2 << cut) - 1)).any():
        cut += 1
    magnitudes >>= cut
    means = [round(float(row.mean())) for row in magnitudes]
    first, second = (
        _core.encode(np.ascontiguousarray(row[None] - mean))
        for row, mean in zip(magnitudes, means, strict=True)
    )
    header = HEADER.pack(cut, *means, len(first), len(second))
    return header + first + second + _core.encode(signs)


def decode_norms(data: bytes, channels: int) -> torch.Tensor:
    """Return what :func:`encode_norms` took, float16 [2, channels].

    Raises:
        FormatError: The bytes are something else.
    """
    try:
        cut, *means, first, second = HEADER.unpack_from(data)
        if cut > MOST_CUT or HEADER.size + first + second > len(data):
            raise ValueError
        ends = np.cumsum([HEADER.size, first, second]).tolist()
        rows = [
            _core.decode(data[start:end], 1, channels) + np.int32(mean)
            for start, end, mean in zip(ends[:2], ends[1:], means, strict=True)
        ]
        signs = _core.decode(data[ends[2] :], 2, channels)
    except (ValueError, MemoryError, struct.error) as error:
        raise FormatError(
            "the numbers of norms are damaged", got=str(error)[:200]
        ) from error
    magnitudes = np.concatenate(rows).astype(np.int64) << cut
    good = magnitudes.min() >= 0 and magnitudes.max() < SIGN
    if not good or signs.min() < 0 or signs.max() > 1:
        raise FormatError("the numbers of norms are no 16-bit floats")
    patterns = (magnitudes | signs.astype(np.int64) * SIGN).astype(np.uint16)
    return torch.from_numpy(patterns.view(np.int16)).view(torch.float16)
