"""What an exported file leaves out or shares: dead channels, layers called twice."""

import pytest
import torch
from torch import nn

import fitcompress as fc
from exported_files import equal, observe, rounded


def test_four_bits_take_half_of_eight(tmp_path) -> None:
    net = nn.Sequential(nn.Linear(256, 256))
    x = torch.randn(4, 256)
    sizes = {}
    for bits, opset in ((2, 25), (4, 25), (4, 21), (4, 18), (8, 21)):
        small = rounded(net, fc.Grid(bits=bits))
        report = fc.export_onnx(small, tmp_path / "f.onnx", x, opset=opset)
        sizes[bits, opset] = (tmp_path / "f.onnx").stat().st_size
        assert report.opset == opset
        assert equal(small, tmp_path / "f.onnx", x)
    codes = 256 * 256
    for (bits, opset), size in sizes.items():
        wanted = codes * (bits if opset > 18 else 8) // 8 + 4 * 256 * 2
        assert wanted < size < wanted + 1200, (bits, opset)
    assert report.bytes_before == pytest.approx(4 * codes, rel=0.02)


def test_codes_that_no_integer_holds_stay_in_float(tmp_path) -> None:
    small = rounded(nn.Sequential(nn.Linear(4, 4)), fc.Grid(step=1e-6))
    x = torch.randn(3, 4)
    report = fc.export_onnx(small, tmp_path / "f.onnx", x)
    assert report.layers[0].weight == "FLOAT"
    assert report.layers[0].scales == 0
    assert equal(small, tmp_path / "f.onnx", x)
    small = rounded(nn.Sequential(nn.Linear(4, 4)), fc.Grid(step=1e-3))
    assert fc.export_onnx(small, tmp_path / "f.onnx", x).layers[0].weight == "INT16"
    old = fc.export_onnx(small, tmp_path / "f.onnx", x, opset=18)
    assert old.layers[0].weight == "FLOAT"
    assert equal(small, tmp_path / "f.onnx", x)


class Dead(nn.Module):
    """Channels that do nothing, each in another way; ``padding`` of the second conv."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 6, 3, padding=padding)
        self.out = nn.Linear(6, 4)
        with torch.no_grad():
            self.one.weight[:4] = 0
            self.one.bias[:4] = torch.tensor([-1.0, 0.0, 2.0, 3.0])
            self.two.weight[:, 6] = 0  # nobody uses it
            self.out.weight[:, 2] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(x).relu()).relu()
        return self.out(x.mean((2, 3)))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("padding", [0, 1])
def test_channels_that_do_nothing_are_removed(tmp_path, padding, quantized) -> None:
    x = torch.randn(9, 3, 6, 6)
    small = rounded(Dead(padding).eval(), fc.Grid(bits=8))
    if quantized:
        observe(small, x, 8)
    report = fc.export_onnx(small, tmp_path / "f.onnx", x, channel_multiple=1)
    # 0, 1: zeros after the ReLU. 2, 3: constants, which padding makes differ at edges.
    assert report.removed_channels == {"one": 5 if padding == 0 else 3, "two": 1}
    shapes = {layer.name: layer.shape for layer in report.layers}
    left = 3 if padding == 0 else 5
    assert shapes["one"] == (left, 3, 3, 3)
    assert shapes["two"] == (5, left, 3, 3)
    assert equal(small, tmp_path / "f.onnx", x)
    assert equal(small, tmp_path / "f.onnx", x[:1])
    # Eight channels stay a multiple of four; six are none.
    report = fc.export_onnx(small, tmp_path / "f.onnx", x, channel_multiple=4)
    wanted = {"two": 1} if padding else {"one": 4, "two": 1}
    assert report.removed_channels == wanted
    assert equal(small, tmp_path / "f.onnx", x)


class Sum(nn.Module):
    """A channel of zeros that a shortcut adds to something."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            self.one.weight[1] = 0
            self.one.bias[1] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.one(x)
        return self.two(hidden) + hidden


def test_channels_that_a_sum_reads_stay(tmp_path) -> None:
    small, x = rounded(Sum(), fc.Grid(bits=8)), torch.randn(2, 3, 4, 4)
    report = fc.export_onnx(small, tmp_path / "f.onnx", x, channel_multiple=1)
    assert report.removed_channels == {}
    assert equal(small, tmp_path / "f.onnx", x)


def test_layers_that_are_called_twice_or_never(tmp_path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.inner(self.inner(x).relu()) * y

    small = rounded(Twice(), fc.Grid(bits=4))
    x = torch.randn(3, 6)
    report = fc.export_onnx(small, tmp_path / "f.onnx", (x, x + 1))
    assert [layer.weight for layer in report.layers] == ["INT4", "unused"]
    assert equal(small, tmp_path / "f.onnx", x, x + 1)
    named = fc.export_onnx(small, tmp_path / "f.onnx", {"x": x, "y": x})
    assert named.bytes_after == report.bytes_after
    assert equal(small, tmp_path / "f.onnx", x[:1], x[:1])
