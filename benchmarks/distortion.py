"""Distortion tables: time per weight for 6 bits × 16 sparsities, and what others need.

    python benchmarks/distortion.py [--cases resnet18 bert wide llama shards]
        [--candidates ours fisher naive sorted classes compiled read copy] [--repeats N]

Weights are random, of the shapes of the networks. Times are CPU time per weight over
all layers of a case, one thread; ratios are turn by turn. The plain-torch versions
(``table_peers.py``) compute distortion and non-zeros only; ours also entropies, step
lengths and thresholds. ``fisher`` is ours with a Fisher diagonal and the importance
(F + mean F)·θ². ``read`` is one sum over the weights, ``copy`` a copy into existing
memory. ``threads`` repeats ours on two threads, by elapsed time. ``memory`` is how far
one call raises the resident memory of a fresh process over the bytes of its layer.
``llama`` are the 226 matrices of a model of 7 billion parameters in bfloat16, made one
after the other (not timed); ``shards`` reads one of its blocks from a file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from fitcompress import ops
from fitcompress.sensitivity.streaming import measure_shards
from fitcompress.sensitivity.table import Grid
from fitcompress.threads import threads
from fitcompress.zoo.resnet_imagenet import resnet18
from harness import compare, parser, peer, start
from harness.memory import peak_rise
from table_peers import PEERS, compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness import Result

BITS = (2, 3, 4, 5, 6, 8)
SPARSITIES = tuple(0.95 * i / 16 for i in range(16))
NS, NAIVE, TORCH, FISHER = 6.5, 55.0, 20.0, 1.5
THREADS, MEMORY = 1.7, 0.10
LARGE = 1_000_000  # weights from which on extra memory is judged
CANDIDATES = ("ours", "fisher", "naive", "sorted", "classes", "compiled", "read")
CASES = ("resnet18", "bert", "wide", "llama", "shards")
BLOCK = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
BLOCK |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}

Shape = tuple[int, int]


def shapes(case: str) -> list[Shape]:
    """Return the matrices of a case."""
    if case == "resnet18":
        kinds = (nn.Conv2d, nn.Linear)
        found = [m.weight for m in resnet18().modules() if isinstance(m, kinds)]
        return [(len(w), w[0].numel()) for w in found]
    if case == "bert":
        block = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
        return [(30522, 768), (512, 768), *block * 12]
    if case == "wide":
        return [(4096, 11008)]
    return [(32000, 4096), *list(BLOCK.values()) * 32, (32000, 4096)]


def made(shape: Shape, seed: int = 0) -> torch.Tensor:
    """Return a weight whose rows have different widths."""
    generator = torch.Generator().manual_seed(seed)
    width = 0.01 * (0.5 + torch.rand(shape[0], 1, generator=generator))
    return torch.randn(shape, generator=generator).mul_(width)


def table(
    weight: torch.Tensor, fisher: torch.Tensor | None = None
) -> ops.DistortionTable:
    """Return our table."""
    smoothing = float("inf") if fisher is None else 1.0
    return ops.distortion_table(
        weight, fisher, BITS, (), SPARSITIES, smoothing=smoothing
    )


def check(weight: torch.Tensor, name: str, run: Callable[..., Any]) -> None:
    """Raise unless a candidate has our numbers."""
    wanted = table(weight)
    distortion, nonzero = run(weight, None, BITS, SPARSITIES)
    torch.testing.assert_close(distortion, wanted.distortion, rtol=1e-6, atol=0)
    # where importances tie, a version without positions drops one weight or another
    off = (nonzero - wanted.nnz).abs().max()
    if off > (0 if name in ("naive", "sorted") else 1e-6 * weight.numel() + 2):
        message = f"{name}: non-zeros are {int(off)} off"
        raise AssertionError(message)


def candidate(
    name: str, weights: list[torch.Tensor], fishers: list[torch.Tensor]
) -> Callable[[], None]:
    """Return a function that runs a candidate on all layers."""
    if name == "ours":
        return lambda: [table(w) for w in weights] and None
    if name == "fisher":
        return lambda: (
            [table(w, f) for w, f in zip(weights, fishers, strict=True)] and None
        )
    if name == "read":
        return lambda: [w.sum() for w in weights] and None
    run = compiled() if name == "compiled" else PEERS[name]
    check(weights[0], name, run)
    return lambda: [run(w, None, BITS, SPARSITIES) for w in weights] and None


def times(
    case: str, names: list[str], result: Result, turns: int, *, quick: bool
) -> None:
    """Time the candidates of a case in turns and judge ours."""
    wanted = shapes(case)[::4] if quick else shapes(case)
    weights = [made(shape, seed) for seed, shape in enumerate(wanted)]
    fishers = [torch.rand_like(w) for w in weights] if "fisher" in names else []
    count = sum(w.numel() for w in weights)
    runs = {n: peer(lambda n=n: candidate(n, weights, fishers)) for n in names}
    found = compare(runs, turns, shortest=0.0)
    for name, reason in found.skipped.items():
        result.skip(f"{case}: {name}", reason)
    for name, timing in found.timings.items():
        over = found.ratio(name, "ours").median if "ours" in found.timings else None
        ns = 1e9 * timing.cpu.median / count
        result.row(case=case, candidate=name, ns_a_weight=ns, over_ours=over)
        print(result.rows[-1], file=sys.stderr, flush=True)
    if "ours" not in found.timings:
        return
    ours = 1e9 * found.timings["ours"].cpu.median / count
    result.bar(f"{case}: ns per weight", ours, NS)
    if "fisher" in found.timings:
        ratio = found.ratio("fisher", "ours").median
        result.bar(f"{case}: with Fisher over without", ratio, FISHER)
    if "naive" in found.timings:
        ratio = found.ratio("naive", "ours").median
        result.bar(f"{case}: naive torch over ours", ratio, NAIVE, "at least")
    others = [n for n in found.timings if n in ("sorted", "classes", "compiled")]
    if others:
        over = {n: found.ratio(n, "ours").median for n in others}
        best = min(over, key=lambda n: over[n])
        name = f"{case}: {best}, the best plain torch, over ours"
        result.bar(name, over[best], TORCH, "at least")
    two_threads(case, weights, result, turns)


def two_threads(
    case: str, weights: list[torch.Tensor], result: Result, turns: int
) -> None:
    """Compare the elapsed time of ours on one and on two threads, in turns."""
    spent: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(turns):
        for count, seconds in spent.items():
            with threads(count):
                first = time.perf_counter()
                for weight in weights:
                    table(weight)
                seconds.append(time.perf_counter() - first)
    ratios = sorted(a / b for a, b in zip(spent[1], spent[2], strict=True))
    ratio = ratios[len(ratios) // 2]
    result.row(case=case, candidate="two threads", speed_up=ratio)
    result.bar(f"{case}: two threads over one", ratio, THREADS, "at least")


def memory(case: str, result: Result) -> None:
    """Measure the extra memory of the largest layer, in a process of its own."""
    rows, columns = max(shapes(case), key=lambda shape: shape[0] * shape[1])
    for fisher in (False, True):
        command = [sys.executable, __file__, "--memory-of", str(rows), str(columns)]
        output = subprocess.run(
            [*command, str(int(fisher))], check=True, capture_output=True, text=True
        ).stdout
        rise = json.loads(output)
        share = rise / (4 * rows * columns)
        label = f"{case}: extra memory over the layer" + ", Fisher" * fisher
        result.row(case=case, candidate="memory", extra_mb=rise / 1e6, over_layer=share)
        if rows * columns >= LARGE:
            result.bar(label, share, MEMORY)


def print_memory(rows: int, columns: int, fisher: int) -> None:
    """Print how far one table raises the memory of this process."""
    weight = made((rows, columns))
    diagonal = torch.rand_like(weight) if fisher else None
    table(weight[:8].clone(), None if diagonal is None else diagonal[:8].clone())
    print(json.dumps(peak_rise(lambda: table(weight, diagonal))))


def llama(result: Result, *, quick: bool) -> None:
    """Stream the matrices of 7 billion parameters, made one after the other."""

    def layers() -> Iterator[torch.Tensor]:
        for seed, shape in enumerate(shapes("llama")[: 9 if quick else None]):
            yield made(shape, seed).bfloat16()

    spent, count = 0.0, 0
    for weight in layers():
        first = time.process_time()
        table(weight)
        spent += time.process_time() - first
        count += weight.numel()
    ns = 1e9 * spent / count
    result.row(case="llama", candidate="ours", weights=count, ns_a_weight=ns)
    result.bar(f"llama, {count / 1e9:.2f} billion: ns per weight", ns, NS)


def shards(result: Result) -> None:
    """Measure one block of that model from a file, in a process of its own."""
    command = [sys.executable, __file__, "--shards-of"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.safetensors"
        block = {
            f"block.{n}.weight": made(s, i).bfloat16()
            for i, (n, s) in enumerate(BLOCK.items())
        }
        save_file(block, path)
        count = sum(w.numel() for w in block.values())
        largest = max(2 * w.numel() for w in block.values())
        del block
        output = subprocess.run(
            [*command, str(path)], check=True, capture_output=True, text=True
        ).stdout
    found = json.loads(output)
    result.row(
        case="shards",
        candidate="measure_shards",
        ns_a_weight=1e9 * found["cpu_s"] / count,
        extra_mb=found["peak"] / 1e6,
        over_layer=found["peak"] / largest,
    )


def print_shards(path: str) -> None:
    """Print time and memory of measuring a file."""
    grids = tuple(Grid(bits=b) for b in sorted(BITS, reverse=True))
    torch.set_num_threads(1)
    first = time.process_time()
    peak = peak_rise(
        lambda: measure_shards(path, grids=grids, sparsities=SPARSITIES, progress=False)
    )
    print(json.dumps({"cpu_s": time.process_time() - first, "peak": peak}))


def main() -> None:
    """Run all chosen cases."""
    made_parser = parser(__doc__ or "", threads=1)
    made_parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    made_parser.add_argument(
        "--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES
    )
    made_parser.add_argument("--repeats", type=int, metavar="N")
    made_parser.add_argument("--memory-of", nargs=3, type=int, help=argparse.SUPPRESS)
    made_parser.add_argument("--shards-of", help=argparse.SUPPRESS)
    arguments = made_parser.parse_args()
    if arguments.memory_of:
        return print_memory(*arguments.memory_of)
    if arguments.shards_of:
        return print_shards(arguments.shards_of)
    result = start(arguments)
    turns = arguments.repeats or (2 if arguments.quick else 5)
    for case in arguments.cases:
        if case == "llama":
            llama(result, quick=arguments.quick)
        elif case == "shards":
            shards(result)
        else:
            chosen, quick = arguments.candidates, arguments.quick
            times(case, chosen, result, turns, quick=quick)
            memory(case, result)
    return result.finish()


if __name__ == "__main__":
    main()
