"""Candidates measured against each other in one process and in turns."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.memory import peak_rise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "Comparison",
    "Missing",
    "Spread",
    "Stopwatch",
    "Timing",
    "compare",
    "peer",
    "stopwatch",
]


@dataclass(frozen=True)
class Spread:
    """Order statistics of one quantity over the repeats.

    Attributes:
        median: What is reported and judged.
        minimum: The least disturbed repeat.
        q1: First quartile.
        q3: Third quartile.
        maximum: The most disturbed repeat.
    """

    median: float
    minimum: float
    q1: float
    q3: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the statistics of at least one value."""
        if len(values) == 1:
            return cls(*[float(values[0])] * 5)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, min(values), q1, q3, max(values))


@dataclass(frozen=True)
class Timing:
    """One candidate's repeats, in the order in which they ran; seconds per call.

    Attributes:
        cpu_seconds: Processor time of the process, all threads together.
        wall_seconds: Elapsed time.
        calls: Calls per repeat, so that a repeat is long enough for the clocks.
        peak_bytes: How far the resident memory of the process rose during the first
            call; None where this cannot be told (see :func:`peak_rise`).
    """

    cpu_seconds: tuple[float, ...]
    wall_seconds: tuple[float, ...]
    calls: int
    peak_bytes: int | None

    @property
    def cpu(self) -> Spread:
        """Spread of the processor time."""
        return Spread.of(self.cpu_seconds)

    @property
    def wall(self) -> Spread:
        """Spread of the elapsed time."""
        return Spread.of(self.wall_seconds)

    def cells(self) -> dict[str, Any]:
        """Return the columns of a result row."""
        cpu = self.cpu
        return {
            "cpu_s": cpu.median,
            "cpu_min_s": cpu.minimum,
            "cpu_q1_s": cpu.q1,
            "cpu_q3_s": cpu.q3,
            "cpu_max_s": cpu.maximum,
            "wall_s": self.wall.median,
            "peak_mb": None if self.peak_bytes is None else self.peak_bytes / 1e6,
        }


@dataclass(frozen=True)
class Missing:
    """A candidate that is not installed here.

    Attributes:
        reason: Why, for the list of what was skipped.
    """

    reason: str


@dataclass(frozen=True)
class Comparison:
    """The candidates of one :func:`compare`.

    Attributes:
        timings: Name → repeats, of everything that ran.
        skipped: Name → reason.
    """

    timings: dict[str, Timing]
    skipped: dict[str, str]

    def ratio(self, of: str, to: str) -> Spread:
        """Return the spread of CPU time of ``of`` over that of ``to``, turn by turn.

        Both ran in the same turn, so that what slows the machine down for a while slows
        down both and cancels.
        """
        pairs = zip(
            self.timings[of].cpu_seconds, self.timings[to].cpu_seconds, strict=True
        )
        return Spread.of([a / max(b, 1e-12) for a, b in pairs])


@dataclass
class Stopwatch:
    """Elapsed and processor seconds of a block; see :func:`stopwatch`."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0


@contextlib.contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Time a block that is too long to repeat."""
    watch = Stopwatch()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield watch
    finally:
        watch.wall_seconds = time.perf_counter() - wall
        watch.cpu_seconds = time.process_time() - cpu


def peer(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any] | Missing:
    """Return the candidate that ``make`` builds, or that it is missing.

    Args:
        make: Imports the peer and returns what is to be timed.
    """
    try:
        return make()
    except ImportError as error:
        return Missing(str(error))


def compare(
    candidates: dict[str, Callable[[], Any] | Missing],
    repeats: int = 9,
    *,
    shortest: float = 0.01,
    clock: Callable[[], tuple[float, float]] | None = None,
) -> Comparison:
    """Time candidates in turns: A B C, then B C A, then C A B.

    Each is called once beforehand, which warms it up and shows its memory. Short ones
    are called several times per repeat, until it takes ``shortest``. Garbage is
    collected between repeats and not during them.

    Args:
        candidates: Name → function to be timed, without arguments, or ``Missing``.
        repeats: Turns.
        shortest: Seconds that one repeat should take at least.
        clock: () → (processor seconds, elapsed seconds); for tests.

    Returns:
        Timings of what ran, and names of what did not.

    Raises:
        ValueError: There are no repeats.
    """
    if repeats < 1:
        message = f"repeats must be at least 1; got {repeats}"
        raise ValueError(message)
    clock = clock or (lambda: (time.process_time(), time.perf_counter()))
    skipped = {n: c.reason for n, c in candidates.items() if isinstance(c, Missing)}
    present = {n: c for n, c in candidates.items() if not isinstance(c, Missing)}
    peaks = {name: peak_rise(run) for name, run in present.items()}
    calls = {name: _calls(run, shortest, clock) for name, run in present.items()}
    cpu: dict[str, list[float]] = {name: [] for name in present}
    wall: dict[str, list[float]] = {name: [] for name in present}
    names = list(present)
    collecting = gc.isenabled()
    try:
        for turn in range(repeats):
            first = turn % len(names) if names else 0
            for name in names[first:] + names[:first]:
                gc.collect()
                gc.disable()
                spent = _spent(present[name], calls[name], clock)
                cpu[name].append(spent[0] / calls[name])
                wall[name].append(spent[1] / calls[name])
    finally:
        if collecting:
            gc.enable()
    timings = {
        n: Timing(tuple(cpu[n]), tuple(wall[n]), calls[n], peaks[n]) for n in present
    }
    return Comparison(timings, skipped)


def _spent(
    run: Callable[[], Any], calls: int, clock: Callable[[], tuple[float, float]]
) -> tuple[float, float]:
    cpu, wall = clock()
    for _ in range(calls):
        run()
    cpu_end, wall_end = clock()
    return cpu_end - cpu, wall_end - wall


def _calls(
    run: Callable[[], Any], shortest: float, clock: Callable[[], tuple[float, float]]
) -> int:
    """Return how many calls last about ``shortest`` seconds."""
    once = max(_spent(run, 1, clock)[1], 1e-9)
    if once >= shortest:
        return 1
    some = min(max(int(shortest / once / 4), 1), 100_000)
    mean = max(_spent(run, some, clock)[1] / some, 1e-9)
    return min(max(math.ceil(shortest / mean), 1), 1_000_000)
