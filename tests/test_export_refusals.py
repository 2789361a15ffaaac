"""What cannot be exported is told."""

import sys

import pytest
import torch
from torch import nn

import fitcompress as fc
from exported_files import rounded
from fitcompress.errors import (
    CalibrationError,
    DataError,
    ExportError,
    MissingDependencyError,
    OptionError,
    OutputError,
)
from fitcompress.model.value_ranges import Range
from fitcompress.quantize import ActivationQuantizer, attach_activation


@pytest.mark.parametrize(
    "options",
    [
        {"opset": 17},
        {"opset": 99},
        {"opset": "21"},
        {"min_bits": 3},
        {"channel_multiple": 0},
    ],
    ids=str,
)
def test_options_that_cannot_work(small, images, tmp_path, options) -> None:
    with pytest.raises(OptionError):
        fc.export_onnx(small, tmp_path / "f", images, **options)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_told(small, images, tmp_path, monkeypatch) -> None:
    path = tmp_path / "f.onnx"
    with pytest.raises(OutputError):
        fc.export_onnx(small, tmp_path / "no" / "f.onnx", images)
    with pytest.raises(DataError, match="does not run"):
        fc.export_onnx(small, path, images[:, :1])
    with pytest.raises(DataError, match="no batch"):
        fc.export_onnx(small, path, {"x": 3})
    attach_activation(small.head, ActivationQuantizer(8, dynamic=True))
    with pytest.raises(ExportError, match=r"'head'.*batch by batch.*calibrate it"):
        fc.export_onnx(small, path, images)
    attach_activation(small.head, ActivationQuantizer(8))
    with pytest.raises(CalibrationError, match="head"):
        fc.export_onnx(small, path, images)
    wide = ActivationQuantizer(12)
    wide.set_range(Range(torch.tensor([0.1]), 0, 4095))
    attach_activation(small.head, wide)
    with pytest.raises(ExportError, match="too many codes"):
        fc.export_onnx(small, path, images, opset=20)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=r"pip install.*\[onnx\]"):
        fc.export_onnx(small, path, images)
    assert not list(tmp_path.iterdir())


def test_paths_that_depend_on_values_are_told(tmp_path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if float(x.detach().sum()) > 0 else x

    small = rounded(Branch(), fc.Grid(bits=8))
    with pytest.raises(ExportError, match="cannot be traced"):
        fc.export_onnx(small, tmp_path / "f", torch.ones(2, 3))


def test_a_fixed_batch_is_told(tmp_path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + torch.zeros(4, 3)

    small = rounded(Fixed(), fc.Grid(bits=8))
    with pytest.raises(ExportError, match="batch"):
        fc.export_onnx(small, tmp_path / "f", torch.ones(4, 3))
