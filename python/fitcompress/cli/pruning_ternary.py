"""The command ``fitcompress run pruning-ternary``."""

import time
from pathlib import Path
from typing import Annotated

import torch.nn.functional as F
import typer

from fitcompress.cli.app import (
    DataOption,
    DatasetOption,
    JsonOption,
    ModelOption,
    OutOption,
    SeedOption,
    WeightsOption,
    console,
    defaults,
    emit,
    prepare,
)
from fitcompress.cli.models import check_data, trained_model
from fitcompress.cli.run import run_app
from fitcompress.data import Dataset, load_dataset
from fitcompress.methods import PruningTernary
from fitcompress.model.costs import dense_bytes
from fitcompress.quantize import plan_of
from fitcompress.storage.save_load import save
from fitcompress.train import evaluate

__all__ = ["pruning_ternary"]

USUAL = PruningTernary()
LOADER = defaults(Dataset.training)


@run_app.command("pruning-ternary")
def pruning_ternary(
    model: ModelOption,
    weights: WeightsOption,
    dataset: DatasetOption,
    out: OutOption = Path("ternary.safetensors"),
    data: DataOption = None,
    zeros: Annotated[
        float, typer.Option(help="Share of weights that end as zero.")
    ] = USUAL.zeros,
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the training data.")
    ] = USUAL.epochs,
    lr: Annotated[
        float, typer.Option(help="Peak learning rate, for filters of length 1.")
    ] = USUAL.learning_rate,
    weight_decay: Annotated[
        float, typer.Option(help="Of the latent weights.")
    ] = USUAL.weight_decay,
    hysteresis: Annotated[
        float, typer.Option(help="How far above δ weights come back, relative to it.")
    ] = USUAL.hysteresis,
    first_and_last: Annotated[
        int,
        typer.Option(
            min=0, max=8, help="Bits of the first and last layer; 0: ternary too."
        ),
    ] = USUAL.first_and_last or 0,
    labels: Annotated[
        bool, typer.Option("--labels/--no-labels", help="Train for the labels as well.")
    ] = False,
    teacher: Annotated[
        bool,
        typer.Option(
            "--teacher/--no-teacher", help="Train for the dense model's outputs."
        ),
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step.")] = LOADER[
        "batch_size"
    ],
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Train weights −1, 0, 1 with a scale per filter, most of them zero."""
    prepare(json, out, inputs=(weights,))
    start = time.monotonic()
    method = PruningTernary(
        zeros=zeros,
        epochs=epochs,
        learning_rate=lr,
        weight_decay=weight_decay,
        hysteresis=hysteresis,
        first_and_last=first_and_last or None,
    )
    network = trained_model(model, weights)
    source = load_dataset(dataset, data)
    check_data(network, source)
    small = method.run(
        network,
        source.training(batch_size, seed),
        F.cross_entropy if labels else None,
        teacher=teacher,
        checkpoint=out.with_name(out.name + ".partial"),
        seed=seed,
    )
    size, dense, plan = save(small, out), dense_bytes(network), plan_of(small)
    scores = [evaluate(each, source.validating()).accuracy for each in (network, small)]
    seconds = time.monotonic() - start
    unpacked = plan.details["two_bit_bytes"]
    console.print(
        f"{dense:,} ⇒ {size:,} bytes ({100 * size / dense:.2f} %), {seconds:.1f} s; "
        f"{unpacked:,} bytes without entropy coding"
    )
    console.print(f"validation accuracy {scores[0]:.2f} ⇒ {scores[1]:.2f} %")
    console.print(f"wrote {out}")
    emit(
        json,
        {
            "bytes_before": dense,
            "bytes_after": size,
            "two_bit_bytes": unpacked,
            "accuracy_before": scores[0],
            "accuracy_after": scores[1],
            "zeros": {name: level.sparsity for name, level in plan.levels.items()},
            "cosine": plan.details["cosine"],
            "cosine_dense": plan.details["cosine_dense"],
            "seconds": seconds,
        },
    )
