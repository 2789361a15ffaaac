"""Exported files compute what the compressed model computes, in ONNX Runtime."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import fitcompress as fc
from exported_files import GRIDS, equal, nodes, observe, rounded, run, types
from fitcompress.cli import main
from fitcompress.errors import FormatError, OptionError, PlanMismatchError
from fitcompress.export.onnx_file import ExportOptions
from fitcompress.export.variants import Variants
from fitcompress.model import compressible_layers
from fitcompress.model.value_ranges import Range
from fitcompress.quantize import (
    ActivationQuantizer,
    MinMaxObserver,
    activations,
    attach_activation,
    detach_activation,
    grid_of,
)
from fitcompress.zoo import BertEncoder, DigitsNet
from test_kinds import Decoder

onnx = pytest.importorskip("onnx")


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_a_file_computes_what_the_model_computes(net, images, tmp_path, grid) -> None:
    small = rounded(net, grid)
    before = copy.deepcopy(small.state_dict())
    report = fc.export_onnx(small, tmp_path / "f.onnx", images[:1])
    for count in (1, 2, 7, 96):
        assert equal(small, tmp_path / "f.onnx", images[:count])
        assert equal(small, tmp_path / "f.onnx", images[:count], exact=False)
    after = small.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert report.folded_norms == 1
    wanted = {2: "INT4", 4: "INT4", 8: "INT8"}.get(grid.bits)
    if wanted:
        assert {layer.weight for layer in report.layers} == {wanted}
    elif grid.step == 1e-4:  # codes up to thousands
        assert {layer.weight for layer in report.layers} == {"INT16"}
    assert report.bytes_after == (tmp_path / "f.onnx").stat().st_size
    assert report.summary() in str(report)


def test_weights_fold_where_inputs_are_float(net, images, tmp_path) -> None:
    small = observe(rounded(net, GRIDS["4"]), images, 8)
    for name in ("conv", "head"):
        detach_activation(small.get_submodule(name))
    path = tmp_path / "f.onnx"
    report = fc.export_onnx(small, path, images, fold_weights=True, min_bits=8)
    assert equal(small, path, images)
    kinds = {layer.name: (layer.weight, layer.input) for layer in report.layers}
    assert kinds["conv"] == kinds["head"] == ("FLOAT", None)
    assert kinds["deep"] == kinds["out"] == ("INT8", "UINT8")
    assert set(types(path)) == {"deep.weight_codes", "out.weight_codes"}


def test_one_trace_gives_the_files_of_all_choices(net, images, tmp_path) -> None:
    whole = observe(rounded(net, GRIDS["8"]), images, 8)
    options = ExportOptions(min_bits=8, fold_weights=True)
    variants = Variants(whole, images, options)
    assert set(variants.layers) == {"conv", "deep", "head", "out"}
    for chosen in ((), ("deep",), ("head", "conv"), variants.layers, ("deep",)):
        one = copy.deepcopy(whole)
        for name in set(variants.layers) - set(chosen):
            detach_activation(one.get_submodule(name))
        path = tmp_path / "f.onnx"
        path.write_bytes(variants.onnx_bytes(chosen))
        assert equal(one, path, images)
        found = {node.op_type for node in onnx.load(path).graph.node}
        assert ("QuantizeLinear" in found) == bool(chosen)
        fc.export_onnx(one, tmp_path / "g.onnx", images, fold_weights=True, min_bits=8)
        assert (tmp_path / "g.onnx").stat().st_size == path.stat().st_size
    with pytest.raises(OptionError, match="'other' has no quantizer"):
        variants.onnx_bytes(["other"])


def test_scales_are_per_output_channel(tmp_path) -> None:
    """A square weight whose rows differ by powers of ten: the other axis shows."""
    torch.manual_seed(0)
    for layer, x in (
        (nn.Linear(6, 6, bias=False), torch.randn(5, 6)),
        (nn.Linear(6, 6), torch.randn(5, 3, 6)),
        (nn.Conv2d(6, 6, 3, bias=False), torch.randn(2, 6, 5, 5)),
        (nn.ConvTranspose2d(6, 6, 3), torch.randn(2, 6, 5, 5)),
        (nn.ConvTranspose2d(12, 12, 3, groups=2), torch.randn(2, 12, 5, 5)),
    ):
        view = compressible_layers(nn.Sequential(layer))[0]
        with torch.no_grad():
            steps = 10.0 ** torch.linspace(-2, 2, view.rows)
            rows = view.matrix() * steps.reshape(-1, 1)
            layer.weight.copy_(view.weight_of(rows))
        small = rounded(nn.Sequential(layer).eval(), fc.Grid(bits=4))
        fc.export_onnx(small, tmp_path / "f.onnx", x)
        with torch.no_grad():
            expected = small(x)
        found, channels = run(tmp_path / "f.onnx", x), 1 if x.dim() > 3 else -1
        error = (found - expected).abs().movedim(channels, 0).flatten(1).amax(1)
        size = expected.abs().movedim(channels, 0).flatten(1).amax(1)
        assert (error <= 1e-5 * size).all()
        assert set(types(tmp_path / "f.onnx").values()) == {onnx.TensorProto.INT4}


@pytest.mark.parametrize("grid", [fc.Grid(bits=4), fc.Grid(step=0.05)], ids=str)
@pytest.mark.parametrize("quantized", [False, True])
def test_embeddings_and_transposed_convolutions(tmp_path, grid, quantized) -> None:
    torch.manual_seed(0)
    words = torch.randint(12, (48, 3))
    small = rounded(Decoder().eval(), grid)
    if quantized:
        observe(small, words, 8)
    report = fc.export_onnx(small, tmp_path / "f.onnx", words[:4])
    assert {layer.name: layer.input for layer in report.layers}["wide"] == (
        "UINT8" if quantized else None
    )
    for count in (1, 48):
        assert equal(small, tmp_path / "f.onnx", words[:count])


class Convolutions(nn.Module):
    """One- to three-dimensional convolutions with groups and dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 8, 3, dilation=2, groups=2)
        self.plane = nn.Conv2d(8, 6, (1, 3), stride=(1, 2), padding=(0, 1))
        self.norm = nn.BatchNorm2d(6)
        self.space = nn.Conv3d(6, 5, (1, 1, 2), bias=False)
        self.last = nn.BatchNorm3d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.line(x).relu()[:, :, None]
        x = self.norm(self.plane(x)).relu()[:, :, None]
        return self.last(self.space(x)).flatten(1)


