"""The command ``fitcompress run bit-sharing``."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

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
from fitcompress.methods import BitSharing
from fitcompress.model.costs import dense_bytes
from fitcompress.search import Budget, Plan
from fitcompress.storage.save_load import save

__all__ = ["bit_sharing"]

BITS = defaults(BitSharing)
LOADER = defaults(Dataset.training)


def _ladder(text: str) -> tuple[int, ...]:
    """Return the bits in a text like "2,4,8"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 3 for part in parts):
        message = f"wanted whole numbers with commas between them, got {text[:50]!r}"
        raise typer.BadParameter(message)
    return tuple(int(part) for part in parts)


def _groups(texts: list[str]) -> dict[str, int]:
    """Return the groups in texts like "layer*.conv1=4"."""
    found = {}
    for text in texts:
        pattern, _, size = text.rpartition("=")
        if not pattern or not size.isdecimal() or len(size) > 6:
            message = f"wanted a pattern of layers and a number: {text[:50]!r}"
            raise typer.BadParameter(message)
        found[pattern] = int(size)
    return found


@run_app.command("bit-sharing")
def bit_sharing(
    model: ModelOption,
    weights: WeightsOption,
    dataset: DatasetOption,
    bops: Annotated[str, typer.Option(help='Bit operations: "5%" or a number.')],
    out: OutOption = Path("small.safetensors"),
    plan: Annotated[Path, typer.Option("--plan", help="Plan file to write.")] = Path(
        "plan.json"
    ),
    data: DataOption = None,
    ladder: Annotated[
        str, typer.Option(help="Bits to choose from, each divides the next.")
    ] = ",".join(map(str, BITS["ladder"])),
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the training data.")
    ] = BITS["epochs"],
    prune: Annotated[
        list[str] | None,
        typer.Option(
            help='Layers that may lose filters, and how many at once: "layer*.conv1=4".'
        ),
    ] = None,
    max_pruned: Annotated[
        float, typer.Option(help="Largest share of a layer's filters to lose.")
    ] = BITS["max_pruned"],
    lr: Annotated[float, typer.Option(help="Learning rate of weights.")] = BITS[
        "learning_rate"
    ],
    threshold_rate: Annotated[
        float, typer.Option(help="Learning rate of thresholds.")
    ] = BITS["threshold_rate"],
    labels: Annotated[
        bool,
        typer.Option(
            "--labels/--no-labels",
            help="Learn from labels, or from the float network's outputs.",
        ),
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step.")] = LOADER[
        "batch_size"
    ],
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Learn bits of weights and inputs, and filters, under a bound on bit operations.

    Writes the plan, and the packed file of the network that was trained along.
    """
    prepare(json, out, plan, inputs=[weights])
    if out.resolve() == plan.resolve():
        message = "--plan and --out are the same file"
        raise typer.BadParameter(message)
    start = time.monotonic()
    method = BitSharing(
        ladder=_ladder(ladder),
        epochs=epochs,
        prune_groups=_groups(prune or []),
        max_pruned=max_pruned,
        learning_rate=lr,
        threshold_rate=threshold_rate,
    )
    budget = Budget(bops=bops)
    network = trained_model(model, weights)
    source = load_dataset(dataset, data)
    check_data(network, source)
    found, small = method.run(
        network,
        source.training(batch_size, seed),
        budget,
        checkpoint=out.with_name(out.name + ".partial"),
        seed=seed,
        labels=labels,
    )
    found.save(plan)
    size, dense = save(small, out), dense_bytes(network)
    console.print(_table(found))
    console.print(found.summary())
    console.print(f"{dense:,} ⇒ {size:,} bytes ({100 * size / dense:.2f} %)")
    console.print(f"wrote {plan} and {out}")
    values: dict[str, Any] = {
        "bops": found.bops,
        "bops_limit": found.details["bops_limit"],
        "bytes_before": dense,
        "bytes_after": size,
        "moved_at_the_end": found.details["moved_at_the_end"],
        "seconds": time.monotonic() - start,
    }
    emit(json, values)


def _table(plan: Plan) -> Table:
    kept = plan.details["kept_filters"]
    view = Table(title="Bits")
    view.add_column("layer")
    for column in ("weight", "input", "filters", "BOPs"):
        view.add_column(column, justify="right")
    for name, level in plan.levels.items():
        inputs = "float" if level.activation_bits is None else level.activation_bits
        filters = len(kept[name]) if name in kept else "all"
        view.add_row(
            name, str(level.grid.bits), str(inputs), str(filters), f"{level.bops:.3g}"
        )
    return view
