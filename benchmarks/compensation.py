"""What compensation buys: share of the bytes, accuracy, KL, seconds, peak memory.

    python benchmarks/compensation.py --data DIR --weights DIR [--network resnet20]
        [--parts points fixed few options peers] [--draws N]
    python benchmarks/compensation.py --parts linear

No training and no labels: 1024 augmented training images calibrate. Every row is that
of a whole file on disk, accuracy and KL (from the float network, nats) on the whole
test set; ``kl_held`` is on augmented validation images, and it is the only column that
a setting may be chosen by. ``seconds`` is the compensation with its search for the size
on two threads, without `measure`. ``--draws`` repeats the points with other images.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import fitcompress as fc
import peers
from fitcompress.cli.models import trained_model
from fitcompress.compensate.options import Compensation
from fitcompress.data import Batches, load_dataset
from fitcompress.data.batches import take
from fitcompress.demo import BATCH, TRAIN_EPOCHS
from fitcompress.model import compressible_layers
from fitcompress.model.costs import dense_bytes, overhead_bytes
from fitcompress.storage.save_load import packed_bytes
from fitcompress.train.supervised import train
from fitcompress.zoo import DigitsNet
from harness import Result, Stopwatch, parser, start, stopwatch
from harness.memory import peak_rise

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from fitcompress.data import Dataset

PARTS = ("points", "fixed", "few", "options", "peers", "linear")
WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
SAMPLES = 1024
# Share of the float32 bytes, % → (least accuracy, largest KL). The KL is .9 times that
# of the plain-torch prototype, whose points lie at the same or a larger share.
POINTS = {
    "resnet20": {
        11.9: (91.7, None),
        9.2: (91.7, 0.9 * 0.008),
        6.7: (91.6, 0.9 * 0.034),
        4.6: (90.8, 0.9 * 0.097),
        3.4: (89.0, 0.9 * 0.232),
    },
    "resnet56": {
        6.2: (93.3, 0.9 * 0.021),
        4.4: (92.8, 0.9 * 0.058),
        3.2: (91.8, 0.9 * 0.151),
    },
    "digits": {5.0: (0.0, None)},
}
# Bits of inner layers → (bits of the first and last, least accuracy, largest KL).
FIXED = {
    4: (4, 91.7, 0.9 * 0.010),
    3: (3, 91.4, 0.9 * 0.043),
    2: (4, 89.0, 0.9 * 0.246),
}
SECONDS = {"resnet20": 10.0, "resnet56": 40.0}
OPTIONS = {
    "default": Compensation(),
    "no drift correction": Compensation(drift=0.0),
    "whole drift correction": Compensation(drift=1.0),
    "means not left to norms": Compensation(bias=False),
    "one path": Compensation(beam=1),
    "64 paths": Compensation(beam=64),
    "rate-aware, 0.3": Compensation(rate=0.3),
    "rate-aware, 0.6, rows rescaled": Compensation(rate=0.6, row_scale=True),
    "rows rescaled": Compensation(row_scale=True),
    "ridge 0.5 %": Compensation(damping=0.005),
    "ridge 5 %": Compensation(damping=0.05),
}


@dataclass
class Network:
    """A trained network, its data, and where its rows go."""

    name: str
    dense: nn.Module
    data: Dataset
    result: Result

    def __post_init__(self) -> None:
        self.bytes = dense_bytes(self.dense)
        held = self.data.validation
        augmented = Batches(*held, augment=self.data.augment, seed=99)
        self.held_out = torch.cat([x for x, _ in augmented])
        self.test = self.data.test
        self.wanted = [outputs(self.dense, x) for x in (self.test[0], self.held_out)]

    def calibration(self, samples: int = SAMPLES, seed: int = 0) -> list[torch.Tensor]:
        """Return augmented training images."""
        return [x for x, _ in take(self.data.calibration(seed), samples)]

    def row(
        self,
        method: str,
        size: float,
        small: nn.Module,
        watch: Stopwatch | None = None,
        peak: int | None = None,
        **more: Any,
    ) -> tuple[float, float]:
        """Score a network; returns accuracy and KL on the test set."""
        out, held = outputs(small, self.test[0]), outputs(small, self.held_out)
        found = 100 * float((out.argmax(1) == self.test[1]).float().mean())
        kl = divergence(self.wanted[0], out)
        self.result.row(
            network=self.name,
            method=method,
            share=100 * size / self.bytes,
            accuracy=found,
            kl=kl,
            kl_held=divergence(self.wanted[1], held),
            seconds=watch.wall_seconds if watch else None,
            cpu_s=watch.cpu_seconds if watch else None,
            peak_mb=None if peak is None else peak / 1e6,
            **more,
        )
        print(self.result.rows[-1], file=sys.stderr, flush=True)
        return found, kl


@torch.no_grad()
def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of all samples."""
    model.eval()
    return torch.cat([model(part).log_softmax(1) for part in x.split(250)])


