"""What cannot be compressed block by block, and bad input, are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig

import fitcompress as fc
from blockwise_nets import calibration, network, plan_of, run, saved
from fitcompress.blockwise import run as runs
from fitcompress.blockwise import tokens
from fitcompress.blockwise.skeleton import Skeleton
from fitcompress.errors import (
    BudgetExceededError,
    DataError,
    EmptyLoaderError,
    FormatError,
    NonFiniteError,
    OptionError,
    OutputError,
    PlanMismatchError,
    UnsupportedLayerError,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder and its plan."""
    net = network()
    return saved(net, tmp_path_factory.mktemp("model") / "net"), plan_of(net)


def test_fixed_point_codes_that_cannot_fit_are_refused_before_work_starts(
    model, tmp_path, monkeypatch
) -> None:
    folder, plan = model
    fixed = {n: replace(x, grid=fc.Grid(bits=4)) for n, x in plan.levels.items()}
    monkeypatch.setattr(runs.Run, "_embed", None)  # the first stage
    with pytest.raises(BudgetExceededError, match="nothing was done"):
        run(folder, fc.Plan(fixed, limit_bytes=500), tmp_path / "f")


def test_models_of_other_blocks_are_refused(tmp_path) -> None:
    gemma = network(Gemma2Config, head_dim=8, query_pre_attn_scalar=8)
    other = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    for name, net in (
        ("gemma", gemma),
        ("gpt2", AutoModelForCausalLM.from_config(other).eval()),
    ):
        with pytest.raises(UnsupportedLayerError, match="block by block"):
            run(saved(net, tmp_path / name), plan_of(net), tmp_path / "f")
        assert not (tmp_path / "f.work").exists()


def test_a_layer_outside_of_blocks_is_refused(model, monkeypatch) -> None:
    folder, plan = model
    real = Skeleton.groups
    monkeypatch.setattr(Skeleton, "groups", lambda self, n: real(self, n)[:3])
    out = folder.parent / "refused"
    with pytest.raises(UnsupportedLayerError, match=r"down_proj' outside"):
        run(folder, plan, out)
    assert not out.with_name("refused.work").exists()


def test_hidden_states_that_are_scaled_before_the_first_block_are_refused(
    tmp_path,
) -> None:
    net = network(GraniteConfig, embedding_multiplier=3.0)
    with pytest.raises(UnsupportedLayerError, match="changes hidden states"):
        run(saved(net, tmp_path / "net"), plan_of(net), tmp_path / "f")


def test_bad_input_is_said_before_work_starts(model, tmp_path) -> None:
    folder, plan = model
    out = tmp_path / "f"
    with pytest.raises(DataError, match="sequences, length"):
        run(folder, plan, out, tokens=torch.zeros(3))
    with pytest.raises(DataError, match="0 to 31"):
        run(folder, plan, out, tokens=calibration() + 1)
    with pytest.raises(EmptyLoaderError):
        run(folder, plan, out, tokens=calibration()[:0])
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "none", plan, out)
    with pytest.raises(OutputError):
        run(folder, plan, tmp_path / "none" / "f")
    with pytest.raises(OptionError, match="overwrite"):
        run(folder, plan, folder / "model.safetensors")
    few = dict(list(plan.levels.items())[1:])
    with pytest.raises(PlanMismatchError):
        run(folder, fc.Plan(few), out)
    inputs = {n: replace(x, activation_bits=8) for n, x in plan.levels.items()}
    with pytest.raises(OptionError, match="activation"):
        run(folder, fc.Plan(inputs), out)
    assert not list(tmp_path.iterdir())


def test_damaged_models_are_refused(tmp_path) -> None:
    net = network()
    folder, plan = saved(net, tmp_path / "net"), plan_of(net)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(PlanMismatchError):
        run(folder, plan, tmp_path / "f")
    more = network(num_hidden_layers=3)
    with pytest.raises(FormatError, match=r"layers\.2"):
        run(folder, plan_of(more), tmp_path / "f")
    (folder / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="transformers"):
        run(folder, plan, tmp_path / "f")
    net.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    folder = saved(net, tmp_path / "bad")
    with pytest.raises(NonFiniteError, match="up_proj"):
        run(folder, plan, tmp_path / "g")


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", "x"), ("num_attention_heads", 0), ("num_hidden_layers", [2])],
)
def test_damaged_configs_are_refused(field, value, model, tmp_path) -> None:
    folder, _ = model
    config = json.loads((folder / "config.json").read_text())
    config.pop("head_dim", None)
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(FormatError, match="transformers can build"):
        Skeleton(tmp_path)


def test_code_in_a_folder_is_not_run(model, tmp_path, monkeypatch) -> None:
    folder, _ = model
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    (tmp_path / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig): model_type = 'own'\n"
        "class Model(LlamaForCausalLM): config_class = Config\n"
    )
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    own = {"auto_map": own, "model_type": "own"}
    (tmp_path / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(FormatError, match="transformers can build"):
        Skeleton(tmp_path)
    assert not asked and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "bad",
    [
        [[1, 2], [3]],
        [["a", "b"]],
        "text",
        None,
        torch.ones(2, 3, dtype=torch.bool),
        [[2**70]],
    ],
)
def test_what_is_no_matrix_of_integers_is_refused(bad) -> None:
    with pytest.raises(DataError, match="without padding"):
        tokens.checked_tokens(bad, 32)
