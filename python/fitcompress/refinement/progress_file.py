"""Sums over the batches so far on disk, so that a killed refinement goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch

from fitcompress.files import check_writable, write_atomically

if TYPE_CHECKING:
    import os

__all__ = ["ProgressFile"]

logger = logging.getLogger(__name__)


class ProgressFile:
    """The state of a sum over batches.

    Args:
        path: The file, or None to keep nothing.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = None if path is None else Path(check_writable(path))
        self._key = ""

    def belongs_to(self, key: str) -> None:
        """Say what the sums are of; those of anything else are not loaded."""
        self._key = key

    def load(self, shape: tuple[int, ...]) -> tuple[int, torch.Tensor]:
        """Return how many batches are done, and their sums; 0 and zeros without any."""
        nothing = 0, torch.zeros(shape, dtype=torch.float64)
        if self._path is None or not self._path.exists():
            return nothing
        try:
            with safetensors.safe_open(self._path, framework="pt") as file:
                key = (file.metadata() or {}).get("refine")
                if key != self._key:
                    logger.warning("%s belongs to something else: not used", self._path)
                    return nothing
                done, sums = int(file.get_tensor("done")), file.get_tensor("sums")
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            logger.warning("%s is damaged and not used: %s", self._path, error)
            return nothing
        return (done, sums) if sums.shape == shape else nothing

    def save(self, done: int, sums: torch.Tensor) -> None:
        """Write down sums over ``done`` batches."""
        if self._path is not None:
            state = {"done": torch.tensor(done), "sums": sums}
            write_atomically(
                self._path, safetensors.torch.save(state, {"refine": self._key})
            )

    def forget(self) -> None:
        """Remove the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
