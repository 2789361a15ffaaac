"""A model of 70 billion weights: tables layer by layer, and the search over them.

    python benchmarks/scaling.py [--parts shapes blocks search] [--blocks N]
        [--config config.json] [--sizes 9% 12% 15%]

A configuration of the ``transformers`` package is built on the meta device, without
a single weight: by default the shapes of Llama 3.1 70B, 80 blocks of 7. Weights
are random, bfloat16, made when they are read, the same every time; Fisher traces are
random, too, log-normal over the layers. So times and memory are measured, and loss
rises mean nothing.

``shapes``: one matrix of each shape. ``blocks``: the first N blocks in one
``measure_shards``, as from files, with 6 bits × 16 sparsities, 96 levels. Both in
processes of their own: processor time without that of making weights, and how far
resident memory rose. ``search``: all 560 layers under a bound on the file's size, with
and without q/k/v and gate/up sharing a level; layers of blocks beyond the N measured
ones have the tables of those, times a random factor. Rows named ``extrapolated`` are
times of measured blocks scaled to all of them; ``--blocks 80`` measures all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import fitcompress as fc
from fitcompress.errors import FitcompressError
from fitcompress.model import compressible_layers
from fitcompress.sensitivity.shards import ShardTensor
from harness import parser, start
from harness.memory import peak_rise

if TYPE_CHECKING:
    from harness import Result

GRIDS = tuple(fc.Grid(bits=b) for b in (8, 6, 5, 4, 3, 2))
SPARSITIES = tuple(0.95 * i / 16 for i in range(16))
LLAMA = {  # Llama 3.1 70B
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
PARTS = ("shapes", "blocks", "search")
WIDTH = 0.02  # of the weights; rows differ by a factor up to 3
SPREAD = 2.0  # of the logarithm of a layer's Fisher trace
ALLOCATION = 1.5  # bytes of memory over those of the largest matrix, at most
SEARCH = 0.1  # CPU seconds of a search, at most
GAP = 1e-4


class Generated:
    """Random weights of a model that is nowhere, made when they are read."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tensors = {
            name: ShardTensor(name, Path("generated"), "BF16", tuple(p.shape), 0)
            for name, p in model.named_parameters()
        }
        self.files: tuple[Path, ...] = ()
        self.seconds, self.largest = 0.0, 0
        self._buffer = torch.empty(0, dtype=torch.bfloat16)

    def reserve(self, size: int) -> None:
        """Make room for tensors of up to ``size`` bytes."""
        self.largest = size
        if len(self._buffer) < size // 2:
            self._buffer = torch.empty(size // 2, dtype=torch.bfloat16)

    def read(self, name: str) -> torch.Tensor:
        """Make one tensor."""
        first = time.process_time()
        found = self.tensors[name]
        weight = self._buffer[: found.size].view(found.shape)
        seed = sorted(self.tensors).index(name)
        generator = torch.Generator().manual_seed(seed)
        weight.normal_(0.0, WIDTH, generator=generator)
        widths = 0.5 + torch.rand(len(weight), 1, generator=generator)
        weight.mul_(widths.bfloat16())
        self.seconds += time.process_time() - first
        return weight


def built(config: Path | None) -> torch.nn.Module:
    """Return the model of a configuration, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(LLAMA) if config is None else json.loads(config.read_text())
    kind = settings.pop("model_type")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))


def blocks_of(model: torch.nn.Module) -> list[str]:
    """Return the names of the layers in blocks, in the order of the model."""
    named = (layer.name for layer in compressible_layers(model))
    return [name for name in named if ".layers." in name]


def traces(names: list[str]) -> dict[str, float]:
    """Return a random Fisher trace for every layer."""
    drawn = np.random.default_rng(0).normal(0.0, SPREAD, len(names))
    return dict(zip(names, np.exp(drawn).tolist(), strict=True))


def tabulated(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Measure layers in a process of their own; return its time and memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "table"
        command = [sys.executable, __file__, "--threads", str(arguments.threads)]
        if arguments.config is not None:
            command += ["--config", str(arguments.config)]
        command += ["--table-of", str(out), *names]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return {**json.loads(done.stdout), "table": fc.Sensitivity.load(out)}


def print_table(arguments: argparse.Namespace) -> None:
    """Measure layers, save the table, and print what it took."""
    out, *names = arguments.table_of
    torch.set_num_threads(arguments.threads)
    model = built(arguments.config)
    source, known = Generated(model), traces(blocks_of(model))
    tables: list[fc.Sensitivity] = []

    def run() -> None:
        tables.append(
            fc.measure_shards(
                source,
                fisher=known,
                grids=GRIDS,
                sparsities=SPARSITIES,
                include=names,
                exclude=(),
            )
        )

    first, began = time.process_time(), time.perf_counter()
    peak = peak_rise(run)
    cpu, wall = time.process_time() - first, time.perf_counter() - began
    tables[0].save(out)
    found = {"cpu_s": cpu - source.seconds, "made_s": source.seconds, "wall_s": wall}
    print(json.dumps({**found, "peak": peak, "largest": source.largest}))


def report(case: str, found: dict[str, Any], result: Result) -> float:
    """Add a row of a measured table; return processor seconds per weight."""
    weights = int(found["table"].sizes.sum())
    each = found["cpu_s"] / weights
    result.row(
        case=case,
        layers=len(found["table"].names),
        weights=weights,
        ns_a_weight=1e9 * each,
        cpu_s=found["cpu_s"],
        made_s=found["made_s"],
        peak_mb=found["peak"] / 1e6,
        over_largest=found["peak"] / found["largest"],
    )
    return each


def shapes(
    arguments: argparse.Namespace, model: torch.nn.Module, result: Result
) -> None:
    """Measure one matrix of each shape, and extrapolate to all layers."""
    layers = {each.name: each.shape for each in compressible_layers(model)}
    first: dict[tuple[int, ...], str] = {}
    for name in blocks_of(model):
        first.setdefault(layers[name], name)
    total = 0.0
    for shape, name in first.items():
        case = " × ".join(map(str, shape))
        each = report(case, tabulated(arguments, [name]), result)
        count = sum(layers[n] == shape for n in blocks_of(model))
        total += each * count * shape[0] * shape[1]
    result.row(case="all layers, extrapolated from one of each shape", cpu_s=total)


def blocks(
    arguments: argparse.Namespace, model: torch.nn.Module, result: Result
) -> fc.Sensitivity:
    """Measure some blocks as one model, and extrapolate to all of them."""
    names = blocks_of(model)
    count = len({_block(name) for name in names})
    wanted = min(1 if arguments.quick else arguments.blocks, count)
    chosen = [name for name in names if _block(name) < wanted]
    found = tabulated(arguments, chosen)
    report(f"{wanted} of {count} blocks", found, result)
    over = found["peak"] / found["largest"]
    result.bar("memory over the largest matrix", over, ALLOCATION)
    if wanted < count:
        scale = count / wanted
        label = f"{count} blocks, extrapolated from {wanted}"
        result.row(case=label, layers=len(names), cpu_s=scale * found["cpu_s"])
    table: fc.Sensitivity = found["table"]
    return table


def _block(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def whole(table: fc.Sensitivity, model: torch.nn.Module) -> fc.Sensitivity:
    """Return the table of all layers; the blocks beyond the measured ones made up."""
    names = blocks_of(model)
    place = {name: i for i, name in enumerate(table.names)}
    measured = 1 + max(map(_block, table.names))
    random, rows, factors = np.random.default_rng(1), [], []
    for name in names:
        here = _block(name)
        like = name.replace(f".layers.{here}.", f".layers.{here % measured}.")
        rows.append(place[like])
        own = here < measured
        factors.append(1.0 if own else float(np.exp(random.normal(0.0, SPREAD))))
    factor = np.array(factors)
    columns = {
        field: getattr(table, field)[rows]
        for field in ("macs", "fisher_error", "sparsity", "size_bits", "nonzeros")
    }
    columns["weight_bits"] = table.weight_bits[rows]
    for field in ("distortion", "grid_length", "prune_length", "norm"):
        columns[field] = getattr(table, field)[rows] * factor[:, None, None]
    parameters = sum(p.numel() for p in model.parameters())
    sizes = table.sizes[rows]
    return replace(
        table,
        names=tuple(names),
        shapes=tuple(table.shapes[row] for row in rows),
        fisher_trace=table.fisher_trace[rows] * factor,
        overhead_bytes=2 * int(parameters - sizes.sum()),
        dense_bytes=4 * parameters,
        activation_distortion=np.zeros((len(names), 1)),
        activation_trace=np.zeros(len(names)),
        **columns,
    )


def search(
    arguments: argparse.Namespace,
    table: fc.Sensitivity,
    model: torch.nn.Module,
    result: Result,
) -> None:
    """Search the levels of all layers, time it, and judge it by what it proves."""
    names = set(table.names)
    fused = [group for group in fc.fused_groups(model) if names.issuperset(group)]
    levels = len(table.grids) * table.sparsity.shape[1]
    for size in arguments.sizes:
        for case, groups in (("alone", ()), ("fused", tuple(fused))):
            budget = fc.Budget(size=size, groups=groups)
            fc.search(table, budget, family="bits")  # warm
            spent = []
            for _ in range(3 if arguments.quick else 9):
                first = time.process_time()
                plan = fc.search(table, budget, family="bits")
                spent.append(time.process_time() - first)
            variables = len(names) - sum(len(group) - 1 for group in groups)
            result.row(
                case=f"search, {size}, {case}",
                layers=len(names),
                levels=levels,
                decisions=variables,
                search_s=float(np.median(spent)),
                worst_s=max(spent),
                gap=plan.gap,
                status=plan.status,
                size_gb=plan.size_bytes / 1e9,
                share=plan.size_bytes / table.dense_bytes,
            )
            label = f"{len(names)} layers × {levels} levels, {size}, {case}"
            result.bar(f"{label}: CPU seconds", float(np.median(spent)), SEARCH)
            gap = float("nan") if plan.gap is None else plan.gap
            result.bar(f"{label}: proven gap", gap, GAP)


def main() -> None:
    """Run the chosen parts."""
    made = parser(__doc__ or "", threads=1)
    made.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    made.add_argument("--blocks", type=int, default=2, metavar="N")
    made.add_argument("--config", type=Path, help="config.json of another model")
    made.add_argument("--sizes", nargs="+", default=["9%", "12%", "15%"])
    made.add_argument("--table-of", nargs="+", help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.table_of:
        return print_table(arguments)
    try:
        result = start(arguments)
        model = built(arguments.config)
        if "shapes" in arguments.parts:
            shapes(arguments, model, result)
        if {"blocks", "search"} & set(arguments.parts):
            table = blocks(arguments, model, result)
        if "search" in arguments.parts:
            search(arguments, whole(table, model), model, result)
    except (FitcompressError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    return result.finish()


if __name__ == "__main__":
    main()