@pytest.mark.parametrize("bits", [None, 4, 8, 12])
def test_convolutions_of_every_dimension(tmp_path, bits) -> None:
    torch.manual_seed(0)
    net, x = Convolutions(), torch.randn(20, 4, 14)
    net(x)  # statistics of the norms
    with torch.no_grad():
        net.norm.weight[:3] = torch.tensor([-1.5, 0.0, 0.3])
        net.norm.bias.normal_()
        net.last.bias.normal_()
    small = rounded(net.eval(), fc.Grid(bits=8))
    if bits is not None:
        observe(small, x, bits)
    report = fc.export_onnx(small, tmp_path / "f.onnx", x)
    assert report.folded_norms == 2
    assert not any(n.op_type == "BatchNormalization" for n in nodes(tmp_path))
    assert equal(small, tmp_path / "f.onnx", x)
    wanted = {None: None, 12: "UINT16"}.get(bits, "UINT8")
    assert {layer.input for layer in report.layers} == {wanted}


@pytest.mark.parametrize(
    ("bits", "bounds"),
    [(8, (-128, 127)), (8, (0, 255)), (8, (-127, 127)), (4, (-3, 12)), (16, (-9, 9))],
)
def test_inputs_saturate_at_their_own_bounds(tmp_path, bits, bounds) -> None:
    # Beyond both bounds, and halfway between codes, where halves go to even.
    x = torch.arange(-300.0, 300.0).reshape(-1, 5) / 8
    for weight_bits in (8, 7):
        grid = fc.Grid(bits=weight_bits)
        small = rounded(nn.Sequential(nn.Linear(5, 5)), grid)
        made = ActivationQuantizer(bits, symmetric=bounds[0] == -bounds[1])
        made.set_range(Range(torch.tensor([0.25]), *bounds))
        attach_activation(small[0], made)
        fc.export_onnx(small, tmp_path / "f.onnx", x)
        assert equal(small, tmp_path / "f.onnx", x)
        assert "Gemm" not in {n.op_type for n in nodes(tmp_path)}  # runs on integers
    # With 8 bits, sums of two products saturate on processors without VNNI.
    assert equal(small, tmp_path / "f.onnx", x, exact=False)


