"""The command line: ``fitcompress COMMAND``."""

from fitcompress.cli.entry import main

__all__ = ["main"]
