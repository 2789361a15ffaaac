"""Commands that time networks: measure-latency."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from fitcompress.cli.app import (
    JsonOption,
    ModelOption,
    OutOption,
    SeedOption,
    app,
    console,
    defaults,
    emit,
    prepare,
)
from fitcompress.cli.exports import sizes
from fitcompress.cli.models import build_model, trained_model
from fitcompress.latency.command import CommandTarget
from fitcompress.latency.measurement import measure_latency as measure_table
from fitcompress.latency.onnx_runtime import OnnxRuntimeTarget

__all__ = ["measure_latency"]

MEASURE, RUNTIME = defaults(measure_table), defaults(OnnxRuntimeTarget)


@app.command()
def measure_latency(
    model: ModelOption,
    shape: Annotated[
        str, typer.Option(help='Shape of one input, without the batch: "3,32,32".')
    ],
    weights: Annotated[
        Path | None,
        typer.Option(help="Checkpoint; without it the network stays untrained."),
    ] = None,
    out: OutOption = Path("latency.json"),
    command: Annotated[
        str | None,
        typer.Option(
            help='Instead of ONNX Runtime here: a command such as "time_it {onnx}" '
            "that prints milliseconds."
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of ONNX Runtime.")] = RUNTIME[
        "threads"
    ],
    batch: Annotated[int, typer.Option(min=1, help="Samples of one call.")] = RUNTIME[
        "batch"
    ],
    weight_bits: Annotated[
        int, typer.Option(help="Integers to store weights in: 2, 4, 8 or 16.")
    ] = MEASURE["weight_bits"],
    activation_bits: Annotated[
        int, typer.Option(help="Bits of quantized inputs, 2 to 16.")
    ] = MEASURE["activation_bits"],
    integer_sums: Annotated[
        bool, typer.Option("--integer-sums", help="Time sums of shortcuts in 8 bits.")
    ] = False,
    networks: Annotated[
        int | None,
        typer.Option(help="How many to time; default: three a layer."),
    ] = None,
    indices: Annotated[
        bool, typer.Option("--indices", help="Inputs are indices, not numbers.")
    ] = False,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Measure how fast a network is with some of its layers in integers."""
    prepare(json, out, inputs=[] if weights is None else [weights])
    target = (
        OnnxRuntimeTarget(threads=threads, batch=batch, integer_sums=integer_sums)
        if command is None
        else CommandTarget(command, batch=batch, integer_sums=integer_sums)
    )
    network = build_model(model) if weights is None else trained_model(model, weights)
    dtype = torch.int64 if indices else torch.float32
    table = measure_table(
        network.eval(),
        torch.zeros(2, *sizes(shape), dtype=dtype),
        target,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        networks=networks,
        checkpoint=out.with_name(out.name + ".partial"),
        seed=seed,
    )
    table.save(out)
    view = Table(title="Integer layers, milliseconds")
    view.add_column("layer")
    for column in ("alone", "with the next"):
        view.add_column(column, justify="right")
    pairs = [*(f"{ms:+.4f}" for ms in table.pair_ms), ""]
    for name, alone, pair in zip(table.names, table.single_ms, pairs, strict=True):
        view.add_row(name, f"{alone:+.4f}", pair)
    console.print(view)
    console.print(table.summary())
    console.print(f"wrote {out}")
    emit(json, table.to_dict())
