"""The demo: handwritten digits, a small network, 5 % of its bytes.

Every stage leaves a file in the output folder; a killed demo, started again with the same
settings, goes on after the last finished stage and ends with the same numbers.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from fitcompress.compensate import apply
from fitcompress.data import load_dataset
from fitcompress.errors import FitcompressError, FormatError, OutputError
from fitcompress.files import write_atomically
from fitcompress.methods import Lagrangian, PathSearch
from fitcompress.model.costs import dense_bytes
from fitcompress.report import Report, report
from fitcompress.search import Budget, Plan, search
from fitcompress.sensitivity.measurement import measure
from fitcompress.sensitivity.table import Sensitivity
from fitcompress.storage.save_load import load, save
from fitcompress.train import evaluate, finetune
from fitcompress.train.supervised import train
from fitcompress.zoo import DigitsNet

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fitcompress.data import Dataset

__all__ = ["DemoResult", "run_demo"]

TRAIN_EPOCHS, TUNE_EPOCHS = 24, 6
STAGES = (
    "trained.safetensors",
    "sensitivity.safetensors",
    "plan.json",
    "small.safetensors",
    "tuned.safetensors",
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        report: Dense against fine-tuned, on the test set.
        values: The numbers for ``--json``.
        page: The HTML report.
    """

    report: Report
    values: dict[str, Any]
    page: Path


class _Demo:
    def __init__(self, folder: Path, size: str, seed: int, say: Callable[[str], None]) -> None:
        self.folder, self.size, self.seed, self.say = folder, size, seed, say
        self.data: Dataset = load_dataset("digits")
        self.resumed: list[str] = []

    def path(self, name: str) -> Path:
        return self.folder / name

    def stage(self, name: str, make: Callable[[], Any], read: Callable[[], Any]) -> Any:
        """Return what a former run left, or make it."""
        if self.path(name).exists():
            try:
                found = read()
            except FitcompressError as error:
                self.say(f"  {name} cannot be used and is made again: {error}")
            else:
                self.resumed.append(name)
                return found
        return make()

    def trained(self) -> nn.Module:
        path = self.path(STAGES[0])

        def make() -> nn.Module:
            torch.manual_seed(self.seed)
            model = DigitsNet()
            train(model, self.data.training(64, self.seed), epochs=TRAIN_EPOCHS)
            write_atomically(path, safetensors.torch.save(model.state_dict()))
            return model

        def read() -> nn.Module:
            model = DigitsNet()
            try:
                model.load_state_dict(safetensors.torch.load_file(path))
            except (safetensors.SafetensorError, RuntimeError) as error:
                raise FormatError("damaged checkpoint") from error
            return model.eval()

        model: nn.Module = self.stage(STAGES[0], make, read)
        return model

    def sensitivity(self, model: nn.Module) -> Sensitivity:
        path = self.path(STAGES[1])

        def make() -> Sensitivity:
            loader = self.data.calibration(self.seed)
            table = measure(model, loader, seed=self.seed, checkpoint=f"{path}.partial")
            table.save(path)
            return table

        table: Sensitivity = self.stage(STAGES[1], make, lambda: Sensitivity.load(path))
        return table

    def plan(self, table: Sensitivity) -> Plan:
        path = self.path(STAGES[2])

        def make() -> Plan:
            plan = search(table, Budget(size=self.size), method=Lagrangian())
            plan.save(path)
            return plan

        plan: Plan = self.stage(STAGES[2], make, lambda: Plan.load(path))
        return plan

    def small(self, model: nn.Module, plan: Plan) -> nn.Module:
        path = self.path(STAGES[3])

        def make() -> nn.Module:
            loader = self.data.calibration(self.seed)
            small = apply(model, plan, loader, checkpoint=f"{path}.partial")
            save(small, path)
            return small

        small: nn.Module = self.stage(
            STAGES[3], make, lambda: load(path, DigitsNet(), trainable=True)
        )
        return small

    def tuned(self, model: nn.Module, small: nn.Module) -> nn.Module:
        path = self.path(STAGES[4])

        def make() -> nn.Module:
            finetune(
                small,
                self.data.training(64, self.seed),
                epochs=TUNE_EPOCHS,
                teacher=model,
                validation=self.data.validating(),
                checkpoint=f"{path}.partial",
                seed=self.seed,
            )
            save(small, path)
            return small

        tuned: nn.Module = self.stage(
            STAGES[4], make, lambda: load(path, DigitsNet(), trainable=True)
        )
        return tuned


