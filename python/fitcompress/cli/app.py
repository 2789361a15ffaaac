"""The typer application and the options that commands share."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fitcompress.files import check_writable, write_atomically
from fitcompress.versions import __version__

__all__ = [
    "DataOption",
    "DatasetOption",
    "JsonOption",
    "ModelOption",
    "OutOption",
    "SeedOption",
    "SizeOption",
    "WeightsOption",
    "app",
    "check_json",
    "console",
    "emit",
]

app = typer.Typer(
    name="fitcompress",
    help="Compress a trained PyTorch network under a budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console(soft_wrap=True, markup=False, highlight=False)

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="package.module:factory (called without arguments), or a built-in: "
        "digits, resnet20, resnet56.",
    ),
]
WeightsOption = Annotated[
    Path,
    typer.Option("--weights", help="Checkpoint: .safetensors, or a torch file of tensors."),
]
DatasetOption = Annotated[str, typer.Option("--dataset", help="digits or cifar10.")]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of the data set.", envvar="FITCOMPRESS_DATA"),
]
OutOption = Annotated[Path, typer.Option("--out", help="File to write.")]
SizeOption = Annotated[
    str | None,
    typer.Option("--size", help='Bytes of the file: "5%", "40KB", "2.1bpw" or a number.'),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything drawn.")]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result as JSON to this file; - for stdout."),
]


def check_json(path: Path | None) -> None:
    """Raise early if the JSON file cannot be written."""
    if path is not None and str(path) != "-":
        check_writable(path)


def emit(path: Path | None, values: dict[str, Any]) -> None:
    """Write ``values`` as JSON where ``--json`` asked for it."""
    if path is None:
        return
    text = json.dumps(values, indent=1)
    if str(path) == "-":
        typer.echo(text)
    else:
        write_atomically(path, (text + os.linesep).encode())


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
