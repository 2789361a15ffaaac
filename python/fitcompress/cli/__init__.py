"""The command line: ``fitcompress COMMAND``."""

from fitcompress.cli.main import main

__all__ = ["main"]
