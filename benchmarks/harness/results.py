"""What a script found: bars, the result file, and the machine it ran on."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fitcompress import ops
from fitcompress.files import write_atomically
from fitcompress.versions import versions
from harness.tables import table

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Bar", "Result", "command_line"]

Direction = Literal["at most", "at least"]


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
