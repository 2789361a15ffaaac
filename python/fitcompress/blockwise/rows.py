"""Matrices on disk, written and read some rows at a time.

Plain reads and writes instead of a memory map, whose pages count as memory of the
process for as long as the system likes to keep them.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import TYPE_CHECKING, cast

import torch

from fitcompress.errors import FormatError, OutputError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

__all__ = ["RowWriter", "Rows"]

PARTIAL = ".partial"


class Rows:
    """A matrix in a file that is there as a whole.

    Args:
        path: What :class:`RowWriter` wrote.
        width: Number of columns.
        dtype: Of the numbers.

    Raises:
        FormatError: Its size is no multiple of a row's.
    """

    def __init__(
        self, path: Path, width: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.path, self.width, self.dtype = path, width, dtype
        size = path.stat().st_size
        if size % self.row_bytes:
            raise FormatError(
                f"{path} is damaged",
                got=f"{size} bytes",
                wanted=f"a multiple of {self.row_bytes}",
                fix="remove the folder it is in, and start again",
            )
        self.count = size // self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.dtype.itemsize

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Return rows [count, width] from ``first`` on, None: all of them.

        Raises:
            FormatError: There are fewer.
        """
        count = self.count - first if count is None else count
        rows = torch.empty(count, self.width, dtype=self.dtype)
        left = _bytes_of(rows)
        with self.path.open("rb", buffering=0) as file:
            file.seek(first * self.row_bytes)
            while len(left) and (got := file.readinto(left)):
                left = left[got:]
        if len(left):
            raise FormatError(f"{self.path} ends within a row that is needed")
        return rows


class RowWriter:
    """Writes a matrix to a file, which gets its name when all rows are there.

    Use as a context manager; leaving it without an error commits the file.

    Args:
        path: The file.
        count: Number of rows.
        width: Number of columns.
        dtype: Of the numbers.
    """

    def __init__(
        self, path: Path, count: int, width: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.path, self.count, self.width, self.dtype = path, count, width, dtype
        self._partial = path.with_name(path.name + PARTIAL)

    def __enter__(self) -> RowWriter:
        with _as_output_error(self.path):
            self._file = self._partial.open("wb", buffering=0)
            self._file.truncate(self.count * self.width * self.dtype.itemsize)
        return self

    def write(self, first: int, rows: torch.Tensor) -> None:
        """Write rows [count, width] from row ``first`` on.

        Raises:
            OutputError: The disk is full.
        """
        rows = rows.to(self.dtype).contiguous()
        with _as_output_error(self.path):
            self._file.seek(first * self.width * self.dtype.itemsize)
            left = _bytes_of(rows)
            while len(left):
                left = left[self._file.write(left) :]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _as_output_error(self.path):
            if kind is None:
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                self._partial.replace(self.path)


def _bytes_of(rows: torch.Tensor) -> memoryview:
    flat = rows.reshape(-1)
    if not math.prod(rows.shape):
        return memoryview(b"")
    return memoryview(cast("bytearray", flat.view(torch.uint8).numpy()))


@contextlib.contextmanager
def _as_output_error(path: Path):  # type: ignore[no-untyped-def]
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}",
            got=error.strerror or type(error).__name__,
            wanted="room for the hidden states of all calibration tokens",
            fix=f"make room in {path.parent}, calibrate with fewer tokens, or go on "
            "elsewhere; what is done is kept",
        ) from error
