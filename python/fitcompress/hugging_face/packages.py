"""The optional package that models of Hugging Face need."""

from __future__ import annotations

import importlib
from typing import Any

from fitcompress.errors import MissingDependencyError

__all__ = ["import_transformers"]


def import_transformers(part: str = "transformers") -> Any:
    """Return the module ``transformers``, or one of its parts.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return importlib.import_module(part)
    except ImportError as error:
        raise MissingDependencyError(
            "models of Hugging Face need a package that is not installed",
            got=str(error),
            wanted="transformers",
            fix="pip install 'fitcompress[hf]'",
        ) from error
