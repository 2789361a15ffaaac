"""Codes of finished layers on disk, so that a killed ``apply`` goes on where it was."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch

from fitcompress.files import check_writable, write_atomically

if TYPE_CHECKING:
    import os
    from pathlib import Path

    import torch

__all__ = ["Attempts"]

logger = logging.getLogger(__name__)
SAVE_EVERY = 5.0  # seconds between two writes


class Attempts:
    """Codes by (factor on the steps, layer).

    Args:
        path: The file, or None to keep nothing.
        key: What the codes belong to: model, plan and calibration inputs.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str) -> None:
        self._path = None if path is None else check_writable(path)
        self._key = key
        self._codes: dict[str, torch.Tensor] = {}
        self._saved = time.monotonic()
        if self._path is not None and self._path.exists():
            self._codes = _read(self._path, key)

    def get(self, factor: float, layer: str) -> torch.Tensor | None:
        """Return codes that were put before, or None."""
        return self._codes.get(f"{factor.hex()}/{layer}")

    def put(self, factor: float, layer: str, codes: torch.Tensor) -> None:
        """Keep codes, and write them down every few seconds."""
        if self._path is None:
            return
        self._codes[f"{factor.hex()}/{layer}"] = codes.contiguous()
        if time.monotonic() - self._saved > SAVE_EVERY:
            write_atomically(
                self._path, safetensors.torch.save(self._codes, {"apply": self._key})
            )
            self._saved = time.monotonic()

    def forget(self) -> None:
        """Remove the file: the work is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _read(path: Path, key: str) -> dict[str, torch.Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("apply") != key:
                logger.warning("%s belongs to another run and is not used", path)
                return {}
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        logger.warning("%s is damaged and not used: %s", path, error)
        return {}
