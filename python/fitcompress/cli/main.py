"""Entry point: commands, and errors as one line with an exit code."""

import logging
import sys

from rich.console import Console

from fitcompress.cli.app import app

# Imported for the commands that they register.
from fitcompress.cli import demo, look, plans, weights  # noqa: F401  isort: skip
from fitcompress.errors import FitcompressError

__all__ = ["main"]


def main() -> None:
    """Run the command line.

    Exit codes: 0 done; 1 a typed error, told on the standard error stream; 2 wrong usage;
    130 interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app(standalone_mode=True)
    except FitcompressError as error:
        _fail(type(error).__name__, str(error), 1)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        _fail("cannot read", f"{error.filename}: {error.strerror}", 1)
    except KeyboardInterrupt:
        _fail("interrupted", "what was saved is kept; run the same command to go on", 130)


def _fail(kind: str, message: str, code: int) -> None:
    console = Console(stderr=True)
    console.print(f"{kind}: {message}", style="bold red", markup=False, soft_wrap=True)
    sys.exit(code)
