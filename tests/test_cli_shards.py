"""From shards to a packed file on the command line."""

import json

import numpy as np
import pytest
import torch

import fitcompress as fc
from blockwise_nets import calibration, network, saved

WIDE = {"hidden_size": 128, "intermediate_size": 160, "vocab_size": 64}


@pytest.fixture
def tokens(tmp_path):
    np.save(tmp_path / "tokens.npy", calibration(64).numpy())
    return tmp_path / "tokens.npy"


def test_measure_search_and_apply_from_shards(run, tokens, tmp_path) -> None:
    folder = saved(network(**WIDE), tmp_path / "net")
    shards = ("--shards", str(folder))
    assert run("measure", *shards, "--out", "t.safetensors").code == 0
    args = ("--size", "30%", "--out", "p.json")
    assert run("search", "t.safetensors", *args).code == 0
    args = ("p.json", *shards, "--data", str(tokens), "--json", "a.json")
    result = run("apply-shards", *args, "--seed", "3", "--samples", "24")
    assert result.code == 0, result.err
    told = json.loads((tmp_path / "a.json").read_text())
    size = (tmp_path / "small.safetensors").stat().st_size
    assert told["bytes_after"] == size <= fc.Plan.load(tmp_path / "p.json").limit_bytes
    small = fc.load(tmp_path / "small.safetensors", network(**WIDE))
    with torch.no_grad():
        out = small(calibration(2)).logits
    assert bool(torch.isfinite(out).all())
    assert not (tmp_path / "small.safetensors.work").exists()


def test_tokens_and_plans_that_do_not_fit(run, tokens, tmp_path) -> None:
    folder = saved(network(**WIDE), tmp_path / "net")
    levels = {"elsewhere": fc.Level(fc.Grid(bits=4), 0.0, (2, 2))}
    fc.Plan(levels, method="test").save(tmp_path / "p.json")
    shards = ("--shards", str(folder))
    result = run("apply-shards", "p.json", *shards, "--data", str(tokens))
    assert result.code == 1
    assert "PlanMismatchError" in result.err
    result = run("apply-shards", "p.json", *shards, "--data", "none.npy")
    assert result.code == 1
    assert "there is no file of tokens" in result.err
    assert not (tmp_path / "small.safetensors").exists()
