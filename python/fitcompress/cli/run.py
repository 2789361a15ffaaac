"""The group of commands ``fitcompress run METHOD``: methods that train."""

import typer

from fitcompress.cli.app import app

__all__ = ["run_app"]

run_app = typer.Typer(
    help="Compress by a method that trains, and write the packed file.",
    no_args_is_help=True,
)
app.add_typer(run_app, name="run")
