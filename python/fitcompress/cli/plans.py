"""Commands up to a plan: measure, search, pareto."""

from enum import Enum
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.table import Table

from fitcompress.cli.app import (
    AugmentOption,
    DataOption,
    DatasetOption,
    JsonOption,
    ModelOption,
    OutOption,
    OwnWeightsOption,
    SeedOption,
    SizeOption,
    app,
    console,
    defaults,
    emit,
    prepare,
)
from fitcompress.cli.models import fitting_data, model_folder, trained_model
from fitcompress.cli.processes import joined
from fitcompress.latency.table import LatencyTable
from fitcompress.methods import Greedy, Lagrangian, Optimal, PathSearch, Uniform
from fitcompress.model.fused_groups import groups_of_names
from fitcompress.refinement import Refinement
from fitcompress.search import Budget
from fitcompress.search import pareto as make_front
from fitcompress.search import search as find_plan
from fitcompress.search.problem import Family
from fitcompress.search.selection import Method
from fitcompress.sensitivity.measurement import measure as measure_sensitivity
from fitcompress.sensitivity.shards import Shards
from fitcompress.sensitivity.streaming import measure_shards
from fitcompress.sensitivity.table import Sensitivity

__all__ = ["MethodName", "make_method", "measure", "pareto", "search"]

MEASURE = defaults(measure_sensitivity)
MODEL, DATASET = (get_args(option)[1] for option in (ModelOption, DatasetOption))

SensitivityArgument = Annotated[Path, typer.Argument(help="What `measure` wrote.")]


class MethodName(str, Enum):
    """Search methods by name."""

    optimal = "optimal"
    lagrangian = "lagrangian"
    path = "path"
    greedy_path = "greedy-path"
    greedy = "greedy"
    uniform = "uniform"


METHODS: dict[MethodName, Method] = {
    MethodName.optimal: Optimal(),
    MethodName.lagrangian: Lagrangian(),
    MethodName.path: PathSearch(mode="beam"),
    MethodName.greedy_path: PathSearch(mode="greedy"),
    MethodName.greedy: Greedy(),
    MethodName.uniform: Uniform(),
}


GROUPING = (MethodName.optimal, MethodName.greedy, MethodName.uniform)
FusedOption = Annotated[
    bool | None,
    typer.Option(
        "--fused/--no-fused",
        help="One level for layers that runtimes compute as one, such as queries, keys "
        "and values. Default: yes, where method and bound know groups.",
    ),
]


class FamilyName(str, Enum):
    """Grid families by name."""

    step = "step"
    bits = "bits"
    any = "any"


FAMILIES: dict[FamilyName, Family] = {
    FamilyName.step: "step",
    FamilyName.bits: "bits",
    FamilyName.any: "any",
}
FamilyOption = Annotated[
    FamilyName | None,
    typer.Option("--grids", help="Default: step for a size, bits for BOPs."),
]


def make_method(name: MethodName) -> Method:
    """Return the method object of a name."""
    return METHODS[name]


def _family(name: FamilyName | None) -> Family | None:
    return None if name is None else FAMILIES[name]


def _numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list with commas."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and len(part) < 3 for part in parts):
        message = f"wanted whole numbers with commas between them, got {text[:50]!r}"
        raise typer.BadParameter(message)
    return tuple(int(part) for part in parts)


