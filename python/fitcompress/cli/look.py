"""Commands that look: evaluate, report, inspect, versions."""

from pathlib import Path
from typing import Annotated

import typer

from fitcompress.cli.app import (
    ChannelsOption,
    DataOption,
    DatasetOption,
    JsonOption,
    ModelOption,
    WeightsOption,
    app,
    console,
    emit,
    prepare,
)
from fitcompress.cli.models import build_model, check_data, trained_model
from fitcompress.data import load_dataset
from fitcompress.errors import DataError
from fitcompress.report import report as make_report
from fitcompress.sensitivity.table import Sensitivity
from fitcompress.storage.inspection import inspect as describe
from fitcompress.storage.save_load import load
from fitcompress.train import evaluate as score
from fitcompress.versions import show_versions
from fitcompress.versions import versions as all_versions

__all__ = ["evaluate", "inspect", "report", "versions"]


@app.command()
def evaluate(
    model: ModelOption,
    dataset: DatasetOption,
    weights: Annotated[Path | None, typer.Option(help="A dense checkpoint.")] = None,
    packed: Annotated[Path | None, typer.Option(help="A packed file.")] = None,
    channels: ChannelsOption = None,
    data: DataOption = None,
    json: JsonOption = None,
) -> None:
    """Score a dense checkpoint or a packed file on the test set."""
    prepare(json)
    if (weights is None) == (packed is None):
        raise DataError("nothing to evaluate", wanted="either --weights or --packed")
    if packed is None and channels is not None:
        raise DataError("--channels is for packed files", wanted="--packed")
    if packed is not None:
        network = load(packed, build_model(model, channels))
        size = packed.stat().st_size
    else:
        assert weights is not None
        network = trained_model(model, weights)
        size = weights.stat().st_size
    source = load_dataset(dataset, data)
    check_data(network, source)
    result = score(network, source.testing())
    console.print(
        f"accuracy {result.accuracy:.2f} %, loss {result.loss:.4f} nats, "
        f"{result.samples:,} samples, {size:,} bytes"
    )
    emit(json, {"accuracy": result.accuracy, "loss": result.loss, "bytes": size})


@app.command()
def report(
    packed: Annotated[Path, typer.Argument(help="A packed file.")],
    model: ModelOption,
    weights: WeightsOption,
    dataset: DatasetOption,
    data: DataOption = None,
    sensitivity: Annotated[Path | None, typer.Option(help="Adds the front.")] = None,
    html: Annotated[Path | None, typer.Option(help="Page to write.")] = None,
    json: JsonOption = None,
) -> None:
    """Compare a packed file with the dense model it came from, before ⇒ after."""
    prepare(json, html)
    network = trained_model(model, weights)
    small = load(packed, build_model(model), trainable=True)
    table = None if sensitivity is None else Sensitivity.load(sensitivity)
    source = load_dataset(dataset, data)
    check_data(network, source)
    result = make_report(network, small, source.testing(), sensitivity=table)
    console.print(str(result))
    if html is not None:
        result.html(html)
        console.print(f"wrote {html}")
    emit(json, result.to_dict())


@app.command()
def inspect(
    packed: Annotated[Path, typer.Argument(help="A packed file.")],
    json: JsonOption = None,
) -> None:
    """Say what a packed file holds: levels, zeros, bytes and entropy of each layer."""
    prepare(json)
    found = describe(packed)
    console.print(str(found), highlight=False)
    emit(json, found.to_dict())


@app.command()
def versions(json: JsonOption = None) -> None:
    """Print what is installed, for bug reports."""
    prepare(json)
    console.print(show_versions())
    emit(json, dict(all_versions()))
