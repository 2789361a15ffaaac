"""Sections of a packed file: coded weights, and everything that is not coded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fitcompress import _core
from fitcompress.errors import FormatError
from fitcompress.model.matrix_view import MatrixView
from fitcompress.search.plan import Level
from fitcompress.sensitivity.table import Grid
from fitcompress.storage.container import TRANSPOSED_GROUPS, Section
from fitcompress.storage.tensors import (
    DTYPES,
    checked_shape,
    from_bytes,
    smallest_exact,
    to_bytes,
)

__all__ = [
    "CodedWeight",
    "Leftovers",
    "read_coded",
    "read_leftovers",
    "write_coded",
    "write_leftovers",
]

PLAIN = MatrixView()
MAX_CODES_PER_BYTE = 1 << 16  # more than the coder can reach: a longer tensor is a lie
ALL_ZERO_BYTES, MAX_ZEROS = 2, 1 << 28  # all-zero tensors take two bytes of any size


@dataclass(frozen=True)
class CodedWeight:
    """A weight as integers and scales: its matrix is scale · codes, row by row.

    Attributes:
        name: Qualified name of the module.
        codes: int32 [rows, columns].
        scale: float32 [1] or [rows].
        dtype: Name of the weight's dtype.
        level: Its level in the plan, with the weight's shape.
        view: How the weight is a matrix.
    """

    name: str
    codes: torch.Tensor
    scale: torch.Tensor
    dtype: str
    level: Level
    view: MatrixView = PLAIN

    @property
    def key(self) -> str:
        """The weight's key in a state dict."""
        return f"{self.name}.weight" if self.name else "weight"

    def weight(self) -> torch.Tensor:
        """Return the weight, exactly as the grid of the compressed model yields it."""
        values = self.codes.float() * self.scale.reshape(-1, 1)
        return self.view.weight_of(values.to(DTYPES[self.dtype]), self.level.shape)


def write_coded(weight: CodedWeight) -> Section:
    """Return the section of one coded weight."""
    stored = smallest_exact(weight.scale)
    level = weight.level
    entry: dict[str, Any] = {
        "kind": "codes",
        "name": weight.name,
        "shape": list(level.shape),
        "dtype": weight.dtype,
        "scale": stored,
        "scales": weight.scale.numel(),
        "loss": float(f"{level.distortion:.3g}"),
    }
    if weight.view.transposed_groups:
        entry[TRANSPOSED_GROUPS] = weight.view.transposed_groups
    if level.grid.bits is not None:
        entry["bits"] = level.grid.bits
    if level.sparsity:
        entry["sparsity"] = round(level.sparsity, 4)
    if level.bops:
        entry["bops"] = level.bops
    codes = np.ascontiguousarray(weight.codes.cpu().numpy(), dtype=np.int32)
    return Section(entry, to_bytes(weight.scale, stored) + _core.encode(codes))