@app.command()
def measure(
    context: typer.Context,
    model: Annotated[str | None, MODEL] = None,
    weights: OwnWeightsOption = None,
    dataset: Annotated[str | None, DATASET] = None,
    shards: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a model: .safetensors file, folder or index, one layer at "
            "a time in memory; distortion is half the squared error."
        ),
    ] = None,
    out: OutOption = Path("sensitivity.safetensors"),
    data: DataOption = None,
    samples: Annotated[
        int, typer.Option(help="Samples for the Fisher moments.")
    ] = MEASURE["samples"],
    activation_bits: Annotated[
        str,
        typer.Option(
            help='Bits that inputs of layers may have, such as "8,6,4", for plans '
            "under a bound on bit operations."
        ),
    ] = "",
    augment: AugmentOption = True,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Correct the distortions by measured loss rises of single layers.",
        ),
    ] = False,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Measure how much the loss rises for every level of every layer.

    Started by torchrun, processes share the work out.
    """
    read = Shards(shards).files if shards is not None else (weights,)
    prepare(json, out, inputs=[path for path in read if path is not None])
    checkpoint = out.with_name(out.name + ".partial")
    if shards is not None:
        if activation_bits:
            message = "--shards know no inputs of layers: leave --activation-bits out"
            raise typer.BadParameter(message)
        if refine:
            message = "--shards are measured without data: leave --refine out"
            raise typer.BadParameter(message)
        if model is not None or weights is not None or dataset is not None:
            message = "--shards takes the place of --model, --weights and --dataset"
            raise typer.BadParameter(message)
        for name in ("samples", "data", "seed", "augment"):
            given = context.get_parameter_source(name)
            if given is not None and given.name == "COMMANDLINE":
                message = f"--shards are measured without data: leave --{name} out"
                raise typer.BadParameter(message)
    elif model is None or dataset is None or not (weights or model_folder(model)):
        message = "measure needs --model, --weights and --dataset, or else --shards"
        raise typer.BadParameter(message)
    with joined(shareable=shards is None) as ranks:
        if model is None or dataset is None:
            assert shards is not None
            table = measure_shards(shards, checkpoint=checkpoint)
        else:
            network = trained_model(model, weights)
            source = fitting_data(model, network, dataset, data)
            table = measure_sensitivity(
                network,
                source.calibration(seed, augment=augment),
                validation=source.validating(),
                samples=samples,
                activation_bits=_numbers(activation_bits),
                refine=Refinement() if refine else None,
                seed=seed,
                checkpoint=checkpoint,
            )
        if ranks.first:
            _show(table, out, json)


def _show(table: Sensitivity, out: Path, json: Path | None) -> None:
    """Write a sensitivity, and show the traces."""
    table.save(out)
    view = Table(title="Fisher traces")
    view.add_column("layer")
    for column in ("weights", "trace, nats²", "± rel."):
        view.add_column(column, justify="right")
    for i, name in enumerate(table.names):
        error = f"{100 * table.fisher_error[i]:.0f} %"
        view.add_row(name, f"{table.sizes[i]:,}", f"{table.fisher_trace[i]:.4g}", error)
    console.print(view)
    levels = table.distortion.shape[1] * table.distortion.shape[2]
    console.print(
        f"{table.samples} samples, loss {table.loss:.4f}, {levels} levels a layer"
    )
    console.print(f"wrote {out}")
    for name, values in table.provenance.get("calibrated", {}).items():
        if isinstance(values, dict) and values.get("spearman") is not None:
            console.print(
                f"{name}: predicted against measured loss rise of {values['plans']} "
                f"random plans, each left out of the fit: rank correlation "
                f"{values['spearman_before']:.2f} ⇒ {values['spearman']:.2f}, off by "
                f"{100 * values['log_error']:.0f} %"
            )
    traces = dict(zip(table.names, table.fisher_trace.tolist(), strict=True))
    emit(
        json,
        {
            "samples": table.samples,
            "loss": table.loss,
            "fisher_trace": traces,
            **table.provenance,
        },
    )


@app.command()
def search(
    sensitivity: SensitivityArgument,
    size: SizeOption = None,
    bops: Annotated[
        str | None, typer.Option(help='Bit operations: "10%" or a number.')
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(help='Latency: "4ms", or "50%" of the float network\'s.'),
    ] = None,
    latency_table: Annotated[
        Path | None, typer.Option(help="What `measure-latency` wrote.")
    ] = None,
    out: OutOption = Path("plan.json"),
    method: Annotated[
        MethodName, typer.Option(help="How to search.")
    ] = MethodName.optimal,
    grids: FamilyOption = None,
    fused: FusedOption = None,
    json: JsonOption = None,
) -> None:
    """Find the level of every layer under a budget."""
    if (latency is None) != (latency_table is None):
        message = "--latency and --latency-table go together"
        raise typer.BadParameter(message)
    prepare(json, out, inputs=[latency_table] if latency_table else [])
    table = Sensitivity.load(sensitivity)
    if fused is None:
        fused = latency is None and method in GROUPING
    groups = groups_of_names(table.names) if fused else ()
    budget = Budget(size=size, bops=bops, latency=latency, groups=groups)
    times = None if latency_table is None else LatencyTable.load(latency_table)
    wide = 8 if times is None else times.weight_bits
    plan = find_plan(
        table,
        budget,
        method=make_method(method),
        family=_family(grids),
        latency=times,
    )
    plan.save(out)
    view = Table(title="Plan")
    view.add_column("layer")
    for column in ("grid", "masked", "bits/weight", "loss rise, nats"):
        view.add_column(column, justify="right")
    for name, level in plan.levels.items():
        count = max(1, int(table.sizes[table.names.index(name)]))
        bits = f"32 ⇒ {level.size_bits / count:.2f}"
        masked = f"{100 * level.sparsity:.0f} %"
        view.add_row(name, str(level.grid), masked, bits, f"{level.distortion:.3g}")
    console.print(view)
    console.print(plan.summary())
    milliseconds = plan.details.get("latency_ms")
    if milliseconds is not None:
        console.print(
            f"predicted latency {milliseconds:.4g} ms with "
            f"{plan.details['integer_layers']} integer layers, exported with "
            f"--fold-weights --min-bits {wide}"
        )
    console.print(f"wrote {out}")
    emit(
        json,
        {
            "method": plan.method,
            "status": plan.status,
            "gap": plan.gap,
            "distortion": plan.distortion,
            "size_bytes": plan.size_bytes,
            "bops": plan.bops,
            "latency_ms": milliseconds,
        },
    )


@app.command()
def pareto(
    sensitivity: SensitivityArgument,
    points: Annotated[int, typer.Option(min=1, help="Plans to list.")] = 20,
    grids: FamilyOption = None,
    json: JsonOption = None,
) -> None:
    """List plans along the whole front of size against predicted loss."""
    prepare(json)
    table = Sensitivity.load(sensitivity)
    plans = make_front(table, family=_family(grids), points=points)
    view = Table(title="Front")
    for column in ("bytes", "% of float32", "BOPs", "predicted loss rise, nats"):
        view.add_column(column, justify="right")
    for plan in plans:
        share = f"{100 * plan.size_bytes / table.dense_bytes:.2f}"
        view.add_row(
            f"{plan.size_bytes:,}", share, f"{plan.bops:.3g}", f"{plan.distortion:.4g}"
        )
    console.print(view)
    rows = [{"size_bytes": p.size_bytes, "distortion": p.distortion} for p in plans]
    emit(json, {"front": rows})
