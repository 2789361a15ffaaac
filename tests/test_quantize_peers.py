"""The ways to a quantized, masked weight that are compared: all give the twin's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fake_quantize
import quantize_peers

SCRIPT = Path(fake_quantize.__file__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ours", "composed", "affine", "learnable"])
def test_results_are_those_of_the_twin(name, dtype):
    case = quantize_peers.build(8, 64, dtype, 0)
    expected, grad_weight, grad_scale = case.expected()
    result = quantize_peers.PEERS[name](case)()
    assert result.dtype == dtype
    # torch multiplies by 1/Δ, which may move a weight next to a tie to the next code
    assert (result != expected).float().mean() < 0.01
    grads = torch.autograd.grad(
        result, (case.weight, case.scale), case.grad, allow_unused=True
    )
    close = torch.isclose(grads[0], grad_weight, rtol=1e-2, atol=0)  # g · Δ / Δ
    assert close.float().mean() > 0.99
    assert (grads[1] is None) == (name == "affine")
    if grads[1] is not None and dtype == torch.float32:
        torch.testing.assert_close(grads[1], grad_scale, rtol=1e-4, atol=1e-4)


def test_composition_takes_groups():
    case = quantize_peers.build(4, 64, torch.float32, 16)
    assert case.scale.shape == (16,)
    result = quantize_peers.composed(case)()
    assert torch.equal(result, case.expected()[0])
    grads = torch.autograd.grad(result, (case.weight, case.scale), case.grad)
    for ours, twin in zip(grads, case.expected()[1:], strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-4)


def test_copies_move_the_bytes_of_a_pass():
    case = quantize_peers.build(4, 6, torch.bfloat16, 0)
    for direction, count in (("forward", 24), ("backward", 36)):
        copied = fake_quantize.copies(case, direction)["clone"]()
        assert (copied.numel(), copied.dtype) == (count, torch.bfloat16)


def test_script_writes_rows_bars_and_what_is_skipped(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(path)]
    command += ["--sizes", "4x24", "--dtypes", "float32", "--groups", "0", "7"]
    command += ["--candidates", "ours", "composed"]
    environment = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    found = json.loads(path.read_text())
    assert found["finished"]
    names = [row["candidate"] for row in found["rows"]]
    assert names == ["memcpy", "clone", "ours", "composed"] * 2
    assert found["skipped"] == {
        "4x24 float32 group 7": "the group does not divide the columns"
    }
    exact = [bar for bar in found["bars"] if "differs" in bar["name"]]
    assert len(exact) == 2
    assert all(bar["holds"] for bar in exact)
