"""Fisher moments per sample: cost over a plain forward and backward, and exactness.

    python benchmarks/fisher.py [--networks r20 r18-32 r18-224 bert] [--repeats N]
        [--candidates plain ours hooks ...] [--parts cost memory threads]

Networks are as initialised, in eval mode, inputs and labels random, the loss is the
mean cross-entropy. ``ratio`` is CPU time over that of ``plain``, turn by turn.
``deviation`` is the worst layer's from batches of one sample, in float64 (see
``fisher_peers/reference.py``): |T − T₁| / T₁ for traces, ‖F − F₁‖ / ‖F₁‖ for diagonals.
``peak_mb`` is how far two batches raise the resident memory of a fresh process that
holds network, batch and warm libraries. The part ``threads`` measures the wait on
two threads, with the second core free and busy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fisher_threads
from fisher_peers import CANDIDATES, NETWORKS, build, reference, tiny
from harness import Missing, compare, parser, peer, start
from harness.memory import peak_rise

if TYPE_CHECKING:
    from collections.abc import Callable

    from fisher_peers import Candidate, Case
    from harness import Comparison, Result

PARTS = ("cost", "memory", "threads")
# CPU time over that of plain: trace and diagonal.
LIMITS = {
    "r20": {"trace": 1.10, "diagonal": 1.30},
    "r18-32": {"trace": 0.70, "diagonal": 1.20},
    "r18-224": {"trace": 0.95, "diagonal": 1.10},
    "bert": {"trace": 0.70, "diagonal": 1.05},
}
DEVIATION = 1e-6
PEAK = 1.3  # over that of plain

Values = dict[str, torch.Tensor]


def deviation(values: Values, wanted: Values) -> float:
    """Return the worst layer's distance, relative to the norm of what is wanted."""
    return max(
        float((value.double() - wanted[name]).norm() / wanted[name].norm())
        for name, value in values.items()
    )


def made(name: str, case: Case, diagonal: bool) -> Candidate:
    """Return a candidate that no other can disturb."""
    kind = CANDIDATES[name]
    return kind(case.copy() if kind.changes_model else case, diagonal)


def tried(
    name: str, case: Case, diagonal: bool, wanted: Values
) -> tuple[Callable[[], None] | Missing, dict[str, Any]]:
    """Run one step of a candidate; return how to go on, and its columns."""
    found: dict[str, Any] = {}

    def make() -> Callable[[], None]:
        candidate = made(name, case, diagonal)
        candidate.step()
        values = candidate.values()
        found["layers"] = len(values) or None
        found["exact"] = candidate.exact if values else None
        found["deviation"] = deviation(values, wanted) if values else None
        return candidate.step

    try:
        return peer(make), found
    except (RuntimeError, NotImplementedError) as error:
        if name == "ours":
            raise
        return Missing(f"{type(error).__name__}: {error}".splitlines()[0]), found


def cost(
    name: str,
    what: str,
    candidates: list[str],
    result: Result,
    repeats: int,
    quick: bool,
) -> dict[str, dict[str, Any]]:
    """Measure one quantity of one network; return columns by candidate."""
    case, diagonal = build(name, quick=quick), what == "diagonal"
    wanted = reference(case, diagonal)
    runs: dict[str, Callable[[], None] | Missing] = {}
    columns: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        runs[candidate], columns[candidate] = tried(candidate, case, diagonal, wanted)
    found = compare(runs, repeats)
    for candidate, reason in found.skipped.items():
        result.skip(f"{name}: {candidate} {what}", reason)
        del columns[candidate]
    for candidate, cells in columns.items():
        ratio, cpu = found.ratio(candidate, "plain"), found.timings[candidate].cpu
        cells.update(ratio=ratio.median, ratio_q1=ratio.q1, ratio_q3=ratio.q3)
        cells.update(cpu_s=cpu.median, cpu_min_s=cpu.minimum)
    if "ours" in columns:
        judge(f"{name} {what}", LIMITS[name][what], found, columns, result)
    return columns