@pytest.mark.parametrize("bits", [5, 8])
def test_inputs_may_have_a_step_per_channel(net, images, tmp_path, bits) -> None:
    small = rounded(net, fc.Grid(bits=8))
    for name, channel in (("conv", -3), ("out", -1), ("deep", 1)):
        quantizer = ActivationQuantizer(bits, MinMaxObserver(channel))
        attach_activation(small.get_submodule(name), quantizer)
    with torch.no_grad():
        small(images)
    for _, quantizer in activations(small):
        quantizer.freeze()
    fc.export_onnx(small, tmp_path / "f.onnx", images)
    assert equal(small, tmp_path / "f.onnx", 3 * images)


def test_half_precision(tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    small = rounded(net.eval().half(), fc.Grid(bits=8))
    x = torch.randn(4, 3, 6, 6).half()
    fc.export_onnx(small, tmp_path / "f.onnx", x)
    with torch.no_grad():
        expected = small(x).float()
    error = (run(tmp_path / "f.onnx", x).float() - expected).abs().max()
    assert error < 5e-3 * expected.abs().max()


def test_a_transformer_with_a_free_length(tmp_path) -> None:
    torch.manual_seed(0)
    net = BertEncoder(width=16, depth=1, heads=2, tokens=20, length=12).eval()
    small, words = rounded(net, fc.Grid(bits=8)), torch.randint(20, (4, 7))
    observe(small, words, 8)
    free = ({0: "batch", 1: "length"},)
    report = fc.export_onnx(small, tmp_path / "f.onnx", words, dynamic_shapes=free)
    assert {layer.weight for layer in report.layers} == {"INT8"}
    assert equal(small, tmp_path / "f.onnx", words)
    assert equal(small, tmp_path / "f.onnx", words[:1, :5])


def test_a_packed_file_gives_the_weights(small, images, tmp_path) -> None:
    from conftest import TinyNet

    fc.save(small, tmp_path / "p")
    one = fc.export_onnx(small, tmp_path / "a.onnx", images)
    dense = fc.load(tmp_path / "p", TinyNet())
    two = fc.export_onnx(dense, tmp_path / "b.onnx", images, packed=tmp_path / "p")
    assert one.layers == two.layers
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert grid_of(dense.conv) is None  # stays as it was
    assert equal(small, tmp_path / "b.onnx", images)
    with pytest.raises(PlanMismatchError, match="packed=FILE"):
        fc.export_onnx(dense, tmp_path / "c.onnx", images)
    (tmp_path / "p").write_bytes((tmp_path / "p").read_bytes()[:-3])
    with pytest.raises(FormatError):
        fc.export_onnx(dense, tmp_path / "c.onnx", images, packed=tmp_path / "p")
    assert not (tmp_path / "c.onnx").exists()


def test_the_command_exports_the_digits_network(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = DigitsNet().eval()
    small = rounded(net, fc.Grid(bits=4))
    size = fc.save(small, "p")

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fitcompress", "export", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0

    model = ("p", "--model", "digits", "--onnx", "d.onnx")
    assert call(*model, "--shape", "1,8,8", "--json", "r.json") == 0
    values = json.loads((tmp_path / "r.json").read_text())
    assert values["bytes_packed"] == size
    assert values["bytes_after"] == (tmp_path / "d.onnx").stat().st_size
    assert values["bytes_after"] < 0.2 * values["bytes_before"]
    assert "INT4" in capsys.readouterr().out
    x = torch.from_numpy(np.random.default_rng(0).random((5, 1, 8, 8), np.float32))
    assert equal(small, tmp_path / "d.onnx", x)
    for shape in ("", "1,8,", "1,0,8", "²", "1,8,8,8"):
        assert call(*model, "--shape", shape) == 1
        assert "Error" in capsys.readouterr().err
    assert call("p", "--model", "digits", "--shape", "1,8,8", "--onnx", "p") == 1
    assert "overwrite" in capsys.readouterr().err
