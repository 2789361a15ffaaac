"""Sections of a packed file for everything that is not coded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.errors import FormatError
from fitcompress.storage.container import NORM_BYTES, Section
from fitcompress.storage.norm_codes import decode_norms, encode_norms
from fitcompress.storage.tensors import (
    DTYPES,
    checked_shape,
    from_bytes,
    is_number,
    smallest_exact,
    smallest_name,
    to_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Container

__all__ = ["Leftovers", "read_leftovers", "write_leftovers"]

HALF = "f2"
MAX_CHANNELS = 1 << 28
KEY_BYTES = 16  # that one more key takes in the index
# Of a folded norm, the last one if it is counted.
NORM_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Leftovers:
    """Everything in a state dict that is not coded.

    Attributes:
        tensors: State dict key → tensor, folded norms excepted.
        norms: Prefix of a folded batch norm → (weight, bias, ε, has batch counter).
        aliases: State dict key → key of the tensor that it shares.
    """

    tensors: dict[str, torch.Tensor]
    norms: dict[str, tuple[torch.Tensor, torch.Tensor, float, bool]]
    aliases: dict[str, str]

    def state(self) -> dict[str, torch.Tensor]:
        """Return the entries of the state dict, constants of folded norms included.

        Without aliases, which may name coded weights.
        """
        state = dict(self.tensors)
        for prefix, (weight, bias, eps, counted) in self.norms.items():
            state[f"{prefix}.weight"], state[f"{prefix}.bias"] = weight, bias
            state[f"{prefix}.running_mean"] = torch.zeros_like(weight)
            state[f"{prefix}.running_var"] = torch.full_like(weight, 1.0 - eps)
            if counted:
                state[f"{prefix}.num_batches_tracked"] = torch.zeros(
                    (), dtype=torch.int64
                )
        return state


def write_leftovers(left: Leftovers) -> Section:
    """Return the one section of everything that is not coded."""
    tensors, norms, parts = [], [], []
    for key, tensor in left.tensors.items():
        stored, dtype = smallest_exact(tensor), smallest_name(tensor)
        tensors.append([key, stored, dtype, list(tensor.shape)])
        parts.append(to_bytes(tensor, stored))
    halves, raw, others = [], b"", b""
    for prefix, (weight, bias, eps, counted) in left.norms.items():
        both = torch.stack([weight, bias])
        stored = smallest_exact(both)
        norms.append([prefix, stored, weight.numel(), eps, counted])
        numbers = to_bytes(both, stored)
        raw += numbers
        if stored == HALF and weight.numel():
            halves.append(both.cpu().half())
        else:
            others += numbers
    entry: dict[str, Any] = {
        "kind": "leftovers",
        "tensors": tensors,
        "norms": norms,
        "aliases": left.aliases,
    }
    coded = encode_norms(torch.cat(halves, 1)) if halves else b""
    if coded and len(others) + len(coded) + KEY_BYTES < len(raw):
        entry[NORM_BYTES] = len(coded)
        raw = others + coded
    return Section(entry, b"".join(parts) + raw)


def read_leftovers(section: Section) -> Leftovers:
    """Return what :func:`write_leftovers` wrote.

    Raises:
        FormatError: The section is something else.
    """
    entry, payload, start = section.entry, section.payload, 0

    def next_tensor(stored: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        nonlocal start
        width = math.prod(shape) * DTYPES[stored].itemsize
        start += width
        return from_bytes(payload[start - width : start], stored, dtype, shape)

    tensors: dict[str, torch.Tensor] = {}
    norms: dict[str, tuple[torch.Tensor, torch.Tensor, float, bool]] = {}
    try:
        payload, halves = _split(entry, payload)
        for key, stored, dtype, shape in entry["tensors"]:
            _check_new(key, tensors)
            tensors[key] = next_tensor(stored, dtype, checked_shape(shape))
        for prefix, stored, channels, eps, counted in entry["norms"]:
            _check_new(prefix, norms)
            if not is_number(eps) or not 0 <= eps < 1 or type(counted) is not bool:
                raise FormatError(
                    "the ε or the counter of a norm is impossible",
                    got=f"{eps}, {counted}"[:100],
                )
            shape = checked_shape([2, channels])
            if halves is not None and stored == HALF and channels:
                both, halves = halves[:, :channels].float(), halves[:, channels:]
                if both.shape[1] != channels:
                    raise FormatError("numbers of norms are missing", got=prefix)
            else:
                both = next_tensor(stored, "f4", shape)
            norms[prefix] = both[0].clone(), both[1].clone(), float(eps), counted
        aliases = dict(entry["aliases"].items())
        for alias in aliases.values():
            _check_new(alias, {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            "the section of leftovers cannot be read",
            got=f"{type(error).__name__}: {error}"[:200],
        ) from error
    if halves is not None and halves.shape[1]:
        raise FormatError("there are numbers of more norms", got=halves.shape[1])
    if start != len(payload):
        raise FormatError(
            "the section of leftovers does not fit its description",
            got=f"{len(payload)} bytes",
            wanted=f"{start} bytes",
        )
    for prefix, (*_, counted) in norms.items():
        for name in NORM_ENTRIES if counted else NORM_ENTRIES[:-1]:
            _check_new(f"{prefix}.{name}", tensors)
    return Leftovers(tensors, norms, aliases)


def _split(entry: dict[str, Any], payload: bytes) -> tuple[bytes, torch.Tensor | None]:
    """Return the raw numbers of a payload, and those of norms, [2, channels]."""
    if NORM_BYTES not in entry:
        return payload, None
    length = entry[NORM_BYTES]
    if type(length) is not int or not 0 < length <= len(payload):
        raise FormatError("the length of the norms is impossible", got=str(length)[:50])
    channels = sum(row[2] for row in entry["norms"] if row[1] == HALF)
    if type(channels) is not int or not 0 < channels <= MAX_CHANNELS:
        raise FormatError("the norms have impossible channels", got=str(channels)[:50])
    start = len(payload) - length
    return payload[:start], decode_norms(payload[start:], channels)


def _check_new(name: object, known: Container[str]) -> None:
    """Raise unless a name from a file is text and not known yet.

    Raises:
        FormatError: It is something else, or stands there twice.
    """
    if not isinstance(name, str):
        raise FormatError("a name in the file is no text", got=str(name)[:100])
    if name in known:
        raise FormatError("a tensor stands in the file twice", got=name[:100])
