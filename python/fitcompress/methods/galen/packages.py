"""The packages that the search needs, and what is said where one is missing."""

from __future__ import annotations

import importlib

from fitcompress.errors import MissingDependencyError

__all__ = ["check_packages"]

NEEDED = {
    "gymnasium": "gymnasium",
    "stable_baselines3": "stable-baselines3",
    "torch_pruning": "torch-pruning",
}


def check_packages() -> None:
    """Raise unless the packages of the extra ``galen`` are installed.

    Raises:
        MissingDependencyError: One is not.
    """
    for module, name in NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingDependencyError(
                "Galen needs a package that is not installed",
                got=f"no {name}",
                wanted=", ".join(NEEDED.values()),
                fix="pip install 'fitcompress[galen]'",
            ) from error
