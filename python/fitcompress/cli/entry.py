"""Entry point: commands, and errors as one line with an exit code."""

import logging
import os
import sys
import warnings
from typing import NoReturn, TextIO

from rich.console import Console

from fitcompress.cli.app import app

# Imported for the commands that they register.
from fitcompress.cli import demo, exports, latencies, look, plans, weights  # noqa: F401  isort: skip
from fitcompress.cli import bit_sharing, blocks, galen, pruning_ternary  # noqa: F401  isort: skip
from fitcompress.errors import DistributedError, FitcompressError

__all__ = ["main"]

FAILED, INTERRUPTED = 1, 130


def main() -> None:
    """Run the command line.

    Exit codes: 0 done; 1 a typed error or a file that cannot be read, told in one line
    on the standard error stream; 2 wrong usage; 130 interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.showwarning = _warn
    try:
        app(standalone_mode=True)
    except FitcompressError as error:
        if isinstance(error, DistributedError) and os.environ.get("RANK", "0") != "0":
            sys.exit(FAILED)  # the first process says so
        _fail(type(error).__name__, str(error), FAILED)
    except OSError as error:
        known = error.filename is not None and error.strerror
        text = f"{error.filename}: {error.strerror}" if known else str(error)
        _fail("cannot read or write", text or type(error).__name__, FAILED)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as stop:  # typer turns an interruption into one
        if stop.code == INTERRUPTED:
            _interrupted()
        raise


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as log lines are shown, without the line of code behind it."""
    logging.getLogger(category.__name__).warning("%s", message)


def _interrupted() -> NoReturn:
    text = "what was saved is kept; run the same command to go on"
    _fail("interrupted", text, INTERRUPTED)


def _fail(kind: str, message: str, code: int) -> NoReturn:
    line = " ".join(f"{kind}: {message}".split())
    console = Console(stderr=True, highlight=False)
    console.print(line, style="bold red", markup=False, soft_wrap=True)
    sys.exit(code)
