"""Calling a model with whatever its loader yields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["call_model"]


def call_model(model: nn.Module, x: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments, or a dict of named ones."""
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)
