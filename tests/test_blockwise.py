"""Decoders compressed from shards, a block at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import fitcompress as fc
from blockwise_nets import (
    PLAIN,
    STEP,
    Stopped,
    calibration,
    network,
    plan_of,
    run,
    saved,
    stop_at,
)
from fitcompress.blockwise import layer, steps, tokens
from fitcompress.blockwise import run as runs
from fitcompress.blockwise.work import Work
from fitcompress.errors import BudgetExceededError
from fitcompress.storage.save_load import read


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
