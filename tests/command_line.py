"""The command line within the process of the tests, and files for it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import nn

import fitcompress as fc
from fitcompress.data import load_dataset

MODEL = ("--model", "tiny_digits:build", "--weights", "w.safetensors")
DIGITS = ("--dataset", "digits")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def done(result: Result) -> Result:
    assert result.code == 0, result.err
    return result


def tiny() -> nn.Module:
    """What the tests name as `tiny_digits:build`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def write_tiny_files(folder: Path) -> None:
    """Write a factory, its weights, a sensitivity, a plan and a packed file."""
    source = "import torch\nfrom torch import nn\n\n\ndef build():\n"
    source += "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n\n\n"
    source += "def nothing():\n    return None\n"
    (folder / "tiny_digits.py").write_text(source)
    model = tiny()
    safetensors.torch.save_file(model.state_dict(), folder / "w.safetensors")
    loader = load_dataset("digits").calibration()
    table = fc.measure(model, loader, samples=64, progress=False)
    table.save(folder / "s")
    plan = fc.search(table, fc.Budget(size=900))
    plan.save(folder / "plan.json")
    fc.save(fc.apply(model, plan, loader, samples=64, progress=False), folder / "p")
