"""Packed weights: bytes against the entropy and against others, and speed.

    python benchmarks/storage.py [--data DIR --weights resnet20-12fca82f.th]
        [--sizes 11.9% 6.7% 3.4%] [--parts grid ternary real] [--quick]

``grid``: Gaussian weights, pruned by magnitude and rounded to 2 … 8 bits. ``ternary``:
the shapes of ResNet-18, -1, 0 and 1. ``real``: ResNet-20 on CIFAR-10, compensated.
``entropy`` is the order-0 entropy of the codes in bytes, ``over`` a size over that.
zstd and xz take the best of four dense and sparse forms of the codes. NNCodec codes
exactly the same integers, with adaptive contexts. Speeds are millions of weights a
second of CPU time, one thread, decoding to float32 and encoding from codes; ``two`` is
how much faster in elapsed time two threads are, on 4 million weights, and on 17.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import fitcompress as fc
from fitcompress import _core
from fitcompress.cli.models import trained_model
from fitcompress.data import load_dataset
from fitcompress.model import compressible_layers
from fitcompress.storage.save_load import read
from fitcompress.zoo import resnet18
from harness import compare, parser, start
from storage_peers import (
    entropy_bytes,
    nncodec_bytes,
    packed_forms,
    peers_of,
)

if TYPE_CHECKING:
    import argparse

    from harness import Result
    from storage_peers import Codes

BITS = (2, 3, 4, 5, 6, 8)
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95)
SHAPES = ((96, 108), (128, 801), (1024, 1024))  # above 10 000, 100 000; for speed
OVER = {10_000: 1.03, 100_000: 1.01}  # weights → most bytes over the entropy
TERNARY = {0.85: 1_120_000, 0.88: 960_000}  # zeros → most bytes
DECODE, ENCODE, TWO = 300.0, 50.0, 1.7


def gaussian(bits: int, sparsity: float, shape: tuple[int, int]) -> Codes:
    """Return codes of Gaussian weights; the largest magnitude kept is .8 of all."""
    w = np.random.default_rng(bits).standard_normal(shape)
    if sparsity:
        w[np.abs(w) <= np.quantile(np.abs(w), sparsity)] = 0
    if bits == 2 and sparsity:
        return np.sign(w).astype(np.int32)
    largest = 2 ** (bits - 1) - 1
    step = 0.8 * np.abs(w).max() / largest if bits > 2 else 1.2
    return np.clip(np.rint(w / step), -largest, largest).astype(np.int32)


def sizes(codes: Codes, bits: int) -> dict[str, Any]:
    """Return the bytes of every way to store codes."""
    forms = packed_forms(codes, bits)
    return {
        "entropy": entropy_bytes(codes),
        "static": len(_core.encode(codes, coding="static")),
        "smallest": len(_core.encode(codes)),
        **{name: len(run()) for name, run in peers_of(forms).items()},
    }


def speeds(codes: Codes, turns: int) -> dict[str, float]:
    """Return millions of weights a second, static and adaptive, and of two threads."""
    scales = np.full(len(codes), 0.01, np.float32)
    static = _core.encode(codes, coding="static")
    adaptive = _core.encode(codes, coding="adaptive")
    shape = codes.shape
    runs = {
        "decode": lambda: _core.dequantize(static, *shape, scales),
        "encode": lambda: _core.encode(codes, coding="static"),
        "adaptive decode": lambda: _core.dequantize(adaptive, *shape, scales),
        "adaptive encode": lambda: _core.encode(codes, coding="adaptive"),
    }
    timings = compare(runs, turns).timings
    return {name: codes.size / 1e6 / t.cpu.median for name, t in timings.items()}


def two_threads(codes: Codes, copies: int, turns: int) -> float:
    """Return elapsed time of one thread over that of two, for so many matrices in one.

    The result is a new array each time, as in use: of large ones the system maps and
    frees the pages in one thread.
    """
    many = np.tile(codes, (copies, 1))
    scales = np.full(len(many), 0.01, np.float32)
    data = _core.encode(many, coding="static", threads=2)
    runs = {
        str(n): lambda n=n: _core.dequantize(data, *many.shape, scales, threads=n)
        for n in (1, 2)
    }
    timings = compare(runs, turns).timings
    return timings["1"].wall.median / timings["2"].wall.median


def judge(result: Result, name: str, count: int, cells: dict[str, Any]) -> None:
    """Judge the size of one matrix of codes."""
    limit = OVER[max(n for n in OVER if n <= count)]
    result.bar(f"{name}: over the entropy", cells["smallest"] / cells["entropy"], limit)
    for peer in ("zstd -19", "xz -9e"):
        over = cells["smallest"] / cells[peer]
        result.bar(f"{name}: over {peer}", over, 1.0)


def grid(result: Result, turns: int) -> None:
    """Measure Gaussian weights at every bit-width and sparsity."""
    for shape in SHAPES:
        for bits in BITS:
            for sparsity in SPARSITIES:
                codes = gaussian(bits, sparsity, shape)
                name = f"{codes.size} weights, {bits} bits, {100 * sparsity:g} % zeros"
                cells = sizes(codes, bits)
                judge(result, name, codes.size, cells)
                if shape == SHAPES[-1]:
                    cells |= speeds(codes, turns)
                if shape == SHAPES[-1] and bits <= 4 and sparsity == 0.8:
                    cells["two"] = two_threads(codes, 4, turns)
                    cells["two, large"] = two_threads(codes, 16, turns)
                    limits = {"decode": DECODE, "encode": ENCODE}
                    limits |= {"two": TWO, "two, large": TWO}
                    for key, limit in limits.items():
                        result.bar(f"{name}: {key}", cells[key], limit, "at least")
                _row(result, case=name, **cells)


def ternary(result: Result) -> None:
    """Measure the shapes of a ResNet-18 with ternary codes, as one file."""
    for zeros, limit in TERNARY.items():
        rng = np.random.default_rng(0)
        codes, sections = {}, 0
        for layer in compressible_layers(resnet18()):
            shape = (layer.shape[0], layer.size // layer.shape[0])
            kept = rng.random(shape) >= zeros
            codes[layer.name] = (kept * rng.choice((-1, 1), shape)).astype(np.int32)
            sections += len(_core.encode(codes[layer.name], coding="static"))
        everything = np.concatenate([each.reshape(-1) for each in codes.values()])
        cells = {
            "entropy": entropy_bytes(everything),
            "static": sections,
            "smallest": sum(len(_core.encode(each)) for each in codes.values()),
        }
        for peer, run in peers_of(packed_forms(everything, 2)).items():
            cells[peer] = len(run())
        name = f"ternary ResNet-18, {100 * zeros:g} % zeros"
        result.bar(f"{name}: bytes", cells["smallest"], limit)
        _row(result, case=name, **cells)


def real(result: Result, arguments: argparse.Namespace) -> None:
    """Measure a compensated network: whole files, and its codes alone."""
    model = trained_model("resnet20", arguments.weights)
    source = load_dataset("cifar10", arguments.data)
    table = fc.measure(model, source.calibration(), samples=512, progress=False)
    for size in arguments.sizes:
        plan = fc.search(table, fc.Budget(size=size))
        loader = source.calibration(1)
        small = fc.apply(model, plan, calibrate=loader, progress=False)
        file = Path(arguments.folder) / f"{size.rstrip('%')}.safetensors"
        whole = fc.save(small, file)
        content = read(file)
        codes = {
            f"{name}.weight": weight.codes.reshape(weight.level.shape).numpy()
            for name, weight in content.weights.items()
        }
        matrices = [each.reshape(len(each), -1) for each in codes.values()]
        widest = max(int(np.abs(each).max()) for each in matrices)
        flat = np.concatenate([each.reshape(-1) for each in matrices])
        bits = int(widest).bit_length() + 1
        cells: dict[str, Any] = {
            "entropy": sum(entropy_bytes(each) for each in matrices),
            "static": sum(len(_core.encode(e, coding="static")) for e in matrices),
            "smallest": sum(len(_core.encode(each)) for each in matrices),
            **{n: len(run()) for n, run in peers_of(packed_forms(flat, bits)).items()},
        }
        name = f"ResNet-20 at {size}"
        try:
            cells["NNCodec"] = len(nncodec_bytes(codes))
            over = cells["smallest"] / cells["NNCodec"]
            result.bar(f"{name}: over NNCodec", over, 1.01)
        except ImportError as error:
            result.skip(f"{name}: NNCodec", str(error))
        found = fc.inspect(file)
        cells |= {
            "file": whole,
            "predicted": plan.size_bytes,
            "leftovers": found.leftover_bytes,
            "container": found.container_bytes,
        }
        _row(result, case=name, **cells)


def _row(result: Result, **cells: Any) -> None:
    result.row(**cells)
    print(result.rows[-1], file=sys.stderr, flush=True)


def main() -> None:
    """Run the chosen parts."""
    made = parser(__doc__ or "", threads=1)
    parts = ("grid", "ternary", "real")
    made.add_argument("--parts", nargs="+", choices=parts, default=[*parts])
    made.add_argument("--data", type=Path, help="CIFAR-10, binary")
    made.add_argument("--weights", type=Path, help="a trained ResNet-20")
    made.add_argument("--sizes", nargs="+", default=["11.9%", "6.7%", "3.4%"])
    made.add_argument("--folder", type=Path, default=Path("/tmp"), help="for files")
    arguments = made.parse_args()
    result = start(arguments)
    torch.manual_seed(0)
    if "grid" in arguments.parts:
        grid(result, 3 if arguments.quick else 9)
    if "ternary" in arguments.parts:
        ternary(result)
    if "real" in arguments.parts:
        if arguments.data and arguments.weights:
            real(result, arguments)
        else:
            result.skip("real", "needs --data and --weights")
    result.finish()


if __name__ == "__main__":
    main()
