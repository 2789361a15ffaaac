"""The demo: handwritten digits, a small network, 5 % of its bytes.

Every stage leaves a file in the output folder; a killed demo, started again with the
same settings, goes on after the last finished stage and ends with the same files. Each
stage works on what the file of the one before holds, so that it makes no difference
whether that was made just now.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors
import safetensors.torch
import torch

from fitcompress.compensate import apply
from fitcompress.data import load_dataset
from fitcompress.errors import FitcompressError, FormatError, OutputError
from fitcompress.files import check_writable, write_atomically
from fitcompress.methods import Lagrangian, PathSearch
from fitcompress.model.costs import dense_bytes
from fitcompress.quantize import remove
from fitcompress.ranks import ALONE
from fitcompress.report import Report, report
from fitcompress.search import Budget, Plan, search
from fitcompress.sensitivity.measurement import measure
from fitcompress.sensitivity.table import Sensitivity
from fitcompress.storage.save_load import load, packed_bytes, save
from fitcompress.train import divergence, evaluate, finetune
from fitcompress.train.supervised import train
from fitcompress.versions import __version__
from fitcompress.zoo import DigitsNet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from fitcompress.data import Dataset

__all__ = ["DemoResult", "run_demo"]

T = TypeVar("T")
TRAIN_EPOCHS, BATCH = 24, 64
TUNING: dict[str, Any] = {
    "epochs": 6,
    "norms": "frozen",
}
TRAINED, SENSITIVITY, PLAN = (
    "trained.safetensors",
    "sensitivity.safetensors",
    "plan.json",
)
SMALL, TUNED = "small.safetensors", "tuned.safetensors"
STAGES = (TRAINED, SENSITIVITY, PLAN, SMALL, TUNED)
SETTINGS, PAGE = "demo.json", "report.html"


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
    """The stages; each is read from its file, and made first if there is none."""

    def __init__(
        self, folder: Path, size: str, seed: int, say: Callable[[str], None]
    ) -> None:
        self.folder, self.size, self.seed, self.say = folder, size, seed, say
        self.data: Dataset = load_dataset("digits")
        self.resumed: list[str] = []
        self.exact = True

    def path(self, name: str) -> Path:
        return self.folder / name

    def partial(self, name: str) -> Path:
        return self.folder / f"{name}.partial"

    def stage(self, name: str, make: Callable[[], None], read: Callable[[], T]) -> T:
        """Return what the file of a stage holds; if it is made, later ones are void."""
        if self.path(name).exists():
            try:
                found = read()
            except FitcompressError as error:
                self.say(f"    {name} cannot be used and is made again: {error}")
            else:
                self.resumed.append(name)
                return found
        _forget(self.folder, STAGES[STAGES.index(name) + 1 :])
        make()
        return read()

    def trained(self) -> nn.Module:
        path = self.path(TRAINED)

        def make() -> None:
            torch.manual_seed(self.seed)
            model = DigitsNet()
            train(model, self.data.training(BATCH, self.seed), epochs=TRAIN_EPOCHS)
            write_atomically(path, safetensors.torch.save(model.state_dict()))

        def read() -> nn.Module:
            model = DigitsNet()
            try:
                model.load_state_dict(safetensors.torch.load_file(path))
            except (safetensors.SafetensorError, RuntimeError, OSError) as error:
                raise FormatError("damaged checkpoint", got=path.name) from error
            return model.eval()

        return self.stage(TRAINED, make, read)

    def sensitivity(self, model: nn.Module) -> Sensitivity:
        path = self.path(SENSITIVITY)

        def make() -> None:
            checkpoint = self.partial(SENSITIVITY)
            loader = self.data.calibration(self.seed)
            table = measure(
                model, loader, seed=self.seed, checkpoint=checkpoint, group=ALONE
            )
            table.save(path)

        return self.stage(SENSITIVITY, make, lambda: Sensitivity.load(path))

    def plan(self, table: Sensitivity) -> Plan:
        path = self.path(PLAN)

        def make() -> None:
            search(table, Budget(size=self.size), method=Lagrangian()).save(path)

        return self.stage(PLAN, make, lambda: Plan.load(path))

    def small(self, model: nn.Module, plan: Plan) -> nn.Module:
        def make() -> None:
            loader = self.data.calibration(self.seed)
            small = apply(model, plan, loader, checkpoint=self.partial(SMALL))
            save(small, self.path(SMALL))

        return self.stage(SMALL, make, lambda: self._load(SMALL))

    def tuned(self, model: nn.Module, small: nn.Module) -> nn.Module:
        path = self.path(TUNED)

        def make() -> None:
            tuned = copy.deepcopy(small)
            finetune(
                tuned,
                self.data.training(BATCH, self.seed),
                teacher=model,
                validation=self.data.validating(),
                checkpoint=self.partial(TUNED),
                seed=self.seed,
                **TUNING,
            )
            save(tuned, path)
            self.exact = _loads_exactly(path, tuned, self.data.test[0])

        tuned = self.stage(TUNED, make, lambda: self._load(TUNED))
        if TUNED in self.resumed:
            self.exact = packed_bytes(tuned) == path.read_bytes()
        return tuned

    def _load(self, name: str) -> nn.Module:
        return load(self.path(name), DigitsNet(), trainable=True)


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
    demo = _Demo(folder, size, seed, say)
    _prepare(folder, {"size": size, "seed": seed})
    test = demo.data.testing()
    say("1/5 training a small convolutional network on handwritten digits")
    model = demo.trained()
    dense = evaluate(model, test)
    before = dense_bytes(model)
    say(f"    test accuracy {dense.accuracy:.2f} %, {before:,} bytes in float32")
    say("2/5 measuring Fisher sensitivity")
    table = demo.sensitivity(model)
    levels = table.distortion[0].size
    say(f"    {table.samples} samples, {levels} levels for each layer")
    say(f"3/5 searching bits and sparsity of every layer for {size} of the bytes")
    plan = demo.plan(table)
    path = search(table, Budget(size=size), method=PathSearch())
    say(f"    {plan.summary()}")
    say(f"    {path.summary()}")
    say("4/5 compensating: no training")
    small = demo.small(model, plan)
    untrained = evaluate(small, test)
    small_bytes = demo.path(SMALL).stat().st_size
    say(f"    test accuracy {untrained.accuracy:.2f} %, {small_bytes:,} bytes on disk")
    say("5/5 fine-tuning")
    tuned = demo.tuned(model, small)
    validation = demo.data.validating()
    far = [divergence(model, network, validation) for network in (small, tuned)]
    helped = packed_bytes(tuned) != packed_bytes(small)
    outcome = (
        f"divergence on held-out data {far[0]:.4g} ⇒ {far[1]:.4g} nats"
        if helped
        else "it did not come closer to the dense network and is left out"
    )
    say(f"    {outcome}")
    packed = demo.path(TUNED)
    check = "read" if TUNED in demo.resumed else "loaded back"
    wanted = (
        "packed again, it gives the same bytes"
        if TUNED in demo.resumed
        else "every weight and output is bit-identical"
    )
    notes = (
        f"Without training: {untrained.accuracy:.2f} %, {small_bytes:,} bytes.",
        f"Fine-tuning: {outcome}.",
        f"{packed.name} {check}: {wanted}: {'yes' if demo.exact else 'NO'}.",
    )
    result = report(model, tuned, test, sensitivity=table, notes=notes, progress=False)
    page = demo.path(PAGE)
    result.html(page)
    if demo.resumed:
        say(f"    resumed from {', '.join(demo.resumed)}")
    values = {
        "accuracy_before": dense.accuracy,
        "accuracy_without_training": untrained.accuracy,
        "accuracy_after": result.after["accuracy"],
        "bytes_before": before,
        "bytes_without_training": small_bytes,
        "bytes_after": packed.stat().st_size,
        "bit_exact": demo.exact,
        "divergence_without_training": far[0],
        "divergence_after": far[1],
        "fine_tuning_kept": helped,
        "predicted_loss_rise": result.predicted_loss_rise,
        "measured_loss_rise": result.measured_loss_rise,
        "resumed": demo.resumed,
        "seconds": time.monotonic() - start,
    }
    return DemoResult(result, values, page)


def _loads_exactly(path: Path, model: nn.Module, x: torch.Tensor) -> bool:
    """Whether a file holds every tensor and gives every output of ``model``."""
    again = load(path, DigitsNet())
    found, wanted = again.state_dict(), remove(copy.deepcopy(model)).state_dict()
    with torch.no_grad():
        outputs = torch.equal(again(x), model.eval()(x))
    same = (torch.equal(found[key], wanted[key]) for key in wanted if key in found)
    return outputs and found.keys() == wanted.keys() and all(same)


def _prepare(folder: Path, options: dict[str, Any]) -> None:
    """Create the folder; forget stages that were made with other settings.

    Raises:
        OutputError: The folder cannot be written, or holds files of somebody else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create {folder}", got=error.strerror, fix="choose another --out"
        ) from error
    check_writable(folder / PAGE)
    fixed = {"train_epochs": TRAIN_EPOCHS, "batch": BATCH, "tuning": TUNING}
    settings = json.dumps({**options, **fixed, "version": __version__}).encode()
    file = folder / SETTINGS
    found = file.read_bytes() if file.is_file() else None
    others = [name for name in STAGES if (folder / name).exists()]
    if found is None and others:
        raise OutputError(
            f"{folder} holds files that the demo did not write",
            got=", ".join(others),
            wanted="an empty folder, or one of the demo",
            fix="choose another --out",
        )
    if found != settings:
        _forget(folder, STAGES)
        write_atomically(file, settings)


def _forget(folder: Path, stages: tuple[str, ...]) -> None:
    """Remove the files of stages, finished or not."""
    for name in stages:
        (folder / name).unlink(missing_ok=True)
        (folder / f"{name}.partial").unlink(missing_ok=True)
