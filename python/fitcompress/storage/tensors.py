"""Tensors as bytes and back, without losing a bit."""

from __future__ import annotations

import math
from typing import Any

import torch

from fitcompress.errors import FormatError

__all__ = [
    "DTYPES",
    "checked_shape",
    "from_bytes",
    "is_number",
    "smallest_exact",
    "smallest_name",
    "to_bytes",
]

DTYPES: dict[str, torch.dtype] = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "bf2": torch.bfloat16,
    "i8": torch.int64,
    "i4": torch.int32,
    "i2": torch.int16,
    "i1": torch.int8,
    "u1": torch.uint8,
    "b1": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What a dtype holds exactly beside itself.
HOLDS: dict[str, set[str]] = {
    "f8": {"f4", "f2", "bf2", "i4", "i2", "i1", "u1", "b1"},
    "f4": {"f2", "bf2", "i2", "i1", "u1", "b1"},
    "f2": {"i1", "u1", "b1"},
    "bf2": {"i1", "u1", "b1"},
    "i8": {"i4", "i2", "i1", "u1", "b1"},
    "i4": {"i2", "i1", "u1", "b1"},
    "i2": {"i1", "u1", "b1"},
    "i1": {"b1"},
    "u1": {"b1"},
    "b1": set(),
}


def smallest_exact(tensor: torch.Tensor) -> str:
    """Return the name of the smallest dtype that holds ``tensor`` bit for bit.

    Raises:
        FormatError: The dtype cannot be stored.
    """
    if tensor.dtype == torch.float32:
        for dtype in (torch.float16, torch.bfloat16):
            if _same_bits(tensor.to(dtype).float(), tensor):
                return NAMES[dtype]
    if tensor.dtype not in NAMES:
        raise FormatError(
            "a tensor of this dtype cannot be stored",
            got=tensor.dtype,
            wanted=", ".join(str(d).removeprefix("torch.") for d in NAMES),
            fix="convert the model with .float()",
        )
    return NAMES[tensor.dtype]


def smallest_name(tensor: torch.Tensor) -> str:
    """Return the name of a tensor's own dtype."""
    return NAMES[tensor.dtype]


def to_bytes(tensor: torch.Tensor, stored: str) -> bytes:
    """Return the values of ``tensor`` as little-endian ``stored``."""
    flat = tensor.detach().cpu().to(DTYPES[stored]).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def from_bytes(
    data: bytes, stored: str, dtype: str, shape: tuple[int, ...]
) -> torch.Tensor:
    """Return what :func:`to_bytes` wrote, as ``dtype`` in ``shape``.

    Raises:
        FormatError: The number of bytes does not fit the shape, a boolean is neither 0
            nor 1, or ``dtype`` does not hold every value of ``stored``.
    """
    if stored != dtype and stored not in HOLDS[dtype]:
        raise FormatError(
            "a tensor is stored with more precision than it has",
            got=f"{stored} of {dtype}",
        )
    want = math.prod(shape) * DTYPES[stored].itemsize
    if len(data) != want:
        raise FormatError(
            "a tensor's bytes do not fit its shape",
            got=len(data),
            wanted=f"{want} for {shape}",
        )
    if not want:
        return torch.empty(shape, dtype=DTYPES[dtype])
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if stored == "b1" and bool((flat > 1).any()):
        raise FormatError("a boolean is neither 0 nor 1", got=int(flat.max()))
    return flat.view(DTYPES[stored]).to(DTYPES[dtype]).reshape(shape)


def checked_shape(value: Any) -> tuple[int, ...]:
    """Return a shape read from a file.

    Raises:
        FormatError: It is no list of at most eight sizes with a sane product, also of
            those that are not 0: from it follow the strides.
    """
    good = isinstance(value, list) and len(value) <= 8
    good = good and all(type(n) is int and 0 <= n < 2**40 for n in value)
    if not good or math.prod(max(n, 1) for n in value) >= 2**40:
        raise FormatError("a shape in the file is impossible", got=str(value)[:100])
    return tuple(value)


def is_number(value: Any) -> bool:
    """Whether a value read from a file is a number that a float can be."""
    if type(value) is int:
        return abs(value) < 1 << 1023
    return type(value) is float and math.isfinite(value)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.contiguous().view(torch.int32))
