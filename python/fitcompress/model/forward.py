"""Calling a model with whatever its loader yields."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from fitcompress.errors import DataError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["call_model"]


def call_model(model: nn.Module, x: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments, or a dict of named ones.

    Raises:
        DataError: The model does not take arguments of these names.
    """
    if isinstance(x, dict):
        _check_names(model, x)
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


def _check_names(model: nn.Module, x: dict[str, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(**x)
    except TypeError as error:
        raise DataError(
            "the model does not take the inputs of a batch",
            got=f"dict of {', '.join(map(str, x)) or 'nothing'}: {error}",
            wanted=f"names that {type(model).__name__}.forward knows",
            fix="let the loader yield what the model is called with",
        ) from error
