"""Decoders compressed from shards, a block at a time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import fitcompress as fc
from fitcompress.blockwise import layer, rows, steps, tokens
from fitcompress.blockwise import run as runs
from fitcompress.blockwise.skeleton import Skeleton
from fitcompress.blockwise.work import Work
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
from fitcompress.model import compressible_layers
from fitcompress.storage.save_load import read

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
PLAIN = fc.Compensation(beam=1, shared=False)
STEP = fc.Grid(step=0.25)


def network(kind=LlamaConfig, **options):
    torch.manual_seed(0)
    config = kind(**SMALL | {"tie_word_embeddings": False} | options)
    net = AutoModelForCausalLM.from_config(config).eval()
    for name, value in net.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(value, 0.5, 1.5)
    return net


def plan_of(net, grid=STEP, sparsity=0.0, **options) -> fc.Plan:
    return fc.Plan(
        {
            each.name: fc.Level(grid, sparsity, each.shape, distortion=0.125)
            for each in compressible_layers(net)
        },
        **options,
    )


def calibration(sequences: int = 32, length: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(32, (sequences, length), generator=generator)


def saved(net, folder: Path) -> Path:
    net.save_pretrained(folder)
    return folder


def run(folder: Path, plan: fc.Plan, out: Path, **options) -> bytes:
    options = {"compensation": PLAIN, "progress": False} | options
    size = fc.compensate_shards(
        folder, plan, options.pop("tokens", calibration()), out, **options
    )
    data = out.read_bytes()
    assert size == len(data)
    assert not out.with_name(f"{out.name}.work").exists()
    return data


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LlamaConfig, {"tie_word_embeddings": True}),
        (LlamaConfig, {}),
        (MistralConfig, {"sliding_window": 4}),
        (Qwen2Config, {}),
        (
            Qwen2Config,  # block 1 has a window, block 0 none
            {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        ),
        (Qwen3Config, {"head_dim": 16}),
    ],
)
def test_the_file_is_that_of_apply_byte_for_byte(kind, options, tmp_path) -> None:
    net, data = network(kind, **options), calibration()
    plan = plan_of(net)
    found = run(saved(net, tmp_path / "net"), plan, tmp_path / "blocks")
    batches = [{"input_ids": data}]
    small = fc.apply(net, plan, batches, compensation=PLAIN, progress=False)
    fc.save(small, tmp_path / "whole")
    assert found == (tmp_path / "whole").read_bytes()
    loaded = fc.load(tmp_path / "blocks", network(kind, **options))
    with torch.no_grad():
        assert torch.equal(loaded(data).logits, small(data).logits)


def test_biases_take_up_means_as_in_apply(tmp_path) -> None:
    options = {"mlp_bias": True, "attention_bias": True}
    net, data = network(**options), calibration()
    for name, value in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value)
    plan = plan_of(net)
    run(saved(net, tmp_path / "net"), plan, tmp_path / "blocks")
    small = fc.apply(
        net, plan, [{"input_ids": data}], compensation=PLAIN, progress=False
    )
    fc.save(small, tmp_path / "whole")
    ours, theirs = (read(tmp_path / name) for name in ("blocks", "whole"))
    moved = 0
    for name, weight in ours.weights.items():
        assert torch.equal(weight.codes, theirs.weights[name].codes)
    for name, value in ours.leftovers.tensors.items():
        # To one unit of 16 bits: outputs are summed in float32 there, here in float64.
        torch.testing.assert_close(
            value, theirs.leftovers.tensors[name], rtol=2**-10, atol=1e-6
        )
        moved += int((value != net.state_dict()[name].half().float()).sum())
    assert moved > 50


@pytest.mark.parametrize(
    ("grid", "sparsity"), [(fc.Grid(bits=4), 0.0), (STEP, 0.5), (fc.Grid(bits=3), 0.3)]
)
def test_fixed_point_and_masks(grid, sparsity, tmp_path) -> None:
    net, batches = network(), [{"input_ids": calibration()}]
    plan = plan_of(net, grid, sparsity)
    found = run(saved(net, tmp_path / "net"), plan, tmp_path / "blocks")
    small = fc.apply(net, plan, batches, compensation=PLAIN, progress=False)
    fc.save(small, tmp_path / "whole")
    assert found == (tmp_path / "whole").read_bytes()


def test_weights_of_16_bits_stay_so(tmp_path) -> None:
    net = network().bfloat16()
    run(saved(net, tmp_path / "net"), plan_of(net), tmp_path / "f")
    loaded = fc.load(tmp_path / "f", network().bfloat16())
    weight = loaded.model.layers[1].mlp.down_proj.weight
    assert weight.dtype == torch.bfloat16
    stored = read(tmp_path / "f").weights["model.layers.1.mlp.down_proj"]
    assert torch.equal(weight.detach(), stored.weight())
    dense, data = network().bfloat16(), calibration()
    with torch.no_grad():
        change = (loaded(data).logits - dense(data).logits).float().norm()
        assert 0 < change < 0.5 * dense(data).logits.float().norm()


def test_compensation_beats_rounding(tmp_path) -> None:
    net, data = network(), calibration(128, 16)
    plan = plan_of(net)
    run(saved(net, tmp_path / "net"), plan, tmp_path / "f", tokens=data)
    small = fc.load(tmp_path / "f", network())
    rounded = fc.remove(fc.apply(net, plan, progress=False))
    test = torch.randint(32, (64, 16), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        wanted = net(test).logits
        ours, theirs = ((m(test).logits - wanted).norm() for m in (small, rounded))
    assert ours < 0.8 * theirs


def test_large_layers_are_compensated_by_some_rows_at_a_time(
    tmp_path, monkeypatch
) -> None:
    net = network()
    folder, plan = saved(net, tmp_path / "net"), plan_of(net)
    options = {"compensation": replace(PLAIN, drift=0.5)}
    whole = run(folder, plan, tmp_path / "whole", **options)
    monkeypatch.setattr(runs, "ROWS", 7)
    assert run(folder, plan, tmp_path / "parts", **options) == whole


class Stopped(BaseException):
    """As good as a kill for what is on disk."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder, its plan, the file, and the number of writes of rows and stages."""
    path = tmp_path_factory.mktemp("finished")
    net = network()
    folder, plan, counts = saved(net, path / "net"), plan_of(net), {}
    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((rows.RowWriter, "write"), (Work, "put")):
            stop_at(patch, place, name, 10**9, counts)
        data = run(folder, plan, path / "file")
    return folder, plan, data, counts


