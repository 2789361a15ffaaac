"""Python code in several processes of one ``torch.distributed`` group."""

import multiprocessing
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess

# Processes are forked from one that has done the imports, which take most of the time.
FORKS = multiprocessing.get_context("forkserver")
IMPORTED = ["pytest", "fitcompress", "torch.distributed.fsdp", "torch._dynamo"]
FORKS.set_forkserver_preload(IMPORTED)
HEAD = """
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

import fitcompress as fc

dist.init_process_group(
    "gloo",
    init_method="file://" + store,
    rank=rank,
    world_size=count,
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
) -> list[CompletedProcess[str]]:
    """Run ``code`` in ``count`` processes; it finds ``fc``, ``rank`` and ``folder``.

    Returns:
        What became of each, in the order of ranks.
    """
    number = len(list(folder.glob("store-*")))
    known = {"folder": folder, "count": count, "store": str(folder / f"store-{number}")}
    streams = [
        [folder / f"{kind}-{number}-{rank}" for kind in ("out", "err")]
        for rank in range(count)
    ]
    started = [
        FORKS.Process(target=_run, args=(code, known | {"rank": rank}, *streams[rank]))
        for rank in range(count)
    ]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(timeout)
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
                process.join()
    return [
        CompletedProcess(
            f"process {rank}", process.exitcode, *(p.read_text() for p in streams[rank])
        )
        for rank, process in enumerate(started)
    ]


def _run(code: str, known: dict[str, object], out: Path, err: Path) -> None:
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    exec(compile(HEAD + code + TAIL, "process", "exec"), known)


def succeeded(done: list[CompletedProcess[str]]) -> list[str]:
    """Return what each process has written; fail if one has failed."""
    for process in done:
        assert process.returncode == 0, "\n".join(each.stderr for each in done)
    return [process.stdout for process in done]
