"""Sums of residual networks in integers: structure of the file, agreement, errors."""

import json
import sys

import pytest
import torch
from torch import nn

import fitcompress as fc
from exported_files import observe, rounded, run
from fitcompress.cli import main
from fitcompress.errors import (
    CalibrationError,
    DataError,
    EmptyLoaderError,
    MissingDependencyError,
    NonFiniteError,
    OptionError,
)
from fitcompress.export.agreement import agreement_with
from fitcompress.export.onnx_file import ExportOptions
from fitcompress.export.sum_ranges import measured_ranges
from fitcompress.export.variants import Variants
from fitcompress.zoo.resnet_cifar import Block

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


class Net(nn.Module):
    """Two blocks, the second with another shape, untrained."""

    def __init__(self, *, projection: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = Block(8, 8, 1)
        self.two = Block(8, 12, 2, projection=projection)
        self.linear = nn.Linear(12, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
        self(torch.randn(64, 3, 8, 8))  # statistics of the norms
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.two(self.one(self.stem(x).relu())).mean((2, 3)))


def compressed(net: nn.Module, x: torch.Tensor) -> nn.Module:
    """At 7-bit weights: kernels without VNNI add two products in 16 bits."""
    return observe(rounded(net, fc.Grid(bits=7)), x, 8)


def optimized(path) -> dict[str, int]:
    """Operator → how often ONNX Runtime runs it, once it has rewritten the file."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    made = path.with_suffix(".optimized")
    options.optimized_model_filepath = str(made)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(made).graph.node]
    return {kind: kinds.count(kind) for kind in kinds}


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def small(x) -> nn.Module:
    return compressed(Net(), x)


@pytest.fixture(scope="module")
def files(small, x, tmp_path_factory):
    """Files with float sums and with integer ones, and what the latter's report is."""
    folder = tmp_path_factory.mktemp("sums")
    plain, path = folder / "plain.onnx", folder / "f.onnx"
    report = fc.export_onnx(small, plain, x)
    assert (report.integer_sums, report.agreement) == (0, None)
    batches = [(x[:20], None), (x[20:], None)]
    return plain, path, fc.export_onnx(small, path, x, integer_sums=batches)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def quantizers(path) -> list[onnx.NodeProto]:
    return [n for n in onnx.load(path).graph.node if n.op_type == "QuantizeLinear"]


def test_everything_runs_in_integers(files, small, x) -> None:
    plain, path, report = files
    before, after = optimized(plain), optimized(path)
    assert report.integer_sums == after["QLinearAdd"] == 2
    assert after["QLinearConv"] == 5
    assert "Conv" not in after
    assert "Add" not in after
    assert before["QLinearConv"] == 2  # those that no sum follows
    assert "QLinearAdd" not in before
    with torch.no_grad():
        wanted = small(x)
    for exact in (True, False):
        assert relative(run(path, x, exact=exact), wanted) < 0.03
    assert relative(run(path, x[:1]), wanted[:1]) < 0.03
    assert relative(run(plain, x), wanted) < 2e-5


def test_projections_run_in_integers(tmp_path, x) -> None:
    small, path = compressed(Net(projection=True), x), tmp_path / "f.onnx"
    report = fc.export_onnx(small, path, x, integer_sums=[x])
    found = optimized(path)
    assert report.integer_sums == found["QLinearAdd"] == 2
    assert found["QLinearConv"] == 6
    assert not {"Conv", "Add"} & found.keys()
    with torch.no_grad():
        assert relative(run(path, x), small(x)) < 0.03


def test_shortcuts_take_the_codes_of_layers(files) -> None:
    plain, path, _ = files
    # New are those of two convolutions before sums, and of the last sum.
    assert len(quantizers(path)) == len(quantizers(plain)) + 3
    graph = onnx.load(path).graph
    makers = {node.output[0]: node.op_type for node in graph.node}
    moves = [node for node in graph.node if node.op_type in ("Slice", "Pad")]
    assert len(moves) == 3
    for node in moves:
        assert makers[node.input[0]] in ("QuantizeLinear", "Slice")
        assert node.op_type != "Pad" or node.input[2].endswith("_zero")


def test_the_report_compares_with_the_model(files, small, x) -> None:
    _, path, report = files
    with torch.no_grad():
        p = small(x)
    q = run(path, x, exact=False)
    found = report.agreement
    assert found.samples == 32
    assert found.largest_difference == pytest.approx(relative(q, p), rel=1e-4)
    same = (p.argmax(1) == q.argmax(1)).double().mean()
    assert found.same_class == pytest.approx(100 * float(same))
    logs = p.double().log_softmax(1), q.double().log_softmax(1)
    kl = float((logs[0].exp() * (logs[0] - logs[1])).sum(1).mean())
    # Of logits in float32: of 7e-7 nats the second digit is rounding.
    assert found.divergence == pytest.approx(kl, rel=1e-2, abs=5e-8)
    assert 0 < kl < 1e-2
    assert "2 integer sums" in report.summary()
    assert "against PyTorch: same class" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["agreement"]["samples"] == 32


@pytest.fixture(scope="module")
def one_file() -> bytes:
    """A file that doubles its input."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [value("x", onnx.TensorProto.FLOAT, None)],
        [value("y", onnx.TensorProto.FLOAT, None)],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    return model.SerializeToString()


class Scaled(nn.Module):
    """Multiplies by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


@pytest.mark.parametrize("shape", [(4, 1), (4, 3, 5, 5), (4,)], ids=str)
def test_outputs_without_classes_are_compared_in_size_alone(one_file, shape) -> None:
    found = agreement_with(Scaled(4.0), one_file, [torch.randn(shape)])
    assert (found.same_class, found.divergence, found.samples) == (None, None, 4)
    assert found.largest_difference == pytest.approx(0.5)
    assert str(found) == "largest difference 50 % of the largest output on 4 samples"


def test_agreement_of_sequences_and_of_tensors_that_require_gradients(one_file) -> None:
    x = torch.randn(4, 6, 5, requires_grad=True)
    found = agreement_with(Scaled(2.0), one_file, [x])
    assert (found.samples, found.same_class) == (24, 100)
    with pytest.raises(NonFiniteError, match="outputs are NaN"):
        agreement_with(Scaled(torch.nan), one_file, [x])


def test_no_range_is_measured_where_none_is_missing() -> None:
    assert measured_ranges(None, [], []) == {}


class Shortcut(nn.Module):
    """One sum that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x).relu()
        x = self.two(x) + x
        return (self.left(x) - self.right(x)).mean((2, 3))


def numbers(path) -> dict[str, torch.Tensor]:
    return {
        each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy())
        for each in onnx.load(path).graph.initializer
    }


@pytest.mark.parametrize(
    ("narrow", "factor"), [("right", 1.0), ("right", 1 / 8), ("left", 1 / 8)]
)
def test_a_sum_is_rounded_as_the_file_says(tmp_path, x, narrow, factor) -> None:
    small, path = compressed(Shortcut().eval(), x), tmp_path / "f.onnx"
    with torch.no_grad():  # one reader of the sum with another step, or the same
        getattr(small, narrow).input_quantizer.scale *= factor
    report = fc.export_onnx(small, path, x, integer_sums=[x])
    assert report.integer_sums == 1
    found = numbers(path)
    (name,) = (key for key in found if key.endswith("_sum_scale"))
    step, zero = found[name], found[name.replace("scale", "zero")].float()
    assert len(quantizers(path)) == (4 if factor == 1 else 5)
    wide = small.right if narrow == "left" else small.left
    with torch.no_grad():
        hidden = small.two.input_quantizer(small.one(x).relu())
        summand = (small.two(hidden) / step + zero).round().clamp(0, 255) - zero
        total = wide.input_quantizer(summand * step + hidden)
        wanted = (small.left(total) - small.right(total)).mean((2, 3))
    assert relative(run(path, x), wanted) < 1e-4
    assert report.agreement.largest_difference < 0.02


def test_channels_inside_blocks_are_removed_first(tmp_path, x) -> None:
    net, path = Net(), tmp_path / "f.onnx"
    with torch.no_grad():
        for block in (net.one, net.two):
            block.conv1.weight[:3] = 0
            block.bn1.weight[:3] = 0
            block.bn1.bias[:3] = 0
    small = compressed(net, x)
    options = {"channel_multiple": 1, "integer_sums": [x]}
    report = fc.export_onnx(small, path, x, **options)
    assert report.removed_channels == {"one.conv1": 3, "two.conv1": 3}
    assert report.integer_sums == 2
    assert optimized(path)["QLinearConv"] == 5
    with torch.no_grad():
        assert relative(run(path, x), small(x)) < 0.03


def test_layers_that_stay_in_float_keep_their_sums(tmp_path, files, small, x) -> None:
    options = ExportOptions(fold_weights=True, integer_sums=[x[:20], x[20:]])
    variants, path = Variants(small, x, options), tmp_path / "f.onnx"
    path.write_bytes(variants.onnx_bytes(()))
    assert quantizers(path) == []
    path.write_bytes(variants.onnx_bytes(["two.conv2"]))
    assert optimized(path)["QLinearAdd"] == 1
    assert variants.onnx_bytes(variants.layers) == files[1].read_bytes()


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], EmptyLoaderError, "no sample"),
        ([torch.zeros(4, 3, 8, 8)], CalibrationError, "without content"),
        ([{"y": torch.randn(4, 3, 8, 8)}], DataError, "got y"),
        ([["words"]], DataError, "cannot be used"),
        ([torch.full((4, 3, 8, 8), torch.nan)], NonFiniteError, "NaN or infinite"),
        ([torch.randn(4, 2, 8, 8)], DataError, "does not run on a batch"),
        ([torch.randn(4, 3, 8, 8).double()], DataError, "does not run on a batch"),
    ],
    ids=["none", "zeros", "names", "words", "nan", "channels", "doubles"],
)
def test_inputs_that_say_nothing(tmp_path, small, x, batches, error, message) -> None:
    with pytest.raises(error, match=message):
        fc.export_onnx(small, tmp_path / "f.onnx", x, integer_sums=batches)
    assert not list(tmp_path.iterdir())


def test_networks_without_such_sums(tmp_path, x, monkeypatch) -> None:
    path = tmp_path / "f.onnx"
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.raises(OptionError, match=r"no sum.*2 of 2 layers"):
        fc.export_onnx(compressed(chain.eval(), x), path, x, integer_sums=[x])
    narrow = observe(rounded(Shortcut().eval(), fc.Grid(bits=4)), x, 8)
    with pytest.raises(OptionError, match=r"no sum.*0 of 4 layers.*min_bits=8"):
        fc.export_onnx(narrow, path, x, integer_sums=[x])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install.*\[onnx\]"):
        fc.export_onnx(narrow, path, x, min_bits=8, integer_sums=[x])
    assert not list(tmp_path.iterdir())


MODULE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.out = nn.Linear(4, 10)

    def forward(self, x):
        x = self.one(x).relu()
        return self.out((self.two(x) + x).relu().mean((2, 3)))
"""


def test_the_command_measures_on_digits(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_sums.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    from digits_sums import Net

    torch.manual_seed(0)
    fc.save(compressed(Net().eval(), torch.rand(64, 1, 8, 8)), "p")
    arguments = ["fitcompress", "export", "p", "--model", "digits_sums:Net"]
    arguments += ["--shape", "1,8,8", "--integer-sums"]

    def call(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0

    assert call("digits", "--onnx", "f.onnx", "--json", "r.json") == 0
    assert "1 integer sums" in capsys.readouterr().out
    values = json.loads((tmp_path / "r.json").read_text())
    assert values["integer_sums"] == 1
    assert values["agreement"]["samples"] == 1024
    assert call("letters") == 1
    assert "Error" in capsys.readouterr().err
