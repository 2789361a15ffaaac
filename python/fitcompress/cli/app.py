"""The typer application and the options that commands share."""

import inspect
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from rich.console import Console

from fitcompress.errors import OptionError
from fitcompress.files import check_no_input, check_writable, write_atomically
from fitcompress.versions import __version__

__all__ = [
    "AugmentOption",
    "ChannelsOption",
    "DataOption",
    "DatasetOption",
    "JsonOption",
    "ModelOption",
    "OutOption",
    "OwnWeightsOption",
    "SeedOption",
    "SizeOption",
    "WeightsOption",
    "app",
    "console",
    "defaults",
    "emit",
    "prepare",
    "process_count",
]

SHARED = ("measure",)  # commands that several processes run together

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
        help="hf:DIR for a folder of Hugging Face, package.module:factory (called "
        "without arguments), or a built-in: digits, resnet18, resnet20, resnet56.",
    ),
]
ChannelsOption = Annotated[
    Path | None,
    typer.Option(
        "--channels",
        help="Plan of `run galen`: the packed file is of the model without some of its "
        "channels.",
    ),
]
WeightsOption = Annotated[
    Path,
    typer.Option(
        "--weights", help="Checkpoint: .safetensors, or a torch file of tensors."
    ),
]
OwnWeightsOption = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        help="Checkpoint: .safetensors, or a torch file of tensors. Default: the "
        "weights in the folder of --model hf:DIR.",
    ),
]
DatasetOption = Annotated[
    str,
    typer.Option(
        "--dataset",
        help="digits, cifar10, tsv (labelled sentences) or tokens (of a language "
        "model).",
    ),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Folder of the data set; of tsv, that of train.tsv and dev.tsv with the "
        "columns sentence and label; of tokens, a .npy file [sequences, tokens].",
        envvar="FITCOMPRESS_DATA",
    ),
]
AugmentOption = Annotated[
    bool,
    typer.Option(
        "--augment/--no-augment",
        help="Augment the training images as in training; plain ones are memorised.",
    ),
]
OutOption = Annotated[Path, typer.Option("--out", help="File to write.")]
SizeOption = Annotated[
    str | None,
    typer.Option(
        "--size", help='Bytes of the file: "5%", "40KB", "2.1bpw" or a number.'
    ),
]
SeedOption = Annotated[
    int,
    typer.Option("--seed", min=0, max=2**31 - 1, help="Seed of everything drawn."),
]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write the result as JSON to this file; - for stdout, where it is alone.",
    ),
]


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the defaults of a function's parameters, to be those of options too."""
    parameters = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def process_count() -> int:
    """Return how many processes ``torchrun`` has started this command in.

    Clusters set ``RANK`` and ``WORLD_SIZE`` for programs that have nothing to do with
    it; those do not count.

    Raises:
        OptionError: The environment does not say how many.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return 1
    text = os.environ.get("WORLD_SIZE", "")
    if not text.isdecimal() or int(text) < 1:
        raise OptionError(
            "the environment variable WORLD_SIZE is no number of processes",
            got=repr(text),
            fix="leave it to torchrun, or unset TORCHELASTIC_RUN_ID",
        )
    return int(text)


def prepare(
    json_path: Path | None, *outputs: Path | None, inputs: Iterable[Path] = ()
) -> None:
    """Get ready to write, before any work is done.

    With ``--json -`` everything for people goes to the standard error stream.

    Raises:
        OutputError: One of the files cannot be written.
        OptionError: One of them is among ``inputs``.
    """
    to_stdout = json_path is not None and str(json_path) == "-"
    console.stderr = to_stdout
    for path in (*outputs, None if to_stdout else json_path):
        if path is not None:
            check_writable(path)
            check_no_input(path, inputs)


def emit(path: Path | None, values: dict[str, Any]) -> None:
    """Write ``values`` as JSON where ``--json`` asked for it."""
    if path is None:
        return
    text = json.dumps(values, indent=1)
    if str(path) == "-":
        typer.echo(text)
    else:
        write_atomically(path, (text + "\n").encode())


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.")
    ] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    count = process_count()
    if count > 1 and context.invoked_subcommand not in SHARED:
        raise OptionError(
            "this command runs in one process",
            got=f"{count} of them",
            wanted=f"torchrun for {', '.join(SHARED)} only",
            fix="run it without torchrun",
        )