def read_coded(section: Section) -> CodedWeight:
    """Return the coded weight of a section.

    Raises:
        FormatError: The section is not what :func:`write_coded` writes.
    """
    entry, payload = section.entry, section.payload
    name, dtype, stored = entry.get("name"), entry.get("dtype"), entry.get("scale")
    if (
        not isinstance(name, str)
        or not isinstance(dtype, str)
        or not isinstance(stored, str)
        or not {dtype, stored} <= {"f2", "bf2", "f4"}
    ):
        raise FormatError("codes without a valid description", got=str(entry)[:200])
    shape = checked_shape(entry.get("shape"))
    view = _view(entry, shape)
    scales: Any = entry.get("scales")
    size, rows = math.prod(shape), view.shape(shape)[0] if len(shape) > 1 else 0
    good = type(scales) is int and scales in (1, rows) and size > 0 and rows > 0
    width = scales * DTYPES[stored].itemsize if good else 0
    if not good or size > _most_codes(len(payload) - width):
        raise FormatError(
            f"the shape or scales of {name!r} are impossible",
            got=f"shape {shape}, {scales} scales, {len(payload)} bytes",
        )
    scale = from_bytes(payload[:width], stored, "f4", (scales,))
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise FormatError(f"a scale of {name!r} is negative or not finite")
    try:
        codes = _core.decode(payload[width:], rows, size // rows)
    except (ValueError, MemoryError) as error:
        raise FormatError(
            f"the codes of {name!r} are damaged", got=str(error)[:200]
        ) from error
    level = _level(entry, shape, scale, 8 * len(payload))
    largest = None if level.grid.bits is None else 2 ** (level.grid.bits - 1) - 1
    if largest is not None and int(np.abs(codes).max()) > largest:
        raise FormatError(
            f"a code of {name!r} is too large for {level.grid}",
            got=int(np.abs(codes).max()),
            wanted=f"at most {largest}",
        )
    return CodedWeight(name, torch.from_numpy(codes), scale, dtype, level, view)


def _view(entry: dict[str, Any], shape: tuple[int, ...]) -> MatrixView:
    if TRANSPOSED_GROUPS not in entry:
        return PLAIN
    groups = entry[TRANSPOSED_GROUPS]
    good = type(groups) is int and groups > 0 and 3 <= len(shape) <= 5
    if not good or shape[0] % groups:
        raise FormatError(
            f"the groups of {entry.get('name')!r} are impossible",
            got=f"{groups!r} of shape {shape}"[:200],
            wanted="a divisor of the first size of three to five",
        )
    return MatrixView(groups)


def _most_codes(stream: int) -> int:
    """Return how many codes a stream of so many bytes can hold at the most."""
    if stream <= ALL_ZERO_BYTES:
        return MAX_ZEROS
    return MAX_CODES_PER_BYTE * stream


def _level(
    entry: dict[str, Any], shape: tuple[int, ...], scale: torch.Tensor, bits: int
) -> Level:
    bops, numbers = (
        entry.get("bops", 0),
        [entry.get("sparsity", 0.0), entry.get("loss", 0.0)],
    )
    good = type(bops) is int and 0 <= bops < 2**80
    good = good and all(type(n) in (int, float) and 0 <= n < math.inf for n in numbers)
    good = good and type(entry.get("bits", 8)) is int
    try:
        if not good:
            raise ValueError
        grid = (
            Grid(bits=entry["bits"]) if "bits" in entry else Grid(step=float(scale[0]))
        )
        sparsity, loss = (float(n) for n in numbers)
        return Level(grid, sparsity, shape, loss, bits, bops)
    except ValueError as error:
        raise FormatError(
            "a level in the file is impossible", got=str(entry)[:200]
        ) from error


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
    for prefix, (weight, bias, eps, counted) in left.norms.items():
        both = torch.stack([weight, bias])
        stored = smallest_exact(both)
        norms.append([prefix, stored, weight.numel(), eps, counted])
        parts.append(to_bytes(both, stored))
    entry = {
        "kind": "leftovers",
        "tensors": tensors,
        "norms": norms,
        "aliases": left.aliases,
    }
    return Section(entry, b"".join(parts))


def smallest_name(tensor: torch.Tensor) -> str:
    """Return the name of a tensor's own dtype."""
    return next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)


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
        for key, stored, dtype, shape in entry["tensors"]:
            tensors[str(key)] = next_tensor(stored, dtype, checked_shape(shape))
        for prefix, stored, channels, eps, counted in entry["norms"]:
            both = next_tensor(stored, "f4", checked_shape([2, channels]))
            norms[str(prefix)] = (
                both[0].clone(),
                both[1].clone(),
                float(eps),
                bool(counted),
            )
            if not 0 <= float(eps) < 1:
                raise FormatError("the ε of a norm is impossible", got=eps)
        aliases = {str(k): str(v) for k, v in entry["aliases"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            "the section of leftovers cannot be read",
            got=f"{type(error).__name__}: {error}"[:200],
        ) from error
    if start != len(payload):
        raise FormatError(
            "the section of leftovers does not fit its description",
            got=f"{len(payload)} bytes",
            wanted=f"{start} bytes",
        )
    return Leftovers(tensors, norms, aliases)
