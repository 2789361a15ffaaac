"""Latency tables: measured on a made-up target, resumed, saved, checked."""

import contextlib
import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.cli import main
from fitcompress.errors import DataError, FormatError, OptionError, PlanMismatchError
from fitcompress.latency.interplay import fit, make_patterns
from fitcompress.latency.timing import Timing
from fitcompress.quantize import activations
from test_search_activations import make_table

NAMES = ("conv", "deep", "head", "out")
SINGLE = {"conv": 0.3, "deep": 0.2, "head": -0.4, "out": -0.1}  # ms
PAIR = {("conv", "deep"): -1.0, ("deep", "head"): 0.1, ("head", "out"): -0.05}
X = torch.zeros(2, 2, 6, 6)


def formula(layers) -> float:
    """Milliseconds of TinyNet on the made-up target; 4 in float."""
    alone = sum(SINGLE[name] for name in layers)
    pairs = sum(ms for pair, ms in PAIR.items() if set(pair) <= set(layers))
    return 4.0 + alone + pairs


@dataclasses.dataclass
class FakeTarget:
    """Times by a formula; may stop after some networks, as a kill would."""

    fingerprint: str = "made up"
    stop_after: int = 10**9
    slower: float = 1.0
    timed: list = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def open(self, model, example_input, *, weight_bits):
        assert weight_bits == 8
        self.quantized = {name for name, _ in activations(model)}
        yield self

    def milliseconds(self, layers):
        assert set(layers) <= self.quantized
        if len(self.timed) == self.stop_after:
            raise KeyboardInterrupt
        self.timed.append(tuple(layers))
        # the machine is now and then at half its speed: ratios do not notice
        pace = 1 + len(self.timed) % 2
        ms = self.slower * formula(layers)
        return Timing.of([(pace * ms, 4.0 * pace), (ms, 4.0), (ms, 4.0)])


def measured(net, **options) -> fc.LatencyTable:
    return fc.measure_latency(net, X, FakeTarget(), progress=False, **options)


def plan_of(net, integer, bits=8, inputs=8) -> fc.Plan:
    shapes = {name: tuple(net.get_submodule(name).weight.shape) for name in NAMES}
    return fc.Plan(
        {
            name: fc.Level(
                fc.Grid(bits=bits),
                0.0,
                shape,
                activation_bits=inputs if name in integer else None,
            )
            for name, shape in shapes.items()
        }
    )


def test_the_table_knows_what_layers_and_neighbours_add(net) -> None:
    table = measured(net)
    assert table.names == NAMES
    assert table.float_ms == 4
    np.testing.assert_allclose(table.single_ms, list(SINGLE.values()), atol=1e-9)
    np.testing.assert_allclose(table.pair_ms, list(PAIR.values()), atol=1e-9)
    assert table.error_ms == pytest.approx(0, abs=1e-9)
    for count in range(5):
        for integer in itertools.combinations(NAMES, count):
            predicted = table.predict(plan_of(net, integer))
            assert predicted == pytest.approx(formula(integer), rel=1e-9)
    assert "all integer 3.05 ms" in table.summary()
    assert "head  alone -0.4000 ms" in str(table)


def test_a_formula_that_is_no_sum_shows_in_the_error() -> None:
    patterns = make_patterns(5, 32)
    far = patterns[:, 0] & patterns[:, 3]  # no neighbours
    found = fit(patterns, 1 + 0.4 * far)
    misses = found.predict(patterns) - (1 + 0.4 * far)
    assert found.error > np.sqrt(np.mean(misses**2)) > 0.05
    # by hand: leave each network out, fit the others, predict it
    left_out = []
    for i in range(1, len(patterns)):
        rest = np.delete(np.arange(len(patterns)), i)
        other = fit(patterns[rest], (1 + 0.4 * far)[rest])
        left_out.append(other.predict(patterns[i : i + 1])[0] - 1 - 0.4 * far[i])
    assert found.error == pytest.approx(np.sqrt(np.mean(np.square(left_out))))


@pytest.mark.parametrize(("layers", "count"), [(1, 5), (3, 8), (20, 62), (6, 2)])
def test_patterns_are_different_and_have_both_ends(layers, count) -> None:
    patterns = make_patterns(layers, count, seed=3)
    assert len(patterns) == min(count, 2**layers)
    assert len(np.unique(patterns, axis=0)) == len(patterns)
    assert not patterns[0].any()
    assert patterns.all(axis=1).any()
    np.testing.assert_array_equal(patterns, make_patterns(layers, count, seed=3))


