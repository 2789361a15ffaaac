"""Progress with time left, for everything that takes longer than a second."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sized
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

__all__ = ["Bar", "track"]

T = TypeVar("T")
DELAY = 1.0  # seconds before a bar shows up
LINES = 10.0  # seconds between lines where there is no terminal


class Bar:
    """One task's progress on the standard error stream; use it as a context manager.

    On a terminal a bar with elapsed and remaining time appears after a second;
    elsewhere a line is written every ten seconds. A disabled bar only counts.

    Args:
        title: What is being done.
        total: Number of steps, or None if unknown.
        enabled: Whether to show anything.
    """

    def __init__(self, title: str, total: int | None, *, enabled: bool = True) -> None:
        self.title, self.total, self.done = title, total, 0
        self._enabled = enabled
        self._start = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._progress: Progress | None = None

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count ``steps`` more, with an optional note such as the current loss."""
        self.done += steps
        if not self._enabled:
            return
        now = time.monotonic()
        if now - self._start < DELAY:
            return
        if self._terminal:
            self._draw(note)
        elif now - self._last >= LINES:
            self._last = now
            sys.stderr.write(self._line(now, note) + "\n")
            sys.stderr.flush()

    def _line(self, now: float, note: str) -> str:
        spent = now - self._start
        text = f"{self.title}: {self.done}"
        if self.total:
            left = spent / max(self.done, 1) * max(self.total - self.done, 0)
            text += f"/{self.total}, {left:.0f} s left"
        return f"{text}{', ' + note if note else ''}"

    def _draw(self, note: str) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
                transient=True,
                # What the caller prints belongs to the standard output all the same.
                redirect_stdout=False,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                self.title, total=self.total, note=note
            )
        self._progress.update(self._task, completed=self.done, note=note)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:  # shows the cursor again
            self._progress.stop()
            self._progress = None


def track(
    items: Iterable[T], title: str, total: int | None = None, *, enabled: bool = True
) -> Iterator[T]:
    """Yield ``items`` and show how far the loop is."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Bar(title, total, enabled=enabled) as bar:
        for item in items:
            yield item
            bar.advance()
