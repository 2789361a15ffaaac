"""What one decoder block takes to be compensated from shards: time, memory, resuming.

    python benchmarks/decoder_block.py --threads 2 [--folder DIR] [--json out.json]
    python benchmarks/decoder_block.py --quick

A model of one block in the shape of Llama-7B (4096 wide, 11 008 inner, 32 heads) with
8192 tokens of vocabulary and a head of its own, bfloat16, goes through
``compensate_shards`` with 65 536 calibration tokens, in a process of its own; the peak
is that of the whole process. Weights are random; the embedding has a power-law spectrum
and four channels that are twenty times as large as others, tokens are drawn by Zipf's
law. Then again from where the first run had three of the four groups, killed in the
pass before the last group and in its layer, and resumed: the files must be equal.
``--quick``: 512 wide, 1376 inner, 8192 tokens, killed and resumed from the start.

The time of a model is extrapolated: a block that follows another begins with the pass
that the head begins with here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

import fitcompress as fc
from fitcompress.blockwise import shards
from harness import parser, start

if TYPE_CHECKING:
    from harness import Result

MINUTES, GIB = 25.0, 6.0
BLOCKS = 32  # of Llama-7B
SHARE = 0.5  # of a standard deviation: the step


@dataclass(frozen=True)
class Size:
    """Of the model and its calibration."""

    width: int = 4096
    inner: int = 11_008
    heads: int = 32
    vocabulary: int = 8192
    sequences: int = 32
    length: int = 2048


QUICK = Size(512, 1376, 4, 2048, 32, 256)


def make_model(folder: Path, size: Size) -> None:
    """Write config and tensors."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=1,
        num_attention_heads=size.heads,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        bos_token_id=1,
        eos_token_id=2,
    )
    config.save_pretrained(folder)
    make = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make)

    spectrum = torch.arange(1, size.width + 1) ** -0.5
    embedding = normal(size.vocabulary, size.width) * spectrum
    embedding = embedding @ (normal(size.width, size.width) / size.width**0.5)
    embedding[:, :4] *= 20
    tensors = {"model.embed_tokens.weight": embedding}
    block = "model.layers.0"
    for name in ("q", "k", "v", "o"):
        key = f"{block}.self_attn.{name}_proj.weight"
        tensors[key] = normal(size.width, size.width) * size.width**-0.5
    for name in ("gate", "up"):
        key = f"{block}.mlp.{name}_proj.weight"
        tensors[key] = normal(size.inner, size.width) * size.width**-0.5
    key = f"{block}.mlp.down_proj.weight"
    tensors[key] = normal(size.width, size.inner) * size.inner**-0.5
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{block}.{name}.weight"] = 0.5 + 0.1 * normal(size.width)
    tensors["model.norm.weight"] = torch.ones(size.width)
    tensors["lm_head.weight"] = normal(size.vocabulary, size.width) * size.width**-0.5
    half = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
    save_file(half, folder / "model.safetensors")


def make_tokens(size: Size) -> torch.Tensor:
    """Return calibration tokens by Zipf's law."""
    shares = 1 / torch.arange(1, size.vocabulary + 1).double()
    count = size.sequences * size.length
    make = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(shares, count, replacement=True, generator=make)
    return drawn.reshape(size.sequences, size.length)


def make_plan(folder: Path) -> fc.Plan:
    """Return half a standard deviation as the step of every layer."""
    from fitcompress.blockwise.skeleton import Skeleton
    from fitcompress.sensitivity.shards import Shards

    found = Shards(folder)
    levels = {}
    for layer in Skeleton(folder).layers:
        sigma = float(found.read(f"{layer.name}.weight").float().std())
        levels[layer.name] = fc.Level(fc.Grid(step=SHARE * sigma), 0.0, layer.shape)
    return fc.Plan(levels)