def stop_at(patch, place, name, number, counts=None) -> None:
    """Let the so many-th call of a method end the run before it does anything."""
    real, counts = getattr(place, name), {} if counts is None else counts

    def stop(*args, **named):
        counts[name] = counts.get(name, 0) + 1
        if counts[name] == number:
            raise Stopped
        return real(*args, **named)

    patch.setattr(place, name, stop)


def finished_layers(path: Path) -> set[str]:
    """Return the layers of the stages that a stopped run has finished."""
    work = Work(path, json.loads((path / "run.json").read_text())["fitcompress_run"])
    stages = [file.stem for file in path.glob("*.stage")]
    return {name for stage in stages for name in work.layers(stage)}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("name", ["write", "put"])
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    name, share, finished, tmp_path, monkeypatch
) -> None:
    folder, plan, data, counts = finished
    at = 1 + round(share * (counts[name] - 1))
    place = rows.RowWriter if name == "write" else Work
    with monkeypatch.context() as patch:
        stop_at(patch, place, name, at)
        with pytest.raises(Stopped):
            run(folder, plan, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    done = finished_layers(tmp_path / "file.work")
    assert done if share == 1 else at > 1 or not done
    calls = []
    with monkeypatch.context() as patch:
        real = runs.compensated
        patch.setattr(
            runs,
            "compensated",
            lambda *a, **k: calls.append(k["name"]) or real(*a, **k),
        )
        assert run(folder, plan, tmp_path / "file") == data
    # What was finished is not done again, and everything else once.
    assert sorted(calls) == sorted(set(plan.levels) - done - {"model.embed_tokens"})


KILLED = """
import os, signal, sys, torch
import fitcompress as fc
from fitcompress.blockwise import rows
sys.path.insert(0, sys.argv[1])
import test_blockwise as t
real, calls = rows.RowWriter.write, []
def write(self, first, values):
    calls.append(1)
    if len(calls) == 60:
        real(self, first, values[:1])  # half of it
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, first, values)
rows.RowWriter.write = write
t.run(t.Path(sys.argv[2]), t.plan_of(t.network()), t.Path(sys.argv[3]))
"""


def test_killed_within_a_block_it_goes_on(finished, tmp_path) -> None:
    folder, plan, data, _ = finished
    script = [sys.executable, "-c", KILLED, Path(__file__).parent, folder]
    done = subprocess.run([*script, tmp_path / "file"], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert list((tmp_path / "file.work").glob("*.partial"))
    assert run(folder, plan, tmp_path / "file") == data


def test_a_folder_of_another_run_is_left_alone(finished, tmp_path, monkeypatch) -> None:
    folder, plan, *_ = finished
    with monkeypatch.context() as patch:
        stop_at(patch, Work, "put", 4)
        with pytest.raises(Stopped):
            run(folder, plan, tmp_path / "file")
    before = sorted((tmp_path / "file.work").iterdir())
    with pytest.raises(OptionError, match="another run"):
        run(folder, plan, tmp_path / "file", tokens=calibration(31))
    assert sorted((tmp_path / "file.work").iterdir()) == before


def test_a_work_folder_that_was_there_is_emptied_and_stays(finished, tmp_path) -> None:
    folder, plan, data, _ = finished
    place, link = tmp_path / "place", tmp_path / "link"
    place.mkdir()
    link.symlink_to(place)
    (place / ".run.json-abc").write_bytes(b"left by a kill")
    assert run(folder, plan, tmp_path / "file", work=link) == data
    assert link.is_dir() and not list(place.iterdir())


def test_files_of_others_in_a_work_folder_are_kept(tmp_path) -> None:
    work = Work(tmp_path / "work", "key")
    (work.path / "notes.txt").write_text("mine")
    Work(tmp_path / "work", "key").forget()
    assert [path.name for path in work.path.iterdir()] == ["notes.txt"]


def test_a_damaged_stage_is_an_error(finished, tmp_path, monkeypatch) -> None:
    folder, plan, *_ = finished
    with monkeypatch.context() as patch:
        stop_at(patch, Work, "put", 4)
        with pytest.raises(Stopped):
            run(folder, plan, tmp_path / "file")
    stage = tmp_path / "file.work" / "block-0000-0.stage"
    stage.write_bytes(stage.read_bytes()[:50])
    with pytest.raises(FormatError, match="block-0000-0"):
        run(folder, plan, tmp_path / "file")


def test_few_sequences_are_not_corrected_for_drift(tmp_path, monkeypatch) -> None:
    net, drifts = network(), []
    real = layer.on_level
    monkeypatch.setattr(
        layer,
        "on_level",
        lambda problems, *a, **k: (
            drifts.append(problems[0].target.drift) or real(problems, *a, **k)
        ),
    )
    folder = saved(net, tmp_path / "net")
    run(folder, plan_of(net), tmp_path / "f", tokens=calibration(3, 40))
    assert len(drifts) == 15 and not any(drifts)


def test_sequences_are_held_out_as_apply_does() -> None:
    some = tokens.Tokens(calibration(32, 600))
    held = some.chunks(held_out=True)
    assert [(c.first, c.sequences) for c in held] == [
        (12, 3),
        (15, 1),
        (28, 3),
        (31, 1),
    ]
    both = held + some.chunks(held_out=False)
    covered = sorted(i for c in both for i in range(c.first, c.first + c.sequences))
    assert covered == list(range(32))
    assert not tokens.Tokens(calibration(3)).held_out


def test_steps_are_scaled_until_the_file_uses_the_limit(tmp_path, monkeypatch) -> None:
    net = network(hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    folder = saved(net, tmp_path / "net")
    for limit in (50_000, 75_000):
        plan = plan_of(net, fc.Grid(step=0.4), limit_bytes=limit)
        data = run(folder, plan, tmp_path / "f")
        assert 0.97 * limit <= len(data) <= limit
        steps = {x.grid.step for x in read(tmp_path / "f").plan.levels.values()}
        assert max(steps) < 1.35 * min(steps)
    with monkeypatch.context() as patch:
        stop_at(patch, Work, "put", 12)
        with pytest.raises(Stopped):
            run(folder, plan, tmp_path / "g")
    assert run(folder, plan, tmp_path / "g") == data


def test_the_last_layers_make_up_for_what_is_too_much(tmp_path, monkeypatch) -> None:
    net = network(hidden_size=64, intermediate_size=96)
    folder = saved(net, tmp_path / "net")
    plan = plan_of(net, fc.Grid(step=0.4), limit_bytes=30_000)
    real = steps.pace_for

    def too_fine(*arguments, **named):
        pace = real(*arguments, **named)
        pace._factor, pace._target = 0.97 * pace._factor, 1.02 * pace._target
        return pace

    monkeypatch.setattr(runs, "pace_for", too_fine)
    assert 29_000 <= len(run(folder, plan, tmp_path / "f")) <= 30_000
    found = read(tmp_path / "f").plan.levels
    assert found["lm_head"].grid.step > 1.05 * found["model.embed_tokens"].grid.step


def test_no_file_beyond_the_budget(tmp_path) -> None:
    net = network()
    folder = saved(net, tmp_path / "net")
    for grid in (STEP, fc.Grid(bits=4)):
        with pytest.raises(BudgetExceededError) as caught:
            run(folder, plan_of(net, grid, limit_bytes=500), tmp_path / "f")
        assert caught.value.size_bytes > 500 and not (tmp_path / "f").exists()
        assert not (tmp_path / "f.work").exists()


def test_fixed_point_codes_that_cannot_fit_are_refused_before_work_starts(
    finished, tmp_path, monkeypatch
) -> None:
    folder, plan, *_ = finished
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


def test_a_layer_outside_of_blocks_is_refused(finished, monkeypatch) -> None:
    folder, plan, *_ = finished
    real = Skeleton.groups
    monkeypatch.setattr(Skeleton, "groups", lambda self, n: real(self, n)[:3])
    out = folder.parent / "refused"
    with pytest.raises(UnsupportedLayerError, match=r"down_proj' outside"):
        run(folder, plan, out)
    assert not out.with_name("refused.work").exists()


def test_work_of_another_version_is_left_alone(finished, tmp_path, monkeypatch) -> None:
    folder, plan, *_ = finished
    with monkeypatch.context() as patch:
        stop_at(patch, Work, "put", 1)
        with pytest.raises(Stopped):
            run(folder, plan, tmp_path / "file")
    monkeypatch.setattr(runs, "__version__", "0")
    with pytest.raises(OptionError, match="another run"):
        run(folder, plan, tmp_path / "file")


def test_hidden_states_that_are_scaled_before_the_first_block_are_refused(
    tmp_path,
) -> None:
    net = network(GraniteConfig, embedding_multiplier=3.0)
    with pytest.raises(UnsupportedLayerError, match="changes hidden states"):
        run(saved(net, tmp_path / "net"), plan_of(net), tmp_path / "f")


def test_bad_input_is_said_before_work_starts(finished, tmp_path) -> None:
    folder, plan, *_ = finished
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
def test_damaged_configs_are_refused(field, value, finished, tmp_path) -> None:
    folder, *_ = finished
    config = json.loads((folder / "config.json").read_text())
    config.pop("head_dim", None)
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(FormatError, match="transformers can build"):
        Skeleton(tmp_path)


def test_code_in_a_folder_is_not_run(finished, tmp_path, monkeypatch) -> None:
    folder, *_ = finished
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
