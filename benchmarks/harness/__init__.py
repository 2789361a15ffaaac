"""What every benchmark script shares: interleaved timing, bars, tables, result files.

A script measures candidates against each other *in one process and in turns*, judges
the numbers by bars, and writes one JSON file. It exits with 0 even if a bar fails: that
is a result. ``docs/benchmarking.md`` says how to read the numbers.
"""

from harness.options import parser, start
from harness.results import Bar, Result, command_line
from harness.timing import (
    Comparison,
    Missing,
    Spread,
    Stopwatch,
    Timing,
    compare,
    peer,
    stopwatch,
)

__all__ = [
    "Bar",
    "Comparison",
    "Missing",
    "Result",
    "Spread",
    "Stopwatch",
    "Timing",
    "command_line",
    "compare",
    "parser",
    "peer",
    "start",
    "stopwatch",
]