def run_demo(
    folder: Path, *, size: str = "5%", seed: int = 0, say: Callable[[str], None]
) -> DemoResult:
    """Run the demo, or what is left of it.

    Args:
        folder: Where its files go; created.
        size: The budget, as for ``Budget(size=…)``.
        seed: Seeds training, labels and augmentation.
        say: Called with each line that is to be shown.

    Returns:
        The report, its numbers and its page.

    Raises:
        FitcompressError: A budget that cannot be met, a folder that cannot be written.
    """
    Budget(size=size)
    start = time.monotonic()
    _prepare(folder, {"size": size, "seed": seed})
    demo = _Demo(folder, size, seed, say)
    test = demo.data.testing()
    say("1/5 training a small convolutional network on handwritten digits")
    model = demo.trained()
    dense = evaluate(model, test)
    before = dense_bytes(model)
    say(f"    test accuracy {dense.accuracy:.2f} %, {before:,} bytes in float32")
    say("2/5 measuring Fisher sensitivity")
    table = demo.sensitivity(model)
    say(f"    {table.samples} samples, {table.distortion[0].size} levels for each layer")
    say(f"3/5 searching bits and sparsity of every layer for {size} of the bytes")
    plan = demo.plan(table)
    path = search(table, Budget(size=size), method=PathSearch())
    say(f"    {plan.summary()}")
    say(f"    {path.summary()}")
    say("4/5 compensating: no training")
    small = demo.small(model, plan)
    untrained = evaluate(small, test)
    untrained_bytes = demo.path(STAGES[3]).stat().st_size
    say(f"    test accuracy {untrained.accuracy:.2f} %, {untrained_bytes:,} bytes on disk")
    say("5/5 fine-tuning")
    tuned = demo.tuned(model, small)
    packed = demo.path(STAGES[4])
    exact = _loads_exactly(packed, tuned, demo.data.test[0])
    seconds = time.monotonic() - start
    notes = (
        f"Without training: {untrained.accuracy:.2f} %, {untrained_bytes:,} bytes.",
        f"Loaded back from {packed.name}: weights and outputs bit-identical: {exact}.",
    )
    result = report(model, tuned, test, sensitivity=table, notes=notes, progress=False)
    page = demo.path("report.html")
    result.html(page)
    if demo.resumed:
        say(f"    resumed from {', '.join(demo.resumed)}")
    values = {
        "accuracy_before": dense.accuracy,
        "accuracy_without_training": untrained.accuracy,
        "accuracy_after": result.after["accuracy"],
        "bytes_before": before,
        "bytes_without_training": untrained_bytes,
        "bytes_after": packed.stat().st_size,
        "bit_exact": exact,
        "predicted_loss_rise": result.predicted_loss_rise,
        "measured_loss_rise": result.measured_loss_rise,
        "resumed": demo.resumed,
        "seconds": seconds,
    }
    return DemoResult(result, values, page)


def _loads_exactly(path: Path, model: nn.Module, x: torch.Tensor) -> bool:
    again = load(path, DigitsNet())
    with torch.no_grad():
        return torch.equal(again(x), model.eval()(x))


def _prepare(folder: Path, settings: dict[str, Any]) -> None:
    """Create the folder; forget stages that were made with other settings."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create {folder}", got=error.strerror, fix="choose another --out"
        ) from error
    file = folder / "settings.json"
    text = json.dumps(settings)
    if not file.exists() or file.read_text() != text:
        for name in STAGES:
            (folder / name).unlink(missing_ok=True)
        write_atomically(file, text.encode())
