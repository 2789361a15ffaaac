"""Bytes on disk against accuracy, whole files, from a trained network to a loaded one.

    python benchmarks/end_to_end.py [--data DIR --weights FILE [--finetune]]

Always: the demo on handwritten digits. With CIFAR-10 and a trained ResNet-20: files of
9.2, 6.7 and 4.6 % of the float32 bytes without any training, and with ``--finetune``
one of 3.4 % after three epochs. Every number is that of the file after it was loaded
into a fresh network, on the whole test set. Beside each file stands one of the same
size whose weights were merely rounded.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import fitcompress as fc
from fitcompress.cli.models import build_model, trained_model
from fitcompress.data import load_dataset
from fitcompress.demo import run_demo
from fitcompress.errors import FitcompressError
from fitcompress.model.costs import dense_bytes
from fitcompress.train import divergence
from harness import Result, Stopwatch, parser, start, stopwatch

if TYPE_CHECKING:
    import argparse

    from torch import nn

    from fitcompress.data import Dataset

# Share of the float32 bytes, % → accuracy that may be lost, points.
UNTRAINED = {9.2: 0.3, 6.7: 0.6, 4.6: 1.5}
FINETUNED = {3.4: 1.2}
EPOCHS = 3
DIGITS = {"share": 5.0, "lost": 1.0, "seconds": 120.0}


def digits(result: Result, seed: int) -> None:
    """Run the demo in a folder of its own and judge it."""
    share = DIGITS["share"]
    with tempfile.TemporaryDirectory() as folder, stopwatch() as watch:
        found = run_demo(Path(folder), size=f"{share}%", seed=seed, say=_say).values
    limit = fc.Budget(size=f"{share}%").size_bytes(found["bytes_before"])
    lost = found["accuracy_before"] - found["accuracy_after"]
    result.row(
        network="digits",
        method="dense",
        share=100.0,
        bytes=found["bytes_before"],
        accuracy=found["accuracy_before"],
    )
    result.row(
        network="digits",
        method="demo, fine-tuned",
        share=100 * found["bytes_after"] / found["bytes_before"],
        bytes=found["bytes_after"],
        accuracy=found["accuracy_after"],
        kl=found["measured_loss_rise"],
        exact=bool(found["bit_exact"]),
        wall_s=watch.wall_seconds,
        cpu_s=watch.cpu_seconds,
    )
    result.bar(f"digits: points lost at {share} %", lost, DIGITS["lost"])
    result.bar("digits: seconds, all of it", found["seconds"], DIGITS["seconds"])
    result.bar("digits: bytes of the file", found["bytes_after"], limit)
    result.bar("digits: loads bit-exactly", found["bit_exact"], 1, "at least")


@dataclass
class Network:
    """A trained network, its data, and where its rows go.

    Attributes:
        name: For rows and bars.
        model: The trained network.
        build: Name of the architecture, to load files into.
        data: Its data set.
        result: Gets rows and bars.
        samples: Calibration samples.
        seed: Seeds labels, augmentation and the order of the training data.
    """

    name: str
    model: nn.Module
    build: str
    data: Dataset
    result: Result
    samples: int
    seed: int

    def __post_init__(self) -> None:
        self.dense = fc.evaluate(self.model, self.data.testing(), progress=False)
        self.bytes = dense_bytes(self.model)
        self.result.row(
            network=self.name,
            method="dense",
            share=100.0,
            bytes=self.bytes,
            accuracy=self.dense.accuracy,
        )

    def measure(self) -> fc.Sensitivity:
        """Return the sensitivity; half of the calibration samples, as ``compress``."""
        with stopwatch() as watch:
            table = fc.measure(
                self.model,
                self.data.calibration(self.seed),
                samples=self.samples // 2,
                seed=self.seed,
            )
        self.result.row(
            network=self.name,
            method="measure, once",
            wall_s=watch.wall_seconds,
            cpu_s=watch.cpu_seconds,
        )
        return table

    def untrained(
        self, table: fc.Sensitivity, share: float, limit: float | None
    ) -> nn.Module:
        """Return the network compressed to a share; rows for it and for mere rounding.

        Args:
            table: What :meth:`measure` returned.
            share: Budget, % of the float32 bytes.
            limit: Points that may be lost; None leaves that unjudged.
        """
        with stopwatch() as watch:
            plan = fc.search(table, fc.Budget(size=f"{share}%"))
            small = fc.apply(
                self.model,
                plan,
                self.data.calibration(self.seed),
                samples=self.samples,
            )
        self.file(small, share, "compensated", watch, limit)
        with stopwatch() as watch:
            rounded = fc.apply(self.model, plan, progress=False)
        self.file(rounded, share, "rounded, no data", watch, None)
        return small

    def finetuned(self, small: nn.Module, share: float, limit: float) -> None:
        """Train ``small`` in place and judge it."""
        with stopwatch() as watch:
            outcome = fc.finetune(
                small,
                self.data.training(seed=self.seed),
                epochs=EPOCHS,
                teacher=self.model,
                validation=self.data.validating(),
                seed=self.seed,
            )
        method = f"fine-tuned, {EPOCHS} epochs"
        if not outcome.kept:  # no better on the validation data
            method += ", start restored"
        self.file(small, share, method, watch, limit)

    def file(
        self,
        small: nn.Module,
        share: float,
        method: str,
        watch: Stopwatch,
        limit: float | None,
    ) -> None:
        """Save, load and score a network: a row, and its bars."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            fc.save(small, path)
            size = path.stat().st_size
            loaded = fc.load(path, build_model(self.build))
        exact = same_bits(small, loaded, self.data.test[0][:100])
        score = fc.evaluate(loaded, self.data.testing(), progress=False)
        self.result.row(
            network=self.name,
            method=method,
            share=100 * size / self.bytes,
            bytes=size,
            accuracy=score.accuracy,
            kl=divergence(self.model, loaded, self.data.testing()),
            exact=exact,
            wall_s=watch.wall_seconds,
            cpu_s=watch.cpu_seconds,
        )
        name = f"{self.name}, {share} %, {method}"
        if limit is not None:
            lost = self.dense.accuracy - score.accuracy
            self.result.bar(f"{name}: points lost", lost, limit)
        allowed = fc.Budget(size=f"{share}%").size_bytes(self.bytes)
        self.result.bar(f"{name}: bytes of the file", size, allowed)
        self.result.bar(f"{name}: loads bit-exactly", exact, 1, "at least")


