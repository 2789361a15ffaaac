"""What a second thread buys for Fisher moments, with its core free and with it busy."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fisher_peers import Ours, Plain
from harness import Missing, Spread, compare, peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fisher_peers import Case
    from harness import Result, Timing

__all__ = ["measure"]

SPEEDUP = 1.6
FREE = 0.8  # of two cores' time nobody else may use more than the rest


def measure(case: Case, result: Result, repeats: int) -> None:
    """Measure elapsed time on one and on two threads, and judge ours."""
    cores = usable_cores()
    if len(cores) < 2:
        result.skip("threads", "there is one core only")
        return
    before = torch.get_num_threads()
    runs = {
        "plain": Plain(case).step,
        "ours trace": peer(lambda: Ours(case, False).step),
        "ours diagonal": peer(lambda: Ours(case, True).step),
    }
    candidates: dict[str, Callable[[], None] | Missing] = {}
    for name, run in runs.items():
        if isinstance(run, Missing):
            result.skip(f"threads: {name}", run.reason)
            continue
        for count in (1, 2):
            candidates[f"{name}, {count}"] = on_threads(run, count)
    for neighbour in ("free", "busy"):
        idle = idle_share()
        with spinning(cores[-1]) if neighbour == "busy" else contextlib.nullcontext():
            found = compare(candidates, repeats).timings
        for name in runs:
            if f"{name}, 1" in found:
                one, two = found[f"{name}, 1"], found[f"{name}, 2"]
                report(name, neighbour, one, two, idle, result)
    torch.set_num_threads(before)


def report(
    name: str, neighbour: str, one: Timing, two: Timing, idle: float, result: Result
) -> None:
    """Write the row of one candidate and judge it."""
    pairs = zip(one.wall_seconds, two.wall_seconds, strict=True)
    speedup = Spread.of([a / b for a, b in pairs])
    result.row(
        network="r18-224",
        candidate=name,
        second_core=neighbour,
        idle_before=idle,
        wall_1_s=one.wall.median,
        wall_2_s=two.wall.median,
        speedup=speedup.median,
        speedup_q1=speedup.q1,
        speedup_q3=speedup.q3,
    )
    if name == "plain":
        return
    label = (
        f"r18-224 {name}: one thread's wait over that of two, second core {neighbour}"
    )
    if neighbour == "busy":
        result.bar(label, speedup.median, 1.0, "at least")
    elif idle < FREE:
        result.skip(label, f"other programs run: cores {100 * idle:.0f} % idle")
    else:
        result.bar(label, speedup.median, SPEEDUP, "at least")


def on_threads(run: Callable[[], None], count: int) -> Callable[[], None]:
    """Return a call on so many threads."""

    def call() -> None:
        torch.set_num_threads(count)
        run()

    return call


def usable_cores() -> list[int]:
    """Return the cores that this process may run on, where that can be told."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def spinning(core: int) -> Iterator[None]:
    """Keep one core busy with another process."""
    pinned = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", pinned])
    try:
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


def idle_share(seconds: float = 2.0) -> float:
    """Return which share of all cores' time nobody uses, NaN where this is not told."""

    def ticks() -> list[int]:
        first = Path("/proc/stat").read_text().splitlines()[0]
        return [int(word) for word in first.split()[1:9]]

    try:
        before = ticks()
        time.sleep(seconds)
        spent = [b - a for a, b in zip(before, ticks(), strict=True)]
    except OSError:
        return float("nan")
    return (spent[3] + spent[4]) / max(sum(spent), 1)
