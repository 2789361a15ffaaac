"""Python code in several processes of one ``torch.distributed`` group."""

import os
import subprocess
import sys
from pathlib import Path

HEAD = """
import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, {tests!r})
import torch
import torch.distributed as dist

import fitcompress as fc
from fitcompress.errors import *

folder = Path({folder!r})
rank = int(os.environ["RANK"])
dist.init_process_group(
    "gloo",
    init_method="file://" + str(folder / "{store}"),
    rank=rank,
    world_size=int(os.environ["WORLD_SIZE"]),
    timeout=timedelta(seconds=300),
)
"""
TAIL = """
dist.barrier()
sys.stdout.flush()
os._exit(0)  # torch's own threads now and then abort a process that ends on the CPU
"""


def run_processes(
    folder: Path, code: str, count: int = 2, timeout: float = 400
) -> list[subprocess.CompletedProcess[str]]:
    """Run ``code`` in ``count`` processes; it finds ``fc``, ``rank`` and ``folder``.

    Returns:
        What became of each, in the order of ranks.
    """
    number = len(list(folder.glob("process-*.py")))
    script = folder / f"process-{number}.py"
    head = HEAD.format(
        tests=str(Path(__file__).parent), folder=str(folder), store=f"store-{number}"
    )
    script.write_text(head + code + TAIL)
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(count)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    done = []
    try:
        for process in started:
            out, err = process.communicate(timeout=timeout)
            code_ = process.returncode
            done.append(subprocess.CompletedProcess(process.args, code_, out, err))
    finally:
        for process in started:
            process.kill()
    return done


def succeeded(done: list[subprocess.CompletedProcess[str]]) -> list[str]:
    """Return what each process has written; fail if one has failed."""
    for process in done:
        assert process.returncode == 0, "\n".join(each.stderr for each in done)
    return [process.stdout for process in done]
