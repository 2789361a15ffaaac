"""Plans side by side: threads, and how many fit in memory."""

import os
import subprocess
import sys

import torch

from fitcompress.refinement.plan_losses import Workers


def test_threads_that_run_passes_compute_as_the_main_one() -> None:
    """Whatever OpenMP would give a new thread."""
    code = (
        "import torch, zlib\n"
        "from fitcompress.compensate.lockstep import Lockstep\n"
        "from fitcompress.threads import threads\n"
        "torch.manual_seed(0)\n"
        "net = torch.nn.Sequential(torch.nn.Linear(3072, 256), torch.nn.Linear(256, 4))"
        "\nx = torch.randn(128, 3072)\n"
        "with threads(2), Lockstep(net, {'1': net[1]}, [x]) as run:\n"
        "    print(zlib.crc32(run.advance()[1][0].numpy().tobytes()))\n"
    )
    found = set()
    for count in ("1", "2", "5"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": count},
        )
        found.add(done.stdout)
    assert len(found) == 1


def test_workers_fit_in_memory() -> None:
    small = torch.nn.Linear(10, 10)
    assert Workers.for_model(small, 2**20, 4) == Workers(4, 1)
    assert Workers.for_model(small, 2**20, 64) == Workers(8, 1)
    assert Workers.for_model(small, 2**29, 64) == Workers(2, 1)
    assert Workers.for_model(small, 2**30, 64) == Workers(1, 2)
    large = torch.nn.Linear(2**15, 2**15, device="meta")
    assert Workers.for_model(large, 0, 64) == Workers(1, 2)
