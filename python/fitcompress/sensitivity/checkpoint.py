"""Fisher moments on disk, so that a killed measurement goes on where it was."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fitcompress.errors import FormatError
from fitcompress.files import check_writable, write_atomically
from fitcompress.sensitivity.moments import FisherMoments

if TYPE_CHECKING:
    import os

    from fitcompress.ranks import Ranks

__all__ = ["Checkpoint"]

logger = logging.getLogger(__name__)


class Checkpoint:
    """Where the moments of this process are saved, and up to which turn they go.

    Alone, that is the file itself. Each of several processes has a file of its own,
    ``<path>.rank0-of-2``, which it writes under the name ``….next`` first; once all
    have, each renames its own. So there is a turn that all of them can go on from,
    whenever they are killed; one that goes on from the new file renames it first.

    Args:
        path: The file.
        ranks: The processes.

    Attributes:
        key: What a file must have in common with this measurement; to be set before
            anything is read or written.
        turn: Batches that the loaded moments went through, in each process.

    Raises:
        OutputError: The file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], ranks: Ranks) -> None:
        path = Path(path)
        if not ranks.alone:
            path = path.with_name(f"{path.name}.rank{ranks.rank}-of-{ranks.count}")
        self.path, self.key, self.turn = check_writable(path), "", 0
        self._next = path.with_name(f"{path.name}.next")
        self._ranks = ranks

    def load(self) -> FisherMoments | None:
        """Return saved moments, or None if there are none; the same turn everywhere.

        A checkpoint of another model or other settings, or a damaged one, is not used;
        a log line says so.
        """
        paths = [self.path] if self._ranks.alone else [self.path, self._next]
        saved: dict[int, tuple[Path, FisherMoments]] = {}
        for path in paths:
            if (found := self._read(path)) is not None:
                saved.setdefault(found[0], (path, found[1]))
        shared = set.intersection(*map(set, self._ranks.gather(list(saved))))
        if not shared:
            if saved and not self._ranks.alone:
                logger.warning(
                    "%s is not used: not all processes have one of the same turn",
                    self.path,
                )
            return None
        self.turn = max(shared)
        path, moments = saved[self.turn]
        with self._ranks.together():
            if path != self.path:  # or the next save would write over it
                self._next.replace(self.path)
        return moments

    def _read(self, path: Path) -> tuple[int, FisherMoments] | None:
        if not path.exists():
            return None
        try:
            moments, counts = FisherMoments.from_file(path)
        except FormatError as error:
            logger.warning("%s is damaged and not used: %s", path, error)
            return None
        if counts.get("key") != self.key:
            logger.warning("%s belongs to another measurement and is not used", path)
            return None
        return int(counts.get("turn", counts["batches"])), moments

    def save(self, moments: FisherMoments, turn: int) -> None:
        """Write what the first ``turn`` batches have given; in all processes at once.

        Raises:
            OutputError: The file cannot be written.
            DistributedError: That of another process cannot.
        """
        content = moments.to_bytes({"key": self.key, "turn": turn})
        if self._ranks.alone:
            write_atomically(self.path, content)
            return
        with self._ranks.together():
            write_atomically(self._next, content)
        with self._ranks.together():
            self._next.replace(self.path)

    def remove(self) -> None:
        """Remove the files: the work is done."""
        with self._ranks.together():
            self.path.unlink(missing_ok=True)
            if not self._ranks.alone:
                self._next.unlink(missing_ok=True)
