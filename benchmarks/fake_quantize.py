"""Fused quantize-prune for training: time over a memcpy, and what others need.

    python benchmarks/fake_quantize.py [--sizes 512x4608 ...] [--groups 0 64 ...]
        [--dtypes float32 bfloat16 float16] [--candidates ours affine ...] [--repeats N]

``memcpy`` copies as many bytes as the pass must move between existing tensors, masks
aside: forward reads w and writes ŵ, one copy of w; backward reads the gradient and w
and writes a gradient, one and a half. ``clone`` copies into new memory, as every
candidate does: of large tensors, page by page, which costs more than the copy.
``ratio`` is CPU time over that of ``memcpy``, turn by turn. Backward is timed alone,
through autograd, on a graph that is kept. ``differ`` is the share of elements that are
not the twin's to the last bit, of ŵ or of the gradient of w; ``scale_deviation`` is
‖s − t‖ / ‖t‖ for Δ's gradient.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import torch

from harness import Missing, compare, parser, peer, start
from quantize_peers import PEERS, Case, build

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Comparison, Result

SIZES = ("64x576", "512x4608", "4096x11008")
DTYPES = ("float32", "bfloat16", "float16")
LIMITS = {"forward": 1.5, "backward": 2.0}  # over memcpy
STREAMS = {"forward": 1.0, "backward": 1.5}  # copies of the weight
CACHED = 1 << 20  # bytes of a weight that stays in L2: memcpy is no bound there
DEVIATION = 1e-5


def copies(case: Case, direction: str) -> dict[str, Callable[[], Any]]:
    """Return the two copies of as many bytes as a pass moves."""
    count = int(case.weight.numel() * STREAMS[direction])
    source = torch.randn(count).to(case.weight.dtype)
    target = torch.empty_like(source).fill_(1)
    return {"memcpy": lambda: target.copy_(source), "clone": source.clone}


def forward(
    name: str, case: Case, expected: torch.Tensor
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return a candidate's forward pass, and how far it is from the twin."""
    with torch.no_grad():
        run = PEERS[name](case)
        cells = {"differ": float((run() != expected).float().mean())}

    def step() -> None:
        with torch.no_grad():
            run()

    return step, cells


def backward(
    name: str, case: Case, expected: tuple[torch.Tensor, torch.Tensor]
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return a candidate's backward pass, and how far it is from the twin."""
    result = PEERS[name](case)()
    leaves = (case.weight, case.scale)

    def step() -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(
            result, leaves, case.grad, retain_graph=True, allow_unused=True
        )

    weight, scale = step()
    if weight is None:
        message = "no gradient of the weight"
        raise NotImplementedError(message)
    cells: dict[str, Any] = {"differ": float((weight != expected[0]).float().mean())}
    if scale is not None:
        wanted = expected[1].double()
        distance = (scale.double() - wanted).norm()
        cells["scale_deviation"] = float(distance / wanted.norm())
    return step, cells


def measure(
    case: Case, direction: str, names: list[str], label: str, result: Result, turns: int
) -> None:
    """Time all candidates of one direction, add their rows and judge ours."""
    value, *grads = case.expected()
    runs: dict[str, Callable[[], Any] | Missing] = {**copies(case, direction)}
    columns: dict[str, dict[str, Any]] = {name: {} for name in runs}
    for name in names:

        def make(name: str = name) -> Callable[[], Any]:
            if direction == "forward":
                step, columns[name] = forward(name, case, value)
            else:
                step, columns[name] = backward(name, case, (grads[0], grads[1]))
            return step

        try:
            runs[name] = peer(make)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            if name == "ours":
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            runs[name] = Missing(reason)
    found = compare(runs, turns)
    for name, reason in found.skipped.items():
        result.skip(f"{label} {direction}: {name}", reason)
    for name, timing in found.timings.items():
        ratio = found.ratio(name, "memcpy")
        result.row(
            case=label,
            direction=direction,
            candidate=name,
            ratio=ratio.median,
            ratio_q1=ratio.q1,
            ratio_q3=ratio.q3,
            over_clone=found.ratio(name, "clone").median,
            cpu_ms=timing.cpu.median * 1e3,
            ns_a_weight=timing.cpu.median * 1e9 / case.weight.numel(),
            **columns[name],
        )
        print(result.rows[-1], file=sys.stderr, flush=True)
    if "ours" in found.timings:
        judge(case, direction, label, found, columns["ours"], result)


def judge(
    case: Case,
    direction: str,
    label: str,
    found: Comparison,
    cells: dict[str, Any],
    result: Result,
) -> None:
    """Judge ours: exactness, time over memcpy, and over the fastest other."""
    name = f"{label} {direction}: ours"
    result.bar(f"{name}, share that differs from the twin", cells["differ"], 0.0)
    if "scale_deviation" in cells:
        deviation = cells["scale_deviation"]
        result.bar(f"{name}, deviation of Δ's gradient", deviation, DEVIATION)
    if case.weight.numel() * case.weight.element_size() > CACHED:
        ratio = found.ratio("ours", "memcpy").median
        result.bar(f"{name} over memcpy", ratio, LIMITS[direction])
    peers = [n for n in found.timings if n in PEERS and n != "ours"]
    over = {n: found.ratio("ours", n).median for n in peers}
    if over:
        best = max(over, key=lambda n: over[n])
        result.bar(f"{name} over {best}, the fastest other", over[best], 1.0)


def _size(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        message = f"wanted ROWSxCOLUMNS, got {text}"
        raise argparse.ArgumentTypeError(message)
    return int(rows), int(columns)


def main() -> None:
    """Run all chosen cases."""
    made = parser(__doc__ or "", threads=1)
    made.add_argument("--sizes", nargs="+", type=_size, default=[*map(_size, SIZES)])
    made.add_argument("--groups", nargs="+", type=int, default=[0, 64, 32])
    made.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    names = list(PEERS)
    made.add_argument("--candidates", nargs="+", default=names, choices=names)
    made.add_argument("--repeats", type=int, metavar="N", help="turns (default: 15)")
    arguments = made.parse_args()
    result = start(arguments)
    turns = arguments.repeats or (3 if arguments.quick else 15)
    sizes = arguments.sizes[:2] if arguments.quick else arguments.sizes
    for rows, columns in sizes:
        for dtype in arguments.dtypes:
            for group in arguments.groups:
                label = f"{rows}x{columns} {dtype}" + f" group {group}" * (group > 0)
                if group and columns % group:
                    result.skip(label, "the group does not divide the columns")
                    continue
                case = build(rows, columns, getattr(torch, dtype), group)
                for direction in LIMITS:
                    chosen = arguments.candidates
                    measure(case, direction, chosen, label, result, turns)
    result.finish()


if __name__ == "__main__":
    main()
