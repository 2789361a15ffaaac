"""Fisher moments on disk, so that a killed measurement goes on where it was."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch

from fitcompress.files import write_atomically
from fitcompress.sensitivity.fisher import Moments

if TYPE_CHECKING:
    import os

__all__ = ["load_moments", "save_moments"]

logger = logging.getLogger(__name__)


def save_moments(path: str | os.PathLike[str], moments: Moments, key: str) -> None:
    """Write ``moments`` to ``path``; ``key`` says what they belong to."""
    tensors = {f"squares/{n}": t for n, t in moments.squares.items()}
    tensors |= {f"trace/{n}": t for n, t in moments.trace.items()}
    counts = {
        "key": key,
        "samples": moments.samples,
        "loss": moments.loss.hex(),
        "batches": moments.batches,
    }
    write_atomically(
        path, safetensors.torch.save(tensors, {"moments": json.dumps(counts)})
    )


def load_moments(path: str | os.PathLike[str], key: str) -> Moments | None:
    """Return saved moments, or None if there are none for ``key``.

    A checkpoint of another model or other settings, or a damaged one, is not used; a
    log line says so.
    """
    if not Path(path).exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            counts = json.loads((file.metadata() or {})["moments"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if counts["key"] != key:
            logger.warning("%s belongs to another measurement and is not used", path)
            return None
        moments = Moments(
            samples=counts["samples"],
            loss=float.fromhex(counts["loss"]),
            batches=counts["batches"],
        )
        for name, tensor in tensors.items():
            kind, layer = name.split("/", 1)
            getattr(moments, kind)[layer] = tensor
    except (
        safetensors.SafetensorError,
        AttributeError,
        KeyError,
        ValueError,
        TypeError,
    ) as error:
        logger.warning("%s is damaged and not used: %s", path, error)
        return None
    return moments
