"""Commands that write files for other runtimes: export."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from fitcompress.cli.app import (
    ChannelsOption,
    DataOption,
    JsonOption,
    ModelOption,
    app,
    console,
    defaults,
    emit,
    prepare,
)
from fitcompress.cli.models import build_model, fitting_data
from fitcompress.errors import OptionError
from fitcompress.export import export_onnx

__all__ = ["export", "sizes"]

EXPORT = defaults(export_onnx)


@app.command()
def export(
    packed: Annotated[Path, typer.Argument(help="A packed file.")],
    model: ModelOption,
    shape: Annotated[
        str, typer.Option(help='Shape of one input, without the batch: "3,32,32".')
    ],
    channels: ChannelsOption = None,
    onnx: Annotated[Path, typer.Option("--onnx", help="ONNX file to write.")] = Path(
        "small.onnx"
    ),
    indices: Annotated[
        bool, typer.Option("--indices", help="Inputs are indices, not numbers.")
    ] = False,
    opset: Annotated[
        int, typer.Option(help="Version of the operator set, 18 to 25.")
    ] = EXPORT["opset"],
    min_bits: Annotated[
        int, typer.Option(help="No narrower integers than these: 2, 4, 8 or 16.")
    ] = EXPORT["min_bits"],
    channel_multiple: Annotated[
        int, typer.Option(help="Remove idle channels down to a multiple of this.")
    ] = EXPORT["channel_multiple"],
    fold_weights: Annotated[
        bool,
        typer.Option(
            "--fold-weights", help="Float weights in layers whose inputs are in float."
        ),
    ] = False,
    integer_sums: Annotated[
        str | None,
        typer.Option(
            help="Round sums of shortcuts to 8 bits, their ranges measured on this "
            "data set: digits or cifar10."
        ),
    ] = None,
    data: DataOption = None,
    json: JsonOption = None,
) -> None:
    """Write a packed file as ONNX, with integer weights, for other runtimes."""
    prepare(json, onnx, inputs=[packed])
    dtype = torch.int64 if indices else torch.float32
    network, loader = build_model(model, channels), None
    if integer_sums is not None:
        loader = fitting_data(model, network, integer_sums, data).calibration(0)
    result = export_onnx(
        network,
        onnx,
        torch.zeros(2, *sizes(shape), dtype=dtype),
        packed=packed,
        opset=opset,
        min_bits=min_bits,
        channel_multiple=channel_multiple,
        fold_weights=fold_weights,
        integer_sums=loader,
    )
    console.print(str(result))
    console.print(f"wrote {onnx}")
    values = {"bytes_packed": packed.stat().st_size} | result.to_dict()
    emit(json, values)


def sizes(text: str) -> list[int]:
    """Return the sizes in a text like "3,32,32".

    Raises:
        OptionError: There are none, or not only positive ones.
    """
    parts = text.replace("x", ",").split(",")
    plain = all(p.strip().isascii() and p.strip().isdigit() for p in parts)
    sizes = [int(p) for p in parts if len(p) < 10] if plain else []
    if len(sizes) != len(parts) or not all(sizes):
        raise OptionError(
            "this is no shape of an input",
            got=f"--shape {text}",
            wanted='sizes with commas between them: "3,32,32"',
        )
    return sizes
