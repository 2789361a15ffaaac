"""Files that hold the state of a run: tensors, and numbers as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch

from fitcompress.errors import FormatError
from fitcompress.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = ["read_state", "write_state"]


def write_state(
    path: Path, entry: str, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]
) -> None:
    """Write a state atomically, its numbers under the name ``entry``."""
    data = safetensors.torch.save(tensors, {entry: json.dumps(numbers)})
    write_atomically(path, data)


def read_state(
    path: Path, entry: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return what :func:`write_state` wrote.

    Raises:
        FormatError: The file is damaged, or of something else.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            numbers = json.loads((file.metadata() or {})[entry])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
        raise FormatError(
            f"{path} cannot be read",
            got=" ".join(str(error).split())[:200] or type(error).__name__,
            wanted="the state of a run",
        ) from error
    if not isinstance(numbers, dict):
        raise FormatError(f"{path} cannot be read", got=type(numbers).__name__)
    return tensors, numbers
