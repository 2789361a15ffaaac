"""The options that every script has, and how it starts."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fitcompress.files import check_writable
from harness.results import Result

__all__ = ["parser", "start"]


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
