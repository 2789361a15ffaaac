"""Finished layers on disk, so that a killed ``apply`` goes on where it was."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch

from fitcompress.compensate.sweep import Quantized
from fitcompress.files import check_writable, write_atomically

if TYPE_CHECKING:
    import os
    from pathlib import Path

__all__ = ["Attempts"]

logger = logging.getLogger(__name__)
SAVE_EVERY = 5.0  # seconds between two writes
FIELDS = ("codes", "scale", "mask", "shift", "gain")


class Attempts:
    """What was made of layers, by (attempt, layer).

    Args:
        path: The file, or None to keep nothing.
        key: What they belong to: model, plan, options and calibration inputs.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str) -> None:
        self._path = None if path is None else check_writable(path)
        self._key = key
        self._kept: dict[str, torch.Tensor] = {}
        self._saved = time.monotonic()
        if self._path is not None and self._path.exists():
            self._kept = _read(self._path, key)

    def get(self, attempt: str, layer: str, device: torch.device) -> Quantized | None:
        """Return a layer that was put before, on a device, or None."""
        kept = {f: self._kept.get(f"{attempt}/{layer}/{f}") for f in FIELDS}
        found = {f: None if t is None else t.to(device) for f, t in kept.items()}
        numbers = self._kept.get(f"{attempt}/{layer}/numbers")
        codes, scale = found["codes"], found["scale"]
        if codes is None or scale is None or numbers is None:
            return None
        drift, trust = numbers.tolist()
        return Quantized(
            codes, scale, found["mask"], found["shift"], found["gain"], drift, trust
        )

    def put(self, attempt: str, layer: str, made: Quantized) -> None:
        """Keep a layer, and write all of them down every few seconds."""
        if self._path is None:
            return
        for field in FIELDS:
            tensor = getattr(made, field)
            if tensor is not None:
                self._kept[f"{attempt}/{layer}/{field}"] = tensor.cpu().contiguous()
        self._kept[f"{attempt}/{layer}/numbers"] = torch.tensor(
            [made.drift, made.trust], dtype=torch.float64
        )
        if time.monotonic() - self._saved > SAVE_EVERY:
            write_atomically(
                self._path, safetensors.torch.save(self._kept, {"apply": self._key})
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