def child(folder: Path, size: Size, threads: int, out: Path, work: Path) -> None:
    """Compress, in a process of its own."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    shards.FIXED = threads
    plan, data = make_plan(folder), make_tokens(size)
    begin, cpu = time.monotonic(), time.process_time()
    file = fc.compensate_shards(folder, plan, data, out, work=work, progress=False)
    found = {
        "seconds": time.monotonic() - begin,
        "cpu": time.process_time() - cpu,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "bytes": file,
    }
    print(json.dumps(found))


class Child:
    """That process.

    Args:
        arguments: Of this script.
        folder: Of the model.
        out: The file.
        work: Its work folder.
    """

    def __init__(
        self, arguments: argparse.Namespace, folder: Path, out: Path, work: Path
    ) -> None:
        own = [str(Path(__file__)), "--child", str(folder), str(out), str(work)]
        own += ["--threads", str(arguments.threads)]
        own += ["--quick"] if arguments.quick else []
        threads = {"OMP_NUM_THREADS": str(arguments.threads)}
        self.work = work
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, *own],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | threads,
        )

    def wait_for(self, pattern: str) -> None:
        """Wait until a file of the work folder is there."""
        while self._process.poll() is None and not list(self.work.glob(pattern)):
            time.sleep(0.02)

    def kill(self, pattern: str, seconds: float) -> None:
        """Kill it some time after a file is there."""
        self.wait_for(pattern)
        time.sleep(seconds)
        self._process.send_signal(signal.SIGKILL)
        if self._process.wait() != -signal.SIGKILL:
            raise RuntimeError(f"it had ended before {pattern}: {self.log()}")

    def log(self) -> str:
        """Return what it told."""
        self._log.seek(0)
        return self._log.read()

    def found(self) -> dict[str, Any]:
        """Return what it measured, when it has ended."""
        out, _ = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(self.log())
        return json.loads(out)


def snapshot(work: Path, to: Path) -> None:
    """Keep what is finished in a work folder; its files never change."""
    to.mkdir()
    for path in work.iterdir():
        if path.suffix in (".stage", ".rows", ".json"):
            with contextlib.suppress(FileNotFoundError):  # no longer needed
                os.link(path, to / path.name)


# How often a run is killed: a file of the work folder, and seconds from then on.
KILLS = {
    "in the pass of the last group": ("block-0000.m.small.rows.partial", 30.0),
    "in its layer": ("block-0000-3.held_out.cross.rows", 12.0),
}
QUICK_KILLS = {
    "between the first two groups": ("block-0000-0.stage", 0.0),
    "in the pass of the last group": ("block-0000.m.small.rows.partial", 0.2),
    "in its layer": ("block-0000-3.held_out.cross.rows", 0.1),
}


def main() -> None:
    options = parser(__doc__, threads=2)
    options.add_argument("--folder", type=Path, help="where to work; 12 GB of room")
    options.add_argument("--child", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    size = QUICK if arguments.quick else Size()
    if arguments.child:
        folder, out, work = arguments.child
        child(folder, size, arguments.threads, out, work)
        return
    result = start(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        measure(arguments, size, Path(name), result)
    result.finish()


def measure(
    arguments: argparse.Namespace, size: Size, path: Path, result: Result
) -> None:
    """Run once whole, once killed and resumed."""
    (folder := path / "model").mkdir()
    make_model(folder, size)
    whole = Child(arguments, folder, path / "whole", path / "work")
    if not arguments.quick:
        whole.wait_for("block-0000-2.stage")
        snapshot(path / "work", path / "again")
    found = whole.found()
    for line in whole.log().splitlines():
        stage, _, times = line.partition(": tokens ")
        tokens, _, layers = times.partition(" s, layers ")
        if layers:
            result.row(
                stage=stage,
                tokens_s=float(tokens),
                layers_s=float(layers.removesuffix(" s")),
            )
    result.row(
        stage="all, embedding and start included",
        minutes=found["seconds"] / 60,
        cpu_minutes=found["cpu"] / 60,
        peak_gib=found["peak"] / 2**30,
        bytes=found["bytes"],
    )
    first, *others, head = result.rows[:5]
    block = first["layers_s"] + head["tokens_s"]
    block += sum(row["tokens_s"] + row["layers_s"] for row in others)
    result.row(stage=f"{BLOCKS} such blocks, EXTRAPOLATED", minutes=BLOCKS * block / 60)
    kills = QUICK_KILLS if arguments.quick else KILLS
    for pattern, seconds in kills.values():
        again = Child(arguments, folder, path / "killed", path / "again")
        again.kill(pattern, seconds)
    Child(arguments, folder, path / "killed", path / "again").found()
    same = (path / "killed").read_bytes() == (path / "whole").read_bytes()
    result.row(stage=f"killed {' and '.join(kills)}, resumed", same=same)
    result.bar("minutes", found["seconds"] / 60, MINUTES)
    result.bar("GiB at the peak", found["peak"] / 2**30, GIB)
    result.bar("killed and resumed ends the same", float(same), 1.0, "at least")


if __name__ == "__main__":
    main()