def divergence(wanted: torch.Tensor, out: torch.Tensor) -> float:
    """Return mean KL(p ‖ q) of log-probabilities, nats."""
    return float((wanted.exp() * (wanted - out)).sum(1).double().mean())


def timed(run: Callable[[], Any]) -> tuple[Any, Stopwatch, int | None]:
    """Return what a function returns, its time, and how far memory rose."""
    values = []
    watch = Stopwatch()

    def once() -> None:
        nonlocal watch
        with stopwatch() as watch:
            values.append(run())

    peak = peak_rise(once)
    return values[0], watch, peak


def points(network: Network, sensitivity: fc.Sensitivity, draws: int) -> None:
    """Files of given shares, compensated."""
    for share, (least, largest) in POINTS[network.name].items():
        budget = fc.Budget(size=f"{share}%")
        plan = fc.search(sensitivity, budget)
        for draw in range(draws):
            inputs = network.calibration(seed=1000 * draw)
            small, watch, peak = timed(
                lambda plan=plan, inputs=inputs: fc.apply(
                    network.dense, plan, inputs, samples=None, progress=False
                )
            )
            size = len(packed_bytes(small))
            found, kl = network.row("ours", size, small, watch, peak, draw=draw)
            label = f"{network.name} {share} % draw {draw}"
            bar = network.result.bar
            bar(f"{label}: accuracy", found, least, "at least")
            bar(f"{label}: bytes", size, budget.size_bytes(network.bytes))
            if largest is not None:
                bar(f"{label}: KL", kl, largest)
            if network.name in SECONDS:
                bar(f"{label}: seconds", watch.wall_seconds, SECONDS[network.name])


def uniform(network: nn.Module, inner: int, edges: int) -> tuple[fc.Plan, float]:
    """Return a plan of fixed-point bits per channel, and its bytes if not coded."""
    layers = compressible_layers(network)
    bits = peers.bits_with_edges(network, inner, edges)
    levels = {
        x.name: fc.Level(fc.Grid(bits=bits[x.name]), 0.0, x.shape) for x in layers
    }
    size = sum(bits[x.name] * x.size / 8 + 2 * x.rows for x in layers)
    return fc.Plan(levels), size + overhead_bytes(network, layers)


def fixed(network: Network, draws: int) -> None:
    """Fixed point per channel, no entropy stage."""
    for inner, (edges, least, largest) in FIXED.items():
        plan, size = uniform(network.dense, inner, edges)
        for draw in range(draws):
            inputs = network.calibration(seed=1000 * draw)
            small, watch, peak = timed(
                lambda plan=plan, inputs=inputs: fc.apply(
                    network.dense, plan, inputs, samples=None, progress=False
                )
            )
            found, kl = network.row(
                f"ours, {inner} bits", size, small, watch, peak, draw=draw
            )
            label = f"{network.name} {inner} bits draw {draw}"
            network.result.bar(f"{label}: accuracy", found, least, "at least")
            network.result.bar(f"{label}: KL", kl, largest)


def few(network: Network, sensitivity: fc.Sensitivity) -> None:
    """128 images against rounding with batch norms estimated anew on 1024."""
    for share in (6.7, 4.6):
        plan = fc.search(sensitivity, fc.Budget(size=f"{share}%"))
        inputs = network.calibration(128)
        small, watch, peak = timed(
            lambda plan=plan, inputs=inputs: fc.apply(
                network.dense, plan, inputs, samples=None, progress=False
            )
        )
        size = len(packed_bytes(small))
        _, kl = network.row("ours, 128 images", size, small, watch, peak)
        limit = int(share * network.bytes / 100)
        other = peers.rounded_to_size(
            network.dense, network.calibration(), limit, norms=True
        )
        _, its = network.row(
            "rounding + batch norm, 1024 images", other.bytes, other.model
        )
        network.result.bar(
            f"{network.name} {share} %: KL with 128 images over that of rounding + "
            "batch norm",
            kl / its,
            1.0,
        )


def options(network: Network, sensitivity: fc.Sensitivity, draws: int) -> None:
    """Every part of the method switched, at equal bytes."""
    plan = fc.search(sensitivity, fc.Budget(size="4.6%"))
    for name, choice in OPTIONS.items():
        for draw in range(draws):
            inputs = network.calibration(seed=1000 * draw)
            small, watch, peak = timed(
                lambda choice=choice, inputs=inputs: fc.apply(
                    network.dense,
                    plan,
                    inputs,
                    samples=None,
                    compensation=choice,
                    progress=False,
                )
            )
            size = len(packed_bytes(small))
            network.row(f"option: {name}", size, small, watch, peak, draw=draw)


