"""Commands that make weights: compress, apply, finetune, pack, unpack."""

import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import typer
from torch import nn

from fitcompress.cli.app import (
    AugmentOption,
    ChannelsOption,
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
from fitcompress.cli.models import (
    build_model,
    fitting_data,
    model_folder,
    trained_model,
)
from fitcompress.cli.plans import FusedOption
from fitcompress.compensate import apply as apply_plan
from fitcompress.compensate.options import Compensation
from fitcompress.compression import compress as compress_model
from fitcompress.data import Dataset
from fitcompress.files import check_no_input, write_atomically
from fitcompress.hugging_face import save_pretrained
from fitcompress.model.costs import dense_bytes
from fitcompress.model.fused_groups import fused_groups
from fitcompress.search import Budget, Plan
from fitcompress.storage.save_load import load, read, save
from fitcompress.train import finetune as train_model

__all__ = ["apply", "compress", "finetune", "pack", "unpack"]

TUNE = defaults(train_model)
APPLY = defaults(apply_plan)
COMPRESS = defaults(compress_model)
USUAL = Compensation()
LOADER = defaults(Dataset.training)


class NormMode(str, Enum):
    """What fine-tuning does with the statistics of norms."""

    frozen = "frozen"
    batch = "batch"


class CodingName(str, Enum):
    """How codes are coded in the file."""

    smallest = "smallest"
    static = "static"


CodingOption = Annotated[
    CodingName,
    typer.Option(
        help="Of the file: smallest, or static, some 1 to 10 % larger and decoded many "
        "times as fast."
    ),
]
NORMS = NormMode(TUNE["norms"])
SMALL, DENSE = Path("small.safetensors"), Path("dense.safetensors")
SamplesOption = Annotated[int, typer.Option("--samples", help="Calibration inputs.")]
DriftOption = Annotated[
    float | None,
    typer.Option(
        "--drift",
        help="Share of the correction for errors of earlier layers, 0 to 1. "
        "Default: what held-out calibration inputs favour.",
    ),
]
BeamOption = Annotated[
    int | None,
    typer.Option(
        "--beam",
        help="Roundings followed at once, 1 to 1024. Default: as many as cost little.",
    ),
]
BiasOption = Annotated[
    bool,
    typer.Option(
        "--bias/--no-bias", help="Keep mean outputs through biases and norms."
    ),
]
PlanArgument = Annotated[Path, typer.Argument(help="What `search` wrote.")]
PackedArgument = Annotated[Path, typer.Argument(help="A packed file.")]


@app.command()
def compress(
    model: ModelOption,
    dataset: DatasetOption,
    size: Annotated[
        str | None, typer.Option(help='Bytes of the file: "5%", "40KB", …')
    ] = None,
    bops: Annotated[
        str | None,
        typer.Option(help='Bit operations: "2%", … Quantizes inputs of layers, too.'),
    ] = None,
    weights: OwnWeightsOption = None,
    out: OutOption = SMALL,
    data: DataOption = None,
    samples: SamplesOption = COMPRESS["samples"],
    drift: DriftOption = USUAL.drift,
    beam: BeamOption = USUAL.beam,
    bias: BiasOption = USUAL.bias,
    augment: AugmentOption = True,
    seed: SeedOption = COMPRESS["seed"],
    coding: CodingOption = CodingName.smallest,
    fused: FusedOption = True,
    json: JsonOption = None,
) -> None:
    """Measure, search and apply in one go: no labels, no training."""
    prepare(json, out)
    start = time.monotonic()
    Budget(size=size, bops=bops)  # says what is wrong before the model is read
    compensation = Compensation(drift=drift, beam=beam, bias=bias)
    network = trained_model(model, weights)
    groups = fused_groups(network) if fused else ()
    budget = Budget(size=size, bops=bops, groups=groups)
    source = fitting_data(model, network, dataset, data)
    loader = source.calibration(seed, augment=augment)
    small = compress_model(
        network,
        loader,
        budget,
        samples=samples,
        compensation=compensation,
        checkpoint=_partial(out),
        seed=seed,
    )
    _store(network, small, out, json, start, coding)


@app.command()
def apply(
    plan: PlanArgument,
    model: ModelOption,
    dataset: DatasetOption,
    weights: OwnWeightsOption = None,
    out: OutOption = SMALL,
    data: DataOption = None,
    samples: SamplesOption = APPLY["samples"],
    drift: DriftOption = USUAL.drift,
    beam: BeamOption = USUAL.beam,
    bias: BiasOption = USUAL.bias,
    augment: AugmentOption = True,
    seed: SeedOption = 0,
    coding: CodingOption = CodingName.smallest,
    json: JsonOption = None,
) -> None:
    """Put a plan's levels on a model, errors compensated, and write the packed file."""
    prepare(json, out)
    start = time.monotonic()
    chosen = Plan.load(plan)
    compensation = Compensation(drift=drift, beam=beam, bias=bias)
    network = trained_model(model, weights)
    source = fitting_data(model, network, dataset, data)
    loader = source.calibration(seed, augment=augment)
    small = apply_plan(
        network,
        chosen,
        loader,
        samples=samples,
        compensation=compensation,
        checkpoint=_partial(out),
    )
    _store(network, small, out, json, start, coding)


@app.command()
def finetune(
    packed: PackedArgument,
    model: ModelOption,
    dataset: DatasetOption,
    weights: OwnWeightsOption = None,
    channels: ChannelsOption = None,
    out: OutOption = Path("tuned.safetensors"),
    data: DataOption = None,
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the training data.")
    ] = TUNE["epochs"],
    size: SizeOption = TUNE["size"],
    lr: Annotated[
        float, typer.Option(help="Peak learning rate of weights, in steps.")
    ] = TUNE["lr"],
    float_lr: Annotated[
        float, typer.Option(help="Peak learning rate of norms and biases.")
    ] = TUNE["float_lr"],
    norms: Annotated[
        NormMode, typer.Option(help="Statistics of norms: fixed, or of each batch.")
    ] = NORMS,
    threads: Annotated[
        int, typer.Option(min=1, help="A setting: results depend on it.")
    ] = TUNE["thread_count"],
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step.")] = LOADER[
        "batch_size"
    ],
    seed: SeedOption = TUNE["seed"],
    coding: CodingOption = CodingName.smallest,
    json: JsonOption = None,
) -> None:
    """Train the weights of a packed file on their grids, within its budget."""
    prepare(json, out)
    start = time.monotonic()
    teacher = trained_model(model, weights)
    small = load(packed, build_model(model, channels), trainable=True)
    source = fitting_data(model, teacher, dataset, data)
    result = train_model(
        small,
        source.training(batch_size, seed),
        epochs=epochs,
        teacher=teacher,
        validation=source.validating(),
        size=size,
        lr=lr,
        float_lr=float_lr,
        thread_count=threads,
        norms="batch" if norms is NormMode.batch else "frozen",
        checkpoint=_partial(out),
        seed=seed,
    )
    console.print(str(result))
    values = {"divergence_before": result.before, "divergence_after": result.after}
    _store(teacher, small, out, json, start, coding, **values, kept=result.kept)


