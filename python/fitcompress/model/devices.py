"""Where a model lies, and batches brought there."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from fitcompress.data.batches import with_tensors

if TYPE_CHECKING:
    from torch import nn

__all__ = ["device_of", "to_device"]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU if there is none."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def to_device(value: Any, device: torch.device) -> Any:
    """Return ``value`` with its tensors on ``device``; containers are rebuilt."""
    return with_tensors(value, lambda tensor: tensor.to(device))
