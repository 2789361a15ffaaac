"""The command ``fitcompress run galen``."""

import time
from enum import Enum
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
from fitcompress.latency.command import CommandTarget
from fitcompress.latency.onnx_runtime import OnnxRuntimeTarget
from fitcompress.methods import Galen
from fitcompress.model.costs import dense_bytes
from fitcompress.search import Plan
from fitcompress.storage.save_load import save
from fitcompress.train import evaluate

__all__ = ["galen"]

USUAL, LOADER, RUNTIME = (
    Galen(),
    defaults(Dataset.training),
    defaults(OnnxRuntimeTarget),
)


class AgentName(str, Enum):
    """What the agent decides on."""

    joint = "joint"
    pruning = "pruning"
    quantization = "quantization"


class IntegersName(str, Enum):
    """What integers the target runs."""

    int8 = "int8"
    mixed = "mixed"


AGENT, INTEGERS = AgentName(USUAL.agent), IntegersName(USUAL.integers)


@run_app.command("galen")
def galen(
    model: ModelOption,
    weights: WeightsOption,
    dataset: DatasetOption,
    target: Annotated[
        float, typer.Option(help="Share of the float network's latency to reach.")
    ] = USUAL.target,
    agent: Annotated[
        AgentName, typer.Option(help="What the agent decides on.")
    ] = AGENT,
    episodes: Annotated[
        int, typer.Option(min=1, help="Networks to make, retrain and time.")
    ] = USUAL.episodes,
    out: OutOption = Path("small.safetensors"),
    plan: Annotated[Path, typer.Option("--plan", help="Plan file to write.")] = Path(
        "plan.json"
    ),
    data: DataOption = None,
    warm_up: Annotated[
        int, typer.Option(min=0, help="First episodes, with random actions.")
    ] = USUAL.warm_up,
    retrain_samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Inputs of the retraining in an episode; default: a whole pass."
        ),
    ] = USUAL.retrain_samples,
    sensitivity_samples: Annotated[
        int, typer.Option(min=1, help="Inputs for what the agent sees of the layers.")
    ] = USUAL.sensitivity_samples,
    epochs: Annotated[
        int, typer.Option(min=0, help="Passes over the training data in the end.")
    ] = USUAL.finetune_epochs,
    lr: Annotated[
        float, typer.Option(help="Peak learning rate of retraining.")
    ] = USUAL.learning_rate,
    one_sided: Annotated[
        bool,
        typer.Option(
            "--one-sided", help="Do not punish networks that are faster than asked."
        ),
    ] = USUAL.one_sided,
    integers: Annotated[
        IntegersName, typer.Option(help="Widths that the target is fast at.")
    ] = INTEGERS,
    round_to: Annotated[
        int, typer.Option(min=1, help="Keep channels in multiples of this.")
    ] = USUAL.round_to,
    most_bits: Annotated[
        int,
        typer.Option(
            help="Largest of mixed widths; 7 for the weights of int8 layers on "
            "processors whose sums saturate (AVX2 without VNNI)."
        ),
    ] = USUAL.most_bits,
    beta: Annotated[
        float,
        typer.Option(help="What a relative miss costs, at most 0."),
    ] = USUAL.beta,
    integer_sums: Annotated[
        bool, typer.Option("--integer-sums", help="Time sums of shortcuts in 8 bits.")
    ] = False,
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
    batch: Annotated[
        int, typer.Option(min=1, help="Samples of one timed call.")
    ] = RUNTIME["batch"],
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step.")] = LOADER[
        "batch_size"
    ],
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Let an agent choose channels and bits for a share of the latency, measured.

    Writes the plan, which says what channels are kept, and the packed file.
    """
    prepare(json, out, plan, inputs=[weights])
    if out.resolve() == plan.resolve():
        message = "--plan and --out are the same file"
        raise typer.BadParameter(message)
    start = time.monotonic()
    method = Galen(
        agent=agent.value,
        target=target,
        episodes=episodes,
        warm_up=warm_up,
        retrain_samples=retrain_samples,
        sensitivity_samples=sensitivity_samples,
        finetune_epochs=epochs,
        learning_rate=lr,
        one_sided=one_sided,
        integers=integers.value,
        round_to=round_to,
        most_bits=most_bits,
        beta=beta,
    )
    clock = (
        OnnxRuntimeTarget(threads=threads, batch=batch, integer_sums=integer_sums)
        if command is None
        else CommandTarget(command, batch=batch, integer_sums=integer_sums)
    )
    network = trained_model(model, weights)
    source = load_dataset(dataset, data)
    check_data(network, source)
    found, small = method.run(
        network,
        source.training(batch_size, seed),
        source.validating(),
        source.test[0][:1] * 0,
        clock,
        checkpoint=out.with_name(out.name + ".partial"),
        seed=seed,
    )
    found.save(plan)
    size, dense = save(small, out), dense_bytes(network)
    before = evaluate(network, source.validating()).accuracy
    tested = [evaluate(each, source.testing()).accuracy for each in (network, small)]
    details = found.details
    console.print(_table(found))
    console.print(
        f"{details['reference_ms']:.4g} ⇒ {details['latency_ms']:.4g} ms "
        f"({100 * details['share']:.1f} %, asked for {100 * target:g} %)"
    )
    console.print(
        f"validation accuracy {before:.2f} ⇒ {100 * details['accuracy']:.2f} % "
        f"(chosen by it), test accuracy {tested[0]:.2f} ⇒ {tested[1]:.2f} %"
    )
    console.print(f"{dense:,} ⇒ {size:,} bytes ({100 * size / dense:.2f} %)")
    console.print(f"wrote {plan} and {out}")
    if details["kept_channels"]:
        console.print(
            f"it has fewer channels than {model}: pass --channels {plan} to evaluate, "
            "finetune and export"
        )
    values: dict[str, Any] = {
        "share": details["share"],
        "latency_ms": details["latency_ms"],
        "reference_ms": details["reference_ms"],
        "accuracy_before": before,
        "accuracy_after": 100 * details["accuracy"],
        "test_accuracy_before": tested[0],
        "test_accuracy_after": tested[1],
        "reward": details["reward"],
        "bytes_before": dense,
        "bytes_after": size,
        "history": details["history"],
        "seconds": time.monotonic() - start,
    }
    emit(json, values)


def _table(plan: Plan) -> Table:
    kept, bits = plan.details["kept_channels"], plan.details["policy"]["bits"]
    view = Table(title="Channels and bits")
    view.add_column("layer")
    for column in ("channels", "weight", "input"):
        view.add_column(column, justify="right")
    for name in plan.levels:
        channels = "all"
        if "out" in kept.get(name, {}):
            channels = str(len(kept[name]["out"]))
        weight, inputs = bits.get(name, ("float", "float"))
        view.add_row(name, channels, str(weight), str(inputs))
    return view