def test_a_killed_measurement_goes_on(net, tmp_path) -> None:
    file, first, second = tmp_path / "partial", FakeTarget(stop_after=5), FakeTarget()
    options = {"checkpoint": file, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        fc.measure_latency(net, X, first, **options)
    table = fc.measure_latency(net, X, second, **options)
    assert len(first.timed) + len(second.timed) == len(table.ratios) == 14
    assert not file.exists()
    np.testing.assert_allclose(table.single_ms, measured(net).single_ms)
    # what belongs to another target is measured anew
    with pytest.raises(KeyboardInterrupt):
        fc.measure_latency(net, X, FakeTarget(stop_after=5), **options)
    other = FakeTarget("another")
    fc.measure_latency(net, X, other, **options)
    assert len(other.timed) == 14
    file.write_bytes(b"damaged")
    assert len(fc.measure_latency(net, X, FakeTarget(), **options).ratios) == 14


def test_tables_are_saved_whole(net, tmp_path) -> None:
    table, path = measured(net), tmp_path / "latency.json"
    table.save(path)
    again = fc.LatencyTable.load(path)
    assert again.to_dict() == table.to_dict()
    np.testing.assert_array_equal(again.single_ms, table.single_ms)
    with pytest.raises(FileNotFoundError):
        fc.LatencyTable.load(tmp_path / "nothing")
    good = json.loads(path.read_text())
    for change in (
        {"ratios": good["ratios"][1:]},
        {"float_ms": -1},
        {"fitcompress_latency": 99},
        {"names": None},
        {"patterns": [[2]]},
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(FormatError):
            fc.LatencyTable.load(path)
    for text in (b"", b"[]", b"{}", b"\xff", json.dumps(good).encode()[:-9]):
        path.write_bytes(text)
        with pytest.raises(FormatError):
            fc.LatencyTable.load(path)


def test_a_check_says_predicted_and_measured(net) -> None:
    table = measured(net)
    plan = plan_of(net, ("conv", "deep"), bits=4, inputs=6)
    check = table.check(net, X, FakeTarget(), plan=plan)
    assert check.predicted_ms == pytest.approx(3.5)
    assert check.measured_ms == pytest.approx(3.5)
    assert "predicted 3.5 ms ⇒ measured 3.5 ms (+0.0 %)" in str(check)
    slow = table.check(net, X, FakeTarget(slower=2.0), plan=plan)
    assert slow.error == pytest.approx(-0.5)


def test_a_compressed_model_is_checked_as_it_is(net, loader) -> None:
    table, target = measured(net), FakeTarget()
    small = fc.apply(net, plan_of(net, ("head",)), calibrate=loader, progress=False)
    assert table.check(small, X, target).predicted_ms == pytest.approx(3.6)
    assert target.timed == [("head",)]


def test_checks_that_cannot_be(net) -> None:
    table, plan = measured(net), plan_of(net, ("conv",))
    with pytest.raises(OptionError, match="measured on something else"):
        table.check(net, X, FakeTarget("another"), plan=plan)
    with pytest.raises(PlanMismatchError, match="not compressed"):
        table.check(net, X, FakeTarget())
    wide = plan_of(net, ("conv",), bits=16)
    with pytest.raises(OptionError, match="'conv' was not measured at its level"):
        table.check(net, X, FakeTarget(), plan=wide)
    with pytest.raises(PlanMismatchError, match="the plan lacks"):
        table.predict(fc.Plan({"conv": plan.levels["conv"]}))


def test_measurements_that_cannot_be(net) -> None:
    for options in (
        {"weight_bits": 5},
        {"activation_bits": 1},
        {"networks": 1},
    ):
        with pytest.raises(OptionError):
            measured(net, **options)
    with pytest.raises(DataError, match="does not run"):
        fc.measure_latency(net, torch.zeros(2, 3), FakeTarget(), progress=False)
    with pytest.raises(OptionError, match="calls no layer"):
        fc.measure_latency(
            nn.Embedding(9, 4), torch.zeros(2, 3).long(), FakeTarget(), progress=False
        )


class Tokens(nn.Module):
    """An embedding, a layer that is never called, and two in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.unused = nn.Linear(4, 4)
        self.second = nn.Linear(4, 3)
        self.first = nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.embed(ids)).relu())


def test_layers_stand_in_the_order_in_which_they_run() -> None:
    class Target(FakeTarget):
        def milliseconds(self, layers):
            ms = 4 - ("first" in layers) - len(layers)
            return Timing.of([(ms, 4.0)])

    ids = torch.zeros(2, 3).long()
    table = fc.measure_latency(Tokens(), ids, Target(), progress=False)
    assert table.names == ("first", "second")
    np.testing.assert_allclose(table.single_ms, [-2, -1], atol=1e-9)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    real = fc.OnnxRuntimeTarget(turns=1, shortest_ms=0, batch=3)
    assert len(fc.measure_latency(Tokens(), ids, real, progress=False).ratios) == 4


def test_the_command_line(tmp_path, monkeypatch, capsys, sensitivity) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_width.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))\n"
    )
    (tmp_path / "clock.py").write_text("print(1.5)\n")

    def run(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["fitcompress", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0

    clock = f"{sys.executable} clock.py {{onnx}}"
    model = ("--model", "tiny_width:build", "--shape", 6)
    assert run("measure-latency", *model, "--command", clock, "--json", "l.json") == 0
    assert "float 1.5 ms" in capsys.readouterr().out
    table = fc.LatencyTable.load("latency.json")
    assert json.loads((tmp_path / "l.json").read_text()) == table.to_dict()
    sensitivities = make_table(layers=2, names=("0", "2"))
    sensitivities.save("s")
    options = ("--latency", "100%", "--latency-table", "latency.json")
    assert run("search", "s", *options, "--json", "p.json") == 0
    assert "predicted latency 1.5 ms with 0 integer" in capsys.readouterr().out
    assert json.loads((tmp_path / "p.json").read_text())["latency_ms"] == 1.5
    assert run("search", "s", "--latency", "1ms") == 2
    assert "go together" in capsys.readouterr().err
    assert run("search", "s", "--latency", "10%", *options[2:]) == 1
    assert "no plan meets the budget" in capsys.readouterr().err