@app.command()
def pack(
    plan: PlanArgument,
    model: ModelOption,
    weights: OwnWeightsOption = None,
    out: OutOption = SMALL,
    coding: CodingOption = CodingName.smallest,
    json: JsonOption = None,
) -> None:
    """Round weights to a plan's levels and write the packed file; needs no data."""
    prepare(json, out)
    start = time.monotonic()
    chosen = Plan.load(plan)
    network = trained_model(model, weights)
    _store(network, apply_plan(network, chosen), out, json, start, coding)


@app.command()
def unpack(
    packed: PackedArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write, dense.safetensors by default; with --model a folder."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="hf:DIR; then --out is a folder that from_pretrained loads, with "
            "configuration and tokenizer, if any, of this one.",
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Write the weights of a packed file as a plain .safetensors checkpoint."""
    if model is not None:
        _unpack_folder(packed, model, out, json)
        return
    out = out or DENSE
    prepare(json, out)
    content = read(packed)
    state = {key: value.contiguous().clone() for key, value in content.state().items()}
    write_atomically(out, safetensors.torch.save(state))
    size = out.stat().st_size
    console.print(f"{content.size_bytes:,} ⇒ {size:,} bytes, {len(state)} tensors")
    console.print(f"wrote {out}")
    emit(
        json, {"bytes_packed": content.size_bytes, "bytes": size, "tensors": len(state)}
    )


def _unpack_folder(
    packed: Path, model: str, out: Path | None, json: Path | None
) -> None:
    if (folder := model_folder(model)) is None:
        message = f"only --model hf:DIR unpacks to a folder; got {model[:50]}"
        raise typer.BadParameter(message)
    if out is None:
        message = "--model hf:DIR unpacks to a folder: name it with --out"
        raise typer.BadParameter(message)
    prepare(json, inputs=[packed])
    check_no_input(out, [folder])
    save_pretrained(load(packed, build_model(model)), out, tokenizer=folder)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    console.print(f"{packed.stat().st_size:,} ⇒ {size:,} bytes")
    console.print(f"wrote {out}")
    emit(json, {"bytes_packed": packed.stat().st_size, "bytes": size})


def _partial(out: Path) -> Path:
    """Return where progress towards ``out`` is saved."""
    return out.with_name(out.name + ".partial")


def _store(
    network: nn.Module,
    small: nn.Module,
    out: Path,
    json: Path | None,
    start: float,
    coding: CodingName,
    **more: Any,
) -> None:
    size, dense = save(small, out, coding=coding.value), dense_bytes(network)
    seconds = time.monotonic() - start
    console.print(
        f"{dense:,} ⇒ {size:,} bytes ({100 * size / dense:.2f} %), {seconds:.1f} s"
    )
    console.print(f"wrote {out}")
    values = {"bytes_before": dense, "bytes_after": size, "seconds": seconds}
    emit(json, values | more)
