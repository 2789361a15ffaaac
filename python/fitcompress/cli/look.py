"""Commands that look: evaluate, report, inspect, versions."""

import math
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from fitcompress.cli.app import (
    ChannelsOption,
    DataOption,
    DatasetOption,
    JsonOption,
    ModelOption,
    OwnWeightsOption,
    app,
    console,
    emit,
    prepare,
)
from fitcompress.cli.models import (
    TOKENS,
    build_model,
    fitting_data,
    model_folder,
    trained_model,
)
from fitcompress.errors import DataError
from fitcompress.model.costs import dense_bytes
from fitcompress.report import report as make_report
from fitcompress.sensitivity.table import Sensitivity
from fitcompress.storage.inspection import inspect as describe
from fitcompress.storage.save_load import load
from fitcompress.train import divergence
from fitcompress.train import evaluate as score
from fitcompress.versions import show_versions
from fitcompress.versions import versions as all_versions

__all__ = ["evaluate", "inspect", "report", "versions"]


@app.command()
def evaluate(
    model: ModelOption,
    dataset: DatasetOption,
    weights: OwnWeightsOption = None,
    packed: Annotated[Path | None, typer.Option(help="A packed file.")] = None,
    channels: ChannelsOption = None,
    data: DataOption = None,
    json: JsonOption = None,
) -> None:
    """Score a dense checkpoint or a packed file on the test set.

    A packed file is compared with the dense model too, if its weights are known: those
    in hf:DIR, or --weights.
    """
    prepare(json)
    known = weights is not None or model_folder(model) is not None
    if packed is None and not known:
        raise DataError("nothing to evaluate", wanted="either --weights or --packed")
    if packed is None and channels is not None:
        raise DataError("--channels is for packed files", wanted="--packed")
    dense = trained_model(model, weights) if known else None
    network = dense if packed is None else load(packed, build_model(model, channels))
    assert network is not None
    source = fitting_data(model, network, dataset, data)
    result = score(network, source.testing())
    size = _bytes_of(weights, network) if packed is None else packed.stat().st_size
    values = {"accuracy": result.accuracy, "loss": result.loss, "bytes": size}
    text = f"accuracy {result.accuracy:.2f} %, loss {result.loss:.4f} nats"
    if dataset == TOKENS:
        values["perplexity"] = math.exp(result.loss)
        text += f" per token, perplexity {values['perplexity']:.3f}"
    if packed is not None and dense is not None:
        values["divergence"] = divergence(
            dense, network, source.testing(), progress=True
        )
        text += f", KL from the dense model {values['divergence']:.4g} nats"
    console.print(f"{text}, {result.samples:,} samples, {size:,} bytes")
    emit(json, values)


def _bytes_of(weights: Path | None, network: nn.Module) -> int:
    return dense_bytes(network) if weights is None else weights.stat().st_size


@app.command()
def report(
    packed: Annotated[Path, typer.Argument(help="A packed file.")],
    model: ModelOption,
    dataset: DatasetOption,
    weights: OwnWeightsOption = None,
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
    source = fitting_data(model, network, dataset, data)
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
