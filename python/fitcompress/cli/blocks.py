"""The command for decoders that do not fit in memory."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from fitcompress.blockwise import compensate_shards
from fitcompress.cli.app import (
    JsonOption,
    OutOption,
    SeedOption,
    app,
    console,
    emit,
    prepare,
)
from fitcompress.cli.weights import (
    APPLY,
    SMALL,
    USUAL,
    BeamOption,
    BiasOption,
    CodingName,
    CodingOption,
    DriftOption,
    PlanArgument,
    SamplesOption,
)
from fitcompress.compensate.options import Compensation
from fitcompress.data.batches import take
from fitcompress.data.text import load_tokens
from fitcompress.search import Plan

__all__ = ["apply_blocks"]


@app.command("apply-shards")
def apply_blocks(
    plan: PlanArgument,
    shards: Annotated[
        Path, typer.Option(help="Folder of config.json and .safetensors files.")
    ],
    data: Annotated[
        Path,
        typer.Option(help="Calibration tokens: a .npy file, [sequences, tokens]."),
    ],
    out: OutOption = SMALL,
    samples: SamplesOption = APPLY["samples"],
    drift: DriftOption = USUAL.drift,
    beam: BeamOption = USUAL.beam,
    bias: BiasOption = USUAL.bias,
    seed: SeedOption = 0,
    coding: CodingOption = CodingName.smallest,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder for hidden states and finished layers. Default: OUT with "
            ".work behind it. A killed run goes on from there."
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """As `apply`, for a decoder of Hugging Face that does not fit in memory.

    Its blocks, of Llama's kind, are compensated one at a time. The last quarter of the
    sequences and the eighth before it are not used, as everywhere.
    """
    prepare(json, out, inputs=[plan, data])
    start = time.monotonic()
    chosen = Plan.load(plan)
    loader = load_tokens(data).calibration(seed)
    tokens = torch.cat([x["input_ids"] for x, _ in take(loader, samples)])
    size = compensate_shards(
        shards,
        chosen,
        tokens,
        out,
        compensation=Compensation(drift=drift, beam=beam, bias=bias),
        coding=coding.value,
        work=work,
    )
    seconds = time.monotonic() - start
    console.print(f"{size:,} bytes, {seconds:.1f} s")
    console.print(f"wrote {out}")
    emit(json, {"bytes_after": size, "seconds": seconds})
