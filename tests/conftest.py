"""Tiny models, what they compress to, and commands; markers of what must be there."""

import copy
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Threads that spin while they wait keep cores from those that work: with anything else
# on the machine small products take ten times as long. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import nn

import fitcompress as fc
from command_line import Result, Run, write_tiny_files
from fitcompress import ops
from fitcompress.cli import main
from fitcompress.data import Batches

DATA = "FITCOMPRESS_DATA"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with a reason, what this machine or build cannot run."""
    reasons = {}
    if not os.environ.get(DATA):
        reasons["data"] = f"{DATA} does not name a data folder"
    if not torch.cuda.is_available():
        reasons["cuda"] = "no CUDA device"
    elif not ops.has_cuda():
        reasons["cuda"] = "this build has no CUDA kernels"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def data_folder() -> Path:
    """The folder with the real data sets; tests that use it carry the marker `data`."""
    folder = Path(os.environ[DATA])
    assert folder.is_dir(), f"{DATA} names no folder: {folder}"
    return folder


class TinyNet(nn.Module):
    """Conv, batch norm, depthwise conv, linear: 778 weights, 6×6 inputs, 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.head = nn.Linear(72, 7)
        self.out = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.deep(x).relu()
        return self.out(self.head(x.flatten(1)).relu())


def build_tiny_net(seed: int = 0) -> TinyNet:
    """A TinyNet whose norm has seen data, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    net = TinyNet()
    with torch.no_grad():
        for parameter in net.parameters():
            width = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (2 / width) ** 0.5)
        net.norm.weight.abs_().add_(0.5)
        net.norm.running_mean.copy_(0.2 * torch.randn(8, generator=generator))
        net.norm.running_var.copy_(1 + torch.rand(8, generator=generator))
        net.norm.num_batches_tracked.fill_(7)
    return net.eval()


@pytest.fixture
def net() -> TinyNet:
    return build_tiny_net()


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """96 smooth inputs [96, 2, 6, 6]: their pixels are correlated, as in images."""
    noise = torch.randn(96, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    return 2 * nn.functional.avg_pool2d(noise, 3, 1)


@pytest.fixture
def loader(images: torch.Tensor) -> Batches:
    return Batches(images, batch_size=32)


@pytest.fixture(scope="session")
def sensitivity(images: torch.Tensor) -> fc.Sensitivity:
    """Of the tiny net, sampled labels."""
    return fc.measure(build_tiny_net(), Batches(images, batch_size=32), progress=False)


@pytest.fixture(scope="session")
def _compressed(
    sensitivity: fc.Sensitivity, images: torch.Tensor
) -> dict[str, nn.Module]:
    batches = Batches(images, batch_size=32)
    made = {}
    for name, family, size in (("step", "step", 1300), ("bits", "bits", 1600)):
        plan = fc.search(sensitivity, fc.Budget(size=size), family=family)
        made[name] = fc.apply(build_tiny_net(), plan, batches, progress=False)
    return made


@pytest.fixture(params=["step", "bits"])
def small(
    request: pytest.FixtureRequest, _compressed: dict[str, nn.Module]
) -> nn.Module:
    """The tiny net, compressed on entropy-coded steps and on fixed-point bits."""
    return copy.deepcopy(_compressed[request.param])


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises, also where the tests run in the background and would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Run:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["fitcompress", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        streams = capsys.readouterr()
        return Result(caught.value.code or 0, streams.out, streams.err)

    return call


@pytest.fixture(scope="session")
def _tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_files(folder)
    return folder


@pytest.fixture
def tiny_files(_tiny_files: Path, tmp_path: Path) -> Path:
    """The test's folder with a network, its sensitivity, a plan and a packed file."""
    return shutil.copytree(_tiny_files, tmp_path, dirs_exist_ok=True)
