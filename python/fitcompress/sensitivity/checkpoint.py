"""Fisher moments on disk, so that a killed measurement goes on where it was."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fitcompress.errors import FormatError
from fitcompress.files import write_atomically
from fitcompress.sensitivity.moments import FisherMoments

if TYPE_CHECKING:
    import os

__all__ = ["load_moments", "save_moments"]

logger = logging.getLogger(__name__)


def save_moments(
    path: str | os.PathLike[str], moments: FisherMoments, key: str
) -> None:
    """Write ``moments`` to ``path``; ``key`` says what they belong to."""
    write_atomically(path, moments.to_bytes({"key": key}))


def load_moments(path: str | os.PathLike[str], key: str) -> FisherMoments | None:
    """Return saved moments, or None if there are none for ``key``.

    A checkpoint of another model or other settings, or a damaged one, is not used; a
    log line says so.
    """
    if not Path(path).exists():
        return None
    try:
        moments, counts = FisherMoments.from_file(path)
    except FormatError as error:
        logger.warning("%s is damaged and not used: %s", path, error)
        return None
    if counts.get("key") != key:
        logger.warning("%s belongs to another measurement and is not used", path)
        return None
    return moments
