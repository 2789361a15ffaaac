"""Coded weights: as integers and scales, and as a section of a packed file."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fitcompress import _core
from fitcompress.errors import FormatError, OptionError
from fitcompress.model.matrix_view import MatrixView
from fitcompress.search.plan import Level
from fitcompress.sensitivity.table import Grid
from fitcompress.storage.container import STATIC_CODES, TRANSPOSED_GROUPS, Section
from fitcompress.storage.tensors import (
    DTYPES,
    checked_shape,
    from_bytes,
    is_number,
    smallest_exact,
    to_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "CODINGS",
    "CodedWeight",
    "Coding",
    "StoredWeight",
    "check_coding",
    "dense_weights",
    "read_coded",
    "write_all",
    "write_coded",
]

Coding = Literal["smallest", "adaptive", "static"]
CODINGS: tuple[Coding, ...] = ("smallest", "adaptive", "static")
PLAIN = MatrixView()
LARGEST = 1 << 30  # magnitude of a code
MAX_CODES_PER_BYTE = 1 << 16  # more than the coders can reach: a longer tensor is a lie
ALL_ZERO_BYTES, MAX_ZEROS = 2, 1 << 28  # all-zero tensors take two bytes of any size
ADAPTIVE, STATIC = 1, 2  # first byte of a stream
SPLIT = 1 << 20  # weights from which on one layer is worth several threads


def check_coding(coding: str) -> Coding:
    """Return ``coding`` if there is such a one.

    Raises:
        OptionError: There is none.
    """
    for known in CODINGS:
        if coding == known:
            return known
    raise OptionError("coding", got=coding, wanted=" or ".join(CODINGS))


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


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a packed file, not decoded yet.

    Attributes:
        name: Qualified name of the module.
        stream: What the coder made of its codes.
        scale: float32 [1] or [rows].
        dtype: Name of the weight's dtype.
        level: Its level in the plan, with the weight's shape.
        view: How the weight is a matrix.
    """

    name: str
    stream: bytes
    scale: torch.Tensor
    dtype: str
    level: Level
    view: MatrixView = PLAIN

    @property
    def key(self) -> str:
        """The weight's key in a state dict."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def coding(self) -> Coding:
        """How its codes are coded."""
        return "static" if self.stream[0] == STATIC else "adaptive"

    @property
    def codes(self) -> torch.Tensor:
        """The codes, int32 [rows, columns], decoded again each time.

        Raises:
            FormatError: The stream is damaged.
        """
        return torch.from_numpy(self._decoded(_core.decode))

    def weight(self, threads: int = 1) -> torch.Tensor:
        """Return the weight, exactly as the grid of the compressed model yields it.

        Raises:
            FormatError: The stream is damaged.
        """
        scales = np.ascontiguousarray(self.scale.numpy(), dtype=np.float32)
        matrix = self._decoded(_core.dequantize, scales, threads=threads)
        try:
            values = torch.from_numpy(matrix).to(DTYPES[self.dtype])
            return self.view.weight_of(values, self.level.shape)
        except RuntimeError as error:  # torch's, where memory is missing
            raise FormatError(
                f"there is no memory for {self.name!r}", got=str(error)[:200]
            ) from error

    def _decoded(
        self, decode: Callable[..., Any], *arguments: Any, threads: int = 1
    ) -> Any:
        bits = self.level.grid.bits
        largest = LARGEST if bits is None else 2 ** (bits - 1) - 1
        rows = self.view.shape(self.level.shape)[0]
        columns = math.prod(self.level.shape) // rows
        try:
            return decode(
                self.stream, rows, columns, *arguments, largest=largest, threads=threads
            )
        except (ValueError, MemoryError) as error:
            raise FormatError(
                f"the codes of {self.name!r} are damaged", got=str(error)[:200]
            ) from error


def dense_weights(weights: Sequence[StoredWeight]) -> list[torch.Tensor]:
    """Return all weights, decoded on torch's number of threads.

    Raises:
        FormatError: A stream is damaged.
    """
    threads = torch.get_num_threads()

    def decode(weight: StoredWeight) -> torch.Tensor:
        large = math.prod(weight.level.shape) >= SPLIT
        return weight.weight(threads if large else 1)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(decode, weights))


def write_all(weights: Iterable[CodedWeight], coding: Coding) -> list[Section]:
    """Return the sections of all weights, encoded on torch's number of threads."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(lambda weight: write_coded(weight, coding), weights))


def write_coded(weight: CodedWeight, coding: Coding = "smallest") -> Section:
    """Return the section of one coded weight; its bytes depend on no thread."""
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
    stream = _core.encode(codes, coding=coding)
    version = STATIC_CODES if stream[0] == STATIC else 1
    return Section(entry, to_bytes(weight.scale, stored) + stream, version)


def read_coded(section: Section) -> StoredWeight:
    """Return the coded weight of a section; its codes are decoded later.

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
    stream = payload[width:]
    known = (ADAPTIVE, STATIC) if section.version >= STATIC_CODES else (ADAPTIVE,)
    if not stream or stream[0] not in known:
        raise FormatError(
            f"the codes of {name!r} are coded in a way that such a file cannot have",
            got=f"codec {stream[:1].hex() or 'missing'}, version {section.version}",
            wanted="codec " + " or ".join(map(str, known)),
        )
    level = _level(entry, shape, scale, 8 * len(payload))
    return StoredWeight(name, stream, scale, dtype, level, view)


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
    good = good and all(is_number(n) and n >= 0 for n in numbers)
    good = good and type(entry.get("bits", 8)) is int
    good = good and ("bits" in entry or scale.numel() == 1)
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
