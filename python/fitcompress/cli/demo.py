"""The command ``fitcompress demo``."""

from pathlib import Path
from typing import Annotated

import typer

from fitcompress.cli.app import (
    JsonOption,
    SeedOption,
    app,
    console,
    defaults,
    emit,
    prepare,
)
from fitcompress.demo import run_demo

__all__ = ["demo"]

DEMO = defaults(run_demo)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for its files.")] = Path(
        "fitcompress-demo"
    ),
    size: Annotated[str, typer.Option("--size", help="The budget.")] = DEMO["size"],
    seed: SeedOption = DEMO["seed"],
    json: JsonOption = None,
) -> None:
    """Train a digits network, compress it to a few per cent, show what happened."""
    prepare(json)
    result = run_demo(out, size=size, seed=seed, say=console.print)
    console.print()
    console.print(str(result.report))
    console.print(
        f"{result.values['seconds']:.0f} s; open {result.page} for the figures"
    )
    emit(json, result.values)
