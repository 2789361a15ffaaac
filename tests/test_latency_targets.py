"""Targets of latencies: commands, and ONNX Runtime on this machine."""

import sys

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.errors import (
    LatencyError,
    OptionError,
)

X = torch.zeros(2, 2, 6, 6)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code, "{onnx}", "{batch}"]


def test_a_command_prints_milliseconds(tmp_path) -> None:
    path = tmp_path / "a; b $(c).onnx"
    path.write_bytes(b"12345")
    code = "import os, sys; print('hello'); print(os.path.getsize(sys.argv[1]), 'ms')"
    target = fc.CommandTarget(python(code), turns=2)
    assert target.milliseconds_of(path) == 5
    other = tmp_path / "other"
    other.write_bytes(b"1234567890")
    timing = target.time_files(path, other, X)
    assert (timing.ms, timing.reference_ms, timing.ratio) == (5, 10, 0.5)
    assert "batch 1" in target.fingerprint
    batch = fc.CommandTarget(python("import sys; print(sys.argv[2])"), batch=7)
    assert batch.milliseconds_of(path) == 7


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import time; time.sleep(60)", r"took too long.*more than 0\.3 seconds"),
        # it ends, and leaves something behind that never closes its output
        (
            "import subprocess, sys; "
            "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])",
            r"took too long",
        ),
        ("import sys; sys.exit('broken board')", "exit code 1.*broken board"),
        ("print('fast')", "printed no milliseconds.*fast"),
        ("print(0)", "printed no milliseconds"),
        ("print('nan')", "printed no milliseconds"),
        ("print('1e999')", "printed no milliseconds"),
        ("print('-4')", "printed no milliseconds"),
        ("pass", "printed no milliseconds"),
    ],
)
def test_commands_that_fail(code, message, tmp_path) -> None:
    timeout = 0.3 if "sleep" in code else 60
    target = fc.CommandTarget(python(code), timeout=timeout)
    with pytest.raises(LatencyError, match=message):
        target.milliseconds_of(tmp_path / "net.onnx")


def test_a_command_that_is_not_there(tmp_path) -> None:
    target = fc.CommandTarget("no-such-program-anywhere {onnx}")
    with pytest.raises(LatencyError, match=r"cannot be started.*No such file"):
        target.milliseconds_of(tmp_path / "net.onnx")


@pytest.mark.parametrize(
    "options",
    [
        {"command": "time_it"},
        {"command": "{onnx}"},
        {"command": ""},
        {"command": "time_it '{onnx}"},
        {"command": ["time_it", 5]},
        {"command": "time_it {onnx}", "timeout": 0},
        {"command": "time_it {onnx}", "turns": 0},
    ],
)
def test_what_is_no_command(options) -> None:
    with pytest.raises(OptionError):
        fc.CommandTarget(**options)


def width(channels: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, channels), nn.ReLU(), nn.Linear(channels, 10)
    ).eval()


def test_onnx_runtime_tells_large_from_small() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    target = fc.OnnxRuntimeTarget(turns=3, shortest_ms=1)
    x, found = torch.zeros(1, 64), {}
    for channels in (64, 20_000):
        table = fc.measure_latency(width(channels), x, target, progress=False)
        found[channels] = table.float_ms
        assert len(table.ratios) == 4
        assert (table.ratios > 0).all()
        assert "onnxruntime" in table.target
    assert found[20_000] > 3 * found[64]
    plan = fc.Plan(
        {
            name: fc.Level(fc.Grid(bits=8), 0.0, shape, activation_bits=8)
            for name, shape in (("0", (64, 64)), ("2", (10, 64)))
        }
    )
    table = fc.measure_latency(width(64), x, target, progress=False)
    check = table.check(width(64), x, target, plan=plan)
    assert check.predicted_ms > 0
    assert check.measured_ms > 0


def test_options_of_the_runtime() -> None:
    for options in ({"threads": 0}, {"batch": 1.5}, {"turns": 0}, {"shortest_ms": -1}):
        with pytest.raises(OptionError):
            fc.OnnxRuntimeTarget(**options)


def test_a_file_that_is_no_network(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(LatencyError, match="does not run the network"):
        fc.OnnxRuntimeTarget().time_files(path, path, X)