def others(network: Network) -> None:
    """What else can be had without training, at the same sizes or bits."""
    inputs = network.calibration()
    for share in POINTS[network.name]:
        limit = int(share * network.bytes / 100)
        for norms in (False, True):
            made, watch, peak = timed(
                lambda limit=limit, norms=norms: peers.rounded_to_size(
                    network.dense, inputs, limit, norms=norms
                )
            )
            label = "rounding + batch norm" if norms else "rounding"
            network.row(label, made.bytes, made.model, watch, peak)
        try:
            made, watch, peak = timed(
                lambda limit=limit: peers.nncodec(network.dense, inputs, limit)
            )
            network.row("NNCodec", made.bytes, made.model, watch, peak)
        except ImportError as error:
            network.result.skip("NNCodec", str(error))
    if network.name != "resnet20":
        return
    for inner, (edges, _, _) in FIXED.items():
        bits = peers.bits_with_edges(network.dense, inner, edges)
        _, size = uniform(network.dense, inner, edges)
        rounded, watch, peak = timed(
            lambda bits=bits: peers.rounded_to_bits(
                network.dense, inputs, bits, norms=True
            )
        )
        label = f"rounding + batch norm, {inner} bits"
        network.row(label, size, rounded.model, watch, peak)
        gptq, watch, peak = timed(
            lambda bits=bits: peers.gptq(network.dense, inputs, bits)
        )
        network.row(f"GPTQ, {inner} bits", size, gptq.model, watch, peak)


def linear(result: Result, *, quick: bool) -> None:
    """One 4096×4096 layer from 64 k tokens: seconds, and memory over that of H."""
    width, tokens = (512, 4096) if quick else (4096, 65_536)
    torch.manual_seed(0)
    mix = torch.randn(width, width) / width**0.5
    inputs = [torch.randn(tokens // 64, width) @ mix for _ in range(64)]
    layer = nn.Sequential(nn.Linear(width, width))
    level = fc.Level(fc.Grid(step=0.01), 0.0, (width, width))
    plan = fc.Plan({"0": level})
    small, watch, peak = timed(
        lambda: fc.apply(layer, plan, inputs, samples=None, progress=False)
    )
    rounded = fc.apply(layer, plan, progress=False)
    with torch.no_grad():
        x = torch.randn(1024, width) @ mix
        want = layer(x)
        error, its = (float((m(x) - want).square().mean()) for m in (small, rounded))
    hessian = 8 * width * width
    result.row(
        network=f"linear {width}×{width}, {tokens} tokens",
        method="ours",
        seconds=watch.wall_seconds,
        cpu_s=watch.cpu_seconds,
        peak_mb=None if peak is None else peak / 1e6,
        error_over_rounding=error / its,
    )
    if not quick:
        result.bar("linear: seconds", watch.wall_seconds, 90)
    if peak is not None:
        result.bar("linear: peak over that of H", peak / hessian, 4)


def main() -> None:
    """Run the chosen parts."""
    made = parser(__doc__ or "", threads=2)
    made.add_argument("--data", type=Path, metavar="DIR", help="CIFAR-10")
    made.add_argument("--weights", type=Path, metavar="DIR", help="trained ResNets")
    made.add_argument("--network", default="resnet20", choices=list(POINTS))
    made.add_argument("--parts", nargs="+", default=["points"], choices=PARTS)
    made.add_argument("--draws", type=int, default=1, metavar="N")
    arguments = made.parse_args()
    result = start(arguments)
    parts = set(arguments.parts)
    if "linear" in parts:
        linear(result, quick=arguments.quick)
    if parts - {"linear"}:
        network = load(arguments, result)
        network.row("dense", network.bytes, network.dense)
        inputs = network.calibration(SAMPLES // 2)
        with stopwatch() as watch:
            sensitivity = fc.measure(network.dense, inputs, progress=False)
        print(f"measure: {watch.wall_seconds:.1f} s", file=sys.stderr)
        if "points" in parts:
            points(network, sensitivity, arguments.draws)
        if "fixed" in parts:
            fixed(network, arguments.draws)
        if "few" in parts:
            few(network, sensitivity)
        if "options" in parts:
            options(network, sensitivity, arguments.draws)
        if "peers" in parts:
            others(network)
    result.finish()


def load(arguments: argparse.Namespace, result: Result) -> Network:
    """Return the network that was asked for, with its data."""
    if arguments.network == "digits":
        data = load_dataset("digits", None)
        torch.manual_seed(0)
        dense = DigitsNet()
        train(dense, data.training(BATCH), epochs=TRAIN_EPOCHS, progress=False)
        return Network("digits", dense, data, result)
    if arguments.weights is None:
        message = "--weights: the folder of the trained ResNets is needed"
        raise SystemExit(message)
    weights = arguments.weights / WEIGHTS[arguments.network]
    dense = trained_model(arguments.network, weights)
    return Network(
        arguments.network, dense, load_dataset("cifar10", arguments.data), result
    )


if __name__ == "__main__":
    main()