def same_bits(small: nn.Module, loaded: nn.Module, x: torch.Tensor) -> bool:
    """Whether a loaded network has the saved one's weights and outputs, bit for bit."""
    for key, value in loaded.state_dict().items():
        module, _, name = key.rpartition(".")
        if not torch.equal(getattr(small.get_submodule(module), name), value):
            return False
    with torch.no_grad():
        return torch.equal(small.eval()(x), loaded(x))


def cifar10(result: Result, arguments: argparse.Namespace) -> None:
    """Compress ResNet-20 to each share and judge it."""
    network = Network(
        name="resnet20",
        model=trained_model("resnet20", arguments.weights),
        build="resnet20",
        data=load_dataset("cifar10", arguments.data),
        result=result,
        samples=256 if arguments.quick else arguments.samples,
        seed=arguments.seed,
    )
    table = network.measure()
    for share, limit in UNTRAINED.items():
        if arguments.quick and share != 6.7:
            continue
        network.untrained(table, share, limit)
    if arguments.finetune and not arguments.quick:
        for share, limit in FINETUNED.items():
            network.finetuned(network.untrained(table, share, None), share, limit)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def main() -> None:
    """Run what can be run here."""
    made = parser(__doc__ or "", threads=None)
    made.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("FITCOMPRESS_DATA"),
        help="folder of CIFAR-10's binary files (default: FITCOMPRESS_DATA)",
    )
    made.add_argument("--weights", type=Path, help="checkpoint of a ResNet-20")
    made.add_argument("--finetune", action="store_true", help="3.4 %%, three epochs")
    made.add_argument("--samples", type=int, default=1024, help="calibration samples")
    made.add_argument("--seed", type=int, default=0)
    arguments = made.parse_args()
    try:
        result = start(arguments)
        digits(result, arguments.seed)
        if arguments.data is None or arguments.weights is None:
            result.skip("resnet20", "needs --data and --weights")
        else:
            cifar10(result, arguments)
    except (FitcompressError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    result.finish()


if __name__ == "__main__":
    main()
