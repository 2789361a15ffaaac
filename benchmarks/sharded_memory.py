"""Memory of a measurement in one process, shared out over two, and sharded by FSDP2.

    python benchmarks/sharded_memory.py [--width 2048] [--layers 12]

Random weights in float32, linear maps and ReLUs, each a module of its own for FSDP2;
two processes talk by gloo on the CPU. ``peak_mb`` is how far the resident memory of a
process rose from before the model was made to the end of ``measure``, the largest of
the processes, after a tiny network; ``over_weights`` is that over the bytes of all
weights. glibc keeps freed blocks of up to 32 MB for itself once it has seen some;
``returned``: with ``MALLOC_MMAP_THRESHOLD_=65536`` it gives them back, and what is
measured is what is in use. The bars are for that. Expected of N weights, the largest
layer n: one process, and each of several that share batches out, 4 N for weights and
4 N for F; W processes that hold the model together, 8 N / W, and 4 n a few times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

import fitcompress as fc
from harness import parser, start
from harness.memory import peak_rise

if TYPE_CHECKING:
    from collections.abc import Sequence

CASES = {"alone": 1, "shared out": 2, "sharded": 2}
GRIDS = (fc.Grid(bits=8), fc.Grid(bits=4), fc.Grid(bits=2))
SAMPLES, BATCH = 8, 2
OVER = {"alone": 2.6, "shared out": 2.6, "sharded": 1.6}


def built(width: int, layers: int, *, sharded: bool) -> nn.Module:
    """Return the network, made and sharded layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None
    parts: list[nn.Module] = []
    for _ in range(layers):
        part = nn.Linear(width, width, bias=False)
        parts += [fully_shard(part, mesh=mesh) if sharded else part, nn.ReLU()]
    model = nn.Sequential(*parts, nn.Linear(width, 16, bias=False))
    return fully_shard(model, mesh=mesh) if sharded else model


def measured(case: str, width: int, layers: int) -> None:
    """Measure, and print how far memory rose."""
    if CASES[case] > 1:
        dist.init_process_group("gloo")

    def run(width: int, layers: int) -> None:
        made = torch.Generator().manual_seed(1)
        data = torch.randn(SAMPLES, width, generator=made)
        fc.measure(
            built(width, layers, sharded=case == "sharded"),
            list(data.split(BATCH)),
            grids=GRIDS,
            sparsities=(0.0, 0.5),
            progress=False,
        )

    run(32, 1)  # what is imported on the way is not counted
    peak = peak_rise(lambda: run(width, layers))
    print(json.dumps(peak))
    sys.stdout.flush()
    if dist.is_initialized():
        dist.barrier()
        os._exit(0)  # torch's own threads now and then abort a process that ends


def peaks(case: str, size: Sequence[str], *, returned: bool) -> list[int]:
    """Return the peaks of all processes of a case."""
    with tempfile.TemporaryDirectory() as folder:
        store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
        started = []
        for rank in range(CASES[case]):
            env = os.environ | store
            env |= {"RANK": str(rank), "WORLD_SIZE": str(CASES[case])}
            env |= {"MALLOC_MMAP_THRESHOLD_": "65536"} if returned else {}
            with (Path(folder) / str(rank)).open("w") as out:
                command = [sys.executable, __file__, "--case", case, *size]
                started.append(subprocess.Popen(command, env=env, stdout=out))
        for process in started:
            if process.wait():
                message = f"{case}: a process ended with {process.returncode}"
                raise RuntimeError(message)
        files = [Path(folder) / str(rank) for rank in range(CASES[case])]
        return [json.loads(file.read_text()) for file in files]


def main() -> None:
    """Run all cases."""
    made = parser(__doc__ or "", threads=1)
    made.add_argument("--width", type=int, default=2048)
    made.add_argument("--layers", type=int, default=12)
    made.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.case:
        return measured(arguments.case, arguments.width, arguments.layers)
    result = start(arguments)
    width, layers = arguments.width, 2 if arguments.quick else arguments.layers
    weights = 4 * (layers * width * width + 16 * width)
    size = ["--width", str(width), "--layers", str(layers)]
    for case, returned in itertools.product(CASES, (False, True)):
        found = max(peaks(case, size, returned=returned))
        over = found / weights
        result.row(
            case=case,
            processes=CASES[case],
            returned=returned,
            weights_mb=weights / 1e6,
            peak_mb=found / 1e6,
            over_weights=over,
        )
        if returned:
            result.bar(f"{case}: memory over the weights", over, OVER[case])
    return result.finish()


if __name__ == "__main__":
    main()