def judge(
    label: str,
    limit: float,
    found: Comparison,
    columns: dict[str, dict[str, Any]],
    result: Result,
) -> None:
    """Judge ours: its cost, its exactness, and the fastest of the exact others."""
    ours = columns["ours"]
    result.bar(f"{label}: ours over plain", ours["ratio"], limit)
    result.bar(f"{label}: deviation of ours", ours["deviation"], DEVIATION)
    others = [name for name, cells in columns.items() if cells["exact"]]
    over = {n: found.ratio("ours", n).median for n in others if n != "ours"}
    if over:
        best = max(over, key=lambda name: over[name])
        bar = f"{label}: ours over {best}, the fastest exact other"
        result.bar(bar, over[best], 1.0)


def memory(
    name: str,
    what: str,
    candidates: list[str],
    result: Result,
    arguments: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """Measure the memory of each candidate in a process of its own."""
    columns: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        command = [
            sys.executable,
            str(Path(__file__)),
            "--memory-of",
            name,
            what,
            candidate,
        ]
        command += ["--threads", str(arguments.threads)]
        command += ["--quick"] if arguments.quick else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            reason = f"memory: the process ended with {done.returncode}"
            result.skip(f"{name}: {candidate} {what}", reason)
            continue
        told = json.loads(done.stdout.splitlines()[-1])
        if "missing" in told:
            result.skip(f"{name}: {candidate} {what}", told["missing"])
        elif told["peak"] is not None:
            columns[candidate] = {"peak_mb": told["peak"] / 1e6}
    if "plain" in columns:
        for cells in columns.values():
            cells["peak_ratio"] = cells["peak_mb"] / columns["plain"]["peak_mb"]
        if "ours" in columns:
            ratio = columns["ours"]["peak_ratio"]
            result.bar(f"{name} {what}: peak of ours over that of plain", ratio, PEAK)
    return columns


def memory_of(name: str, what: str, candidate: str, *, quick: bool) -> dict[str, Any]:
    """Return the peak of a candidate's first batches; for a process of its own."""
    kind, diagonal = CANDIDATES[candidate], what == "diagonal"
    found = peer(lambda: kind(tiny(), diagonal).step)  # imports and first calls
    if isinstance(found, Missing):
        return {"missing": found.reason}
    found()
    case = build(name, quick=quick)

    def batches() -> None:
        made = kind(case, diagonal)
        made.step()
        made.step()  # beside what the first one left

    return {"peak": peak_rise(batches)}


def main() -> None:
    """Run the chosen parts."""
    made = parser(__doc__ or "", threads=1)
    names = list(NETWORKS)
    made.add_argument("--networks", nargs="+", default=names, choices=names)
    names = list(CANDIDATES)
    made.add_argument("--candidates", nargs="+", default=names, choices=names)
    made.add_argument("--parts", nargs="+", default=["cost", "memory"], choices=PARTS)
    made.add_argument("--repeats", type=int, metavar="N", help="turns (default: 7)")
    made.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    arguments = made.parse_args()
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    if arguments.memory_of:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(memory_of(*arguments.memory_of, quick=arguments.quick)))
        return
    result = start(arguments)
    repeats = arguments.repeats or (2 if arguments.quick else 7)
    chosen = [n for n in CANDIDATES if n == "plain" or n in arguments.candidates]
    for name in arguments.networks:
        for what in ("trace", "diagonal"):
            some = [n for n in chosen if what in CANDIDATES[n].quantities]
            columns: dict[str, dict[str, Any]] = {}
            if "cost" in arguments.parts:
                columns = cost(name, what, some, result, repeats, arguments.quick)
            if "memory" in arguments.parts:
                for n, cells in memory(name, what, some, result, arguments).items():
                    columns.setdefault(n, {}).update(cells)
            for n, cells in columns.items():
                result.row(network=name, quantity=what, candidate=n, **cells)
                print(result.rows[-1], file=sys.stderr, flush=True)
    if "threads" in arguments.parts:
        fisher_threads.measure(build("r18-224", quick=arguments.quick), result, repeats)
    result.finish()


if __name__ == "__main__":
    main()
