"""Measured networks on disk, so that a killed measurement goes on where it was."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

from fitcompress.files import check_writable, write_atomically

if TYPE_CHECKING:
    import os

__all__ = ["MeasuredFile"]

logger = logging.getLogger(__name__)


class MeasuredFile:
    """The (ratio, spread, float milliseconds) of the networks measured so far.

    Args:
        path: The file, or None to keep nothing.
        key: What they belong to; those of anything else are not loaded.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str) -> None:
        self._path = None if path is None else Path(check_writable(path))
        self._key = key

    def load(self) -> list[list[float]]:
        """Return the rows that were saved; none without any."""
        if self._path is None or not self._path.exists():
            return []
        try:
            values = json.loads(self._path.read_bytes())
            if values["measure_latency"] != self._key:
                logger.warning("%s belongs to something else: not used", self._path)
                return []
            rows = [[float(number) for number in row] for row in values["rows"]]
            finite = all(math.isfinite(number) for row in rows for number in row)
            if not finite or not all(len(row) == 3 for row in rows):
                message = "rows that are no measurements"
                raise ValueError(message)
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            logger.warning("%s is damaged and not used: %s", self._path, error)
            return []
        return rows

    def save(self, rows: list[list[float]]) -> None:
        """Write down all rows so far."""
        if self._path is not None:
            values = {"measure_latency": self._key, "rows": rows}
            write_atomically(self._path, json.dumps(values).encode())

    def forget(self) -> None:
        """Remove the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
