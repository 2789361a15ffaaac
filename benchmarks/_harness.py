"""What every benchmark script shares: interleaved timing, bars, tables, result files.

A script measures candidates against each other *in one process and in turns*, judges
the numbers by bars, and writes one JSON file. It exits with 0 even if a bar fails: that
is a result. ``docs/benchmarking.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import resource
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fitcompress import ops
from fitcompress.files import check_writable, write_atomically
from fitcompress.versions import versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "Bar",
    "Comparison",
    "Missing",
    "Result",
    "Spread",
    "Stopwatch",
    "Timing",
    "compare",
    "parser",
    "peer",
    "start",
    "stopwatch",
]

Direction = Literal["at most", "at least"]


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
            call; None where this cannot be told (see :func:`_peak_rise`).
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
    peaks = {name: _peak_rise(run) for name, run in present.items()}
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


def _peak_rise(run: Callable[[], Any]) -> int | None:
    """Call ``run`` and return how far resident memory rose above what it was before.

    The operating system's high-water mark of the process (``ru_maxrss``): it counts
    every page that was touched, torch's and the kernels' included, which
    ``tracemalloc`` would not see. Memory that the allocator had kept from earlier calls
    is not counted again, so it is a lower bound of what the call uses. On Linux the
    mark is set back before the call; elsewhere it only ever rises, and None is returned
    unless this call raised it.
    """
    gc.collect()
    fresh = _forget_peak()
    before = _peak_bytes()
    run()
    rise = _peak_bytes() - before
    return rise if fresh or rise > 0 else None


def _forget_peak() -> bool:
    """Set the high-water mark back to what is resident now; whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes


@dataclass(frozen=True)
class Bar:
    """A measured number and what it has to reach.

    Attributes:
        name: What is judged, unit included.
        value: What was measured.
        limit: The bar.
        direction: Which side of it is good.
    """

    name: str
    value: float
    limit: float
    direction: Direction = "at most"

    @property
    def holds(self) -> bool:
        """Whether the value is on the good side; a NaN never is."""
        if self.direction == "at most":
            return self.value <= self.limit
        return self.value >= self.limit

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        wanted = f"{self.direction} {self.limit:.6g}"
        return f"{verdict}  {self.name}: {self.value:.6g}, {wanted}"


@dataclass
class Result:
    """What a script found: rows, bars, what was skipped, and on what machine.

    Attributes:
        path: Where to write it as JSON after every change, or None.
        rows: One dict per line of the table, losing cells included.
        bars: What the rows are judged by.
        skipped: What did not run, by name, and why.
        machine: Versions, processor, threads, load when it started.
        command: How the script was called.
    """

    path: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=lambda: _machine())
    command: str = field(default_factory=lambda: command_line(sys.argv))
    finished: bool = False

    def row(self, **cells: Any) -> None:
        """Add a line to the table."""
        self.rows.append(cells)
        self.write()

    def bar(
        self, name: str, value: float, limit: float, direction: Direction = "at most"
    ) -> None:
        """Judge a number."""
        self.bars.append(Bar(name, float(value), float(limit), direction))
        self.write()

    def skip(self, name: str, reason: str) -> None:
        """Tell that something did not run."""
        self.skipped[name] = reason
        self.write()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {
            "rows": self.rows,
            "bars": [{**asdict(bar), "holds": bar.holds} for bar in self.bars],
            "skipped": self.skipped,
            "machine": self.machine,
            "command": self.command,
            "finished": self.finished,
        }

    def write(self) -> None:
        """Write the JSON file, whole or not at all; a killed script leaves the rest."""
        if self.path is not None:
            text = json.dumps(_finite(self.to_dict()), indent=1)
            write_atomically(self.path, text.encode() + b"\n")

    def finish(self) -> None:
        """Write the file a last time and print table, bars and what was skipped."""
        self.finished = True
        self.write()
        print(self)

    def __str__(self) -> str:
        lines = [table(self.rows), *map(str, self.bars)]
        lines += [f"skipped  {name}: {reason}" for name, reason in self.skipped.items()]
        failing = [bar.name for bar in self.bars if not bar.holds]
        if failing:
            lines.append(f"{len(failing)} of {len(self.bars)} bars fail")
        elif self.bars:
            lines.append(f"all {len(self.bars)} bars hold")
        return "\n".join(line for line in lines if line)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as aligned text, with a column for every key that any of them has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    left = [all(isinstance(row.get(c, ""), str) for row in rows) for c in columns]
    return "\n".join(
        "  ".join(
            text.ljust(width) if is_left else text.rjust(width)
            for text, width, is_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    """Replace what JSON cannot hold, NaN and infinities, by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def command_line(arguments: Sequence[str]) -> str:
    """Return how a script was called: what ran, not where its files lie.

    Absolute paths, also those after ``=``, are shortened to their last part.
    """

    def short(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        return (
            option + equals + (Path(value).name if Path(value).is_absolute() else value)
        )

    return shlex.join(["python", *map(short, arguments)])


def _machine() -> dict[str, str]:
    found = versions() | {"instruction set": ops.instruction_set()}
    if hasattr(os, "sched_getaffinity"):
        found["usable cores"] = str(len(os.sched_getaffinity(0)))
    found["load average"] = f"{os.getloadavg()[0]:.2f}"
    return found


def parser(description: str, *, threads: int | None = 1) -> argparse.ArgumentParser:
    """Return an argument parser with the options that every script has.

    Args:
        description: The script's docstring; its first line is shown.
        threads: Default of ``--threads``; None leaves torch's own number.
    """
    made = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    made.add_argument("--quick", action="store_true", help="a short run, to try it out")
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result there"
    )
    made.add_argument(
        "--threads",
        type=_positive,
        default=threads,
        metavar="N",
        help=f"torch threads (default: {threads or 'as many as torch takes'})",
    )
    return made


def start(arguments: argparse.Namespace) -> Result:
    """Set the number of threads and return an empty result.

    Raises:
        OutputError: The result file cannot be written; told before work is spent.
    """
    if arguments.json is not None:
        check_writable(arguments.json)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return Result(arguments.json)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        message = f"wanted at least 1, got {value}"
        raise argparse.ArgumentTypeError(message)
    return value
