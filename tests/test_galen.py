"""Galen: whole searches, retraining through grids, resumption, files, the command."""

import copy
import json
import sys

import pytest
import torch
from torch import nn

import fitcompress as fc
from dying_batches import dying
from fitcompress.cli import main
from fitcompress.data import load_dataset
from fitcompress.errors import DataError, MissingDependencyError, OptionError
from fitcompress.latency.networks import planned_network
from fitcompress.latency.target import OnnxTarget
from fitcompress.latency.timing import Timing
from fitcompress.methods import Galen
from fitcompress.methods.galen import ending, packages, retraining
from fitcompress.methods.galen.episode import Builder
from fitcompress.methods.galen.policy import ActionMap, Policy
from fitcompress.methods.galen.retraining import (
    Lessons,
    estimate_all_norms_,
    retrain_,
)
from fitcompress.methods.galen.walk import make_walk
from fitcompress.quantize import activations, grid_of
from fitcompress.storage.save_load import packed_bytes
from fitcompress.train.supervised import train
from fitcompress.zoo import DigitsNet
from galen_nets import OPTIONS, FakeTarget, X, make_loader, make_net, run


@pytest.fixture(scope="module")
def searched() -> tuple[fc.Plan, nn.Module]:
    return run()


def test_a_search(searched) -> None:
    plan, small = searched
    details = plan.details
    assert len(details["history"]) == OPTIONS["episodes"]
    best = max(details["history"])
    assert details["searched"]["reward"] == best[0]
    value = details["accuracy"] - 5 * abs(details["share"] / 0.3 - 1)
    assert details["reward"] == pytest.approx(value)
    assert plan.method == "galen"
    assert plan.size_bytes == len(packed_bytes(small))
    assert details["policy"]["bits"]
    for name, (weight, inputs) in details["policy"]["bits"].items():
        level = plan.levels[name]
        assert (level.grid.bits, level.activation_bits) == (weight, inputs)
    floats = set(plan.levels) - set(details["policy"]["bits"])
    assert floats
    for name in floats:
        level = plan.levels[name]
        assert (level.grid.bits, level.activation_bits) == (16, None)
    json.dumps(details)
    assert fc.Plan.from_json(plan.to_json()).details == details


def test_the_latency_is_that_of_the_pruned_network(searched) -> None:
    plan, small = searched
    with (
        FakeTarget().open(make_net(), X, weight_bits=8) as dense,
        FakeTarget().open(small, X, weight_bits=8, reference=dense) as session,
    ):
        timing = session.milliseconds([name for name, _ in activations(small)])
    assert plan.details["share"] == timing.ratio < 1
    policy = plan.details["policy"]["channels"]
    assert any(kept < width for kept, width in policy.values())


def test_a_packed_file_of_a_pruned_network(searched, tmp_path) -> None:
    plan, small = searched
    fc.save(small, tmp_path / "small.safetensors")
    plan.save(tmp_path / "plan.json")
    kept = fc.Plan.load(tmp_path / "plan.json").details["kept_channels"]
    assert kept
    again = fc.load(
        tmp_path / "small.safetensors", fc.methods.prune_channels(make_net(), kept)
    )
    x = torch.randn(16, 2, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_the_same_seed_ends_the_same(searched, one_thread) -> None:
    plan, small = run()
    assert plan.to_json() == searched[0].to_json()
    assert packed_bytes(small) == packed_bytes(searched[1])
    other, _ = run(seed=1, options={"episodes": 2, "finetune_epochs": 0})
    assert other.details["history"] != plan.details["history"][:2]
    best = max(other.details["history"])
    assert [other.details[x] for x in ("reward", "accuracy", "share")] == best


def test_a_killed_search_ends_the_same(searched, tmp_path) -> None:
    path = tmp_path / "galen"
    for count in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=path, target=FakeTarget(count))
    assert path.exists()
    target = FakeTarget()
    plan, small = run(checkpoint=path, target=target)
    assert target.timed < OPTIONS["episodes"] - 2
    assert plan.to_json() == searched[0].to_json()
    assert packed_bytes(small) == packed_bytes(searched[1])
    assert not list(tmp_path.iterdir())


def test_a_retraining_killed_at_the_end_ends_the_same(
    searched, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(retraining, "SAVE_EVERY", 0.0)
    path = tmp_path / "galen"
    loader = dying(make_loader(), last := 10**6)

    def start(*arguments, **more):
        loader.calls = last - 9  # stops in the second of two passes of 6 batches
        return retrain_(*arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ending, "retrain_", start)
        run(loader=loader, checkpoint=path)
    assert (tmp_path / "galen.retrain").exists()
    target = FakeTarget()
    plan, small = run(checkpoint=path, target=target)
    assert target.timed == 1, "only the final network is timed"
    assert plan.to_json() == searched[0].to_json()
    assert packed_bytes(small) == packed_bytes(searched[1])
    assert not list(tmp_path.iterdir())


def test_policies_are_measured_once() -> None:
    target = FakeTarget()
    options = {"agent": "quantization", "episodes": 30, "retrain_epochs": 0}
    plan, _ = run(target=target, options=options)
    different = {tuple(each) for each in plan.details["history"]}
    assert len(plan.details["history"]) == 30
    assert len(different) <= target.timed - 1 <= 2**4


def built(policy: Policy) -> tuple[nn.Module, nn.Module]:
    net = make_net()
    walk = make_walk(net, X, ActionMap(round_to=2))
    inputs = [x for x, _ in make_loader()]
    return net, Builder(net, walk, inputs, None).build(policy)


def test_latent_weights_are_trained() -> None:
    """Released hooks of the paper detach quantized weights: these would never move."""
    policy = Policy((4, 12, 16), (("3", 8, 8), ("9", 3, 4)))
    net, small = built(policy)
    latent = {
        name: small.get_submodule(name).parametrizations.weight.original
        for name in ("3", "9")
    }
    scale = small.get_submodule("9").input_quantizer.scale
    start = {name: value.detach().clone() for name, value in latent.items()}
    small(torch.randn(8, 2, 8, 8)).square().sum().backward()
    for value in (*latent.values(), scale, small.get_submodule("0").weight):
        assert value.grad is not None
        assert value.grad.abs().sum() > 0
    codes = {
        n: grid_of(small.get_submodule(n)).round(_rows(v)) for n, v in start.items()
    }
    lessons, losses = Lessons(net, make_loader(), None), []
    for _ in range(2):
        losses += retrain_(small, lessons, epochs=3, learning_rate=3e-3)
    assert losses[-1] < 0.5 * losses[0]
    for name, value in latent.items():
        assert (value - start[name]).abs().max() > 1e-3
        grid = grid_of(small.get_submodule(name))
        assert (grid.round(_rows(value)) != codes[name]).any()


def _rows(value: torch.Tensor) -> torch.Tensor:
    return value.detach().flatten(1)


def test_frozen_weights_are_not_trained() -> None:
    net = make_net()
    net[3].requires_grad_(False)
    walk = make_walk(net, X, ActionMap(round_to=2))
    policy = Policy((4, 12, 16), (("3", 8, 8),))
    small = Builder(net, walk, [x for x, _ in make_loader()], None).build(policy)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    retrain_(small, Lessons(net, make_loader(), None), epochs=1, learning_rate=1e-2)
    for name, parameter in small.named_parameters():
        frozen = name in ("3.parametrizations.weight.original", "3.bias")
        assert torch.equal(parameter, before[name]) == frozen
        assert parameter.requires_grad != frozen


def test_a_rest_of_one_sample_has_no_variance() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    loader = [torch.randn(8, 4), torch.randn(8, 4), torch.randn(1, 4)]
    part, whole = Lessons(net, loader, 9), Lessons(net, loader, None)
    assert [len(x) for x, _ in part] == [8]
    assert [len(x) for x, _ in whole] == [8, 8]
    small = copy.deepcopy(net)
    retrain_(small, whole, epochs=2, learning_rate=1e-3)
    estimate_all_norms_(small, whole.inputs(17))
    mean = small[0](torch.cat(loader[:2])).mean(0)
    torch.testing.assert_close(small[1].running_mean, mean.detach())


def test_a_network_is_pruned_before_it_is_quantized() -> None:
    _, small = built(Policy((4, 6, 16), (("3", 8, 8),)))
    grid = grid_of(small.get_submodule("3"))
    assert grid.scale.shape == (6,)
    assert small.get_submodule("3").weight.shape == (6, 4, 3, 3)
    assert [name for name, _ in activations(small)] == ["3"]
    assert grid_of(small.get_submodule("0")) is None


def test_agents_decide_on_what_they_are_named_after() -> None:
    own = {"episodes": 3, "one_sided": True, "reconstruct": False, "target": 0.9}
    plan, small = run(options=own | {"agent": "pruning"})
    assert not plan.details["policy"]["bits"]
    assert not list(activations(small))
    for reward, accuracy, share in plan.details["history"]:
        assert (reward == accuracy) == (share <= 0.9)
    own = {"episodes": 3, "integers": "mixed", "most_bits": 5, "finetune_epochs": 0}
    target = FakeTarget(weight_bits=2)
    plan, small = run(target=target, options=own | {"agent": "quantization"})
    assert not plan.details["kept_channels"]
    bits = plan.details["policy"]["bits"]
    widths = {each for pair in bits.values() for each in pair}
    assert widths <= {2, 3, 4, 5, 8}
    assert widths - {8}
    assert {name: q.bits for name, q in activations(small)} == {
        name: inputs for name, (_, inputs) in bits.items()
    }


def test_the_dense_network_stays_as_it_is(caplog) -> None:
    net, loader = make_net(), make_loader()
    net[3].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    method = Galen(**(OPTIONS | {"episodes": 2, "agent": "pruning", "target": 1}))
    with torch.no_grad():
        _, small = method.run(net, loader, loader, X, FakeTarget(), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    frozen = {name: p.requires_grad for name, p in net.named_parameters()}
    for name, parameter in small.named_parameters():
        plain = name.replace("parametrizations.weight.original", "weight")
        assert parameter.requires_grad == frozen[plain]
    assert "all 2 episodes are random" in caplog.text


def test_inputs_that_do_not_serve(searched, monkeypatch) -> None:
    data, target = make_loader(), FakeTarget()
    with pytest.raises(OptionError, match="on a grid already"):
        Galen().run(searched[1], data, data, X, target)
    with pytest.raises(OptionError, match="cannot be trained"):
        Galen().run(make_net().half(), data, data, X, target)
    with pytest.raises(DataError, match="the example is no input"):
        Galen().run(make_net(), data, data, None, target)
    monkeypatch.setitem(packages.NEEDED, "no_such_module", "no-such-package")
    with pytest.raises(MissingDependencyError, match=r"fitcompress\[galen\]"):
        Galen().run(make_net(), data, data, X, target)


class Sizes(OnnxTarget):
    """Files take as long as they are large."""

    fingerprint = "bytes"

    def time_files(self, path, reference, example) -> Timing:
        sizes = path.stat().st_size, reference.stat().st_size
        return Timing.of([(float(sizes[0]), float(sizes[1]))])


def on_integers(width: int, *, inputs: bool) -> nn.Module:
    net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 4)).eval()
    bits = 8 if inputs else None
    shapes = {"0": (width, 64), "2": (4, width)}
    levels = {
        name: fc.Level(fc.Grid(bits=8), 0.0, shape, activation_bits=bits)
        for name, shape in shapes.items()
    }
    return planned_network(net, torch.randn(8, 64), fc.Plan(levels))


def test_targets_for_files_time_beside_another_network() -> None:
    pytest.importorskip("onnxscript")
    target, x = Sizes(), torch.zeros(1, 64)
    dense, small = on_integers(512, inputs=False), on_integers(64, inputs=True)
    with target.open(dense, x) as reference:
        own = reference.milliseconds([])
        assert own.ratio == 1
        with target.open(small, x, reference=reference) as session:
            found = session.milliseconds(["0", "2"])
        assert found.reference_ms == own.ms
        assert found.ratio < 0.1
    with (
        pytest.raises(OptionError, match="the reference cannot be timed"),
        target.open(small, x, reference=FakeTarget()),
    ):
        pass


@pytest.mark.slow
def test_the_command_line(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    digits = load_dataset("digits")
    torch.manual_seed(0)
    net = DigitsNet()
    train(net, digits.training(), epochs=1, progress=False)
    torch.save(net.state_dict(), "net.pt")
    (tmp_path / "clock.py").write_text(
        "import os, sys\nprint(os.path.getsize(sys.argv[1]))\n"
    )
    arguments = "--model digits --weights net.pt --dataset digits --episodes 2 "
    arguments += "--retrain-samples 64 --epochs 1 --target 0.5 --json out.json "
    arguments += "--most-bits 7 --beta -4 --agent pruning"
    clock = f"{sys.executable} clock.py {{onnx}}"
    words = ["fitcompress", "run", "galen", *arguments.split(), "--command", clock]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0, capsys.readouterr().err
    values = json.loads((tmp_path / "out.json").read_text())
    assert len(values["history"]) == 2
    assert values["share"] > 0
    kept = fc.Plan.load("plan.json").details["kept_channels"]
    fc.load("small.safetensors", fc.methods.prune_channels(DigitsNet(), kept))
    text = capsys.readouterr().out
    assert "asked for 50 %" in text
    assert f"⇒ {values['test_accuracy_after']:.2f} %" in text
    assert "pass --channels plan.json to evaluate" in text
    arguments = "--model digits --packed small.safetensors --dataset digits"
    words = ["fitcompress", "evaluate", *arguments.split(), "--json", "score.json"]
    for more, code in ((["--channels", "plan.json"], 0), ([], 1)):
        monkeypatch.setattr(sys, "argv", words + more)
        with pytest.raises(SystemExit) as stop:
            main()
        assert (stop.value.code or 0) == code
    assert "--channels PLAN" in capsys.readouterr().err
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["accuracy"] == pytest.approx(values["test_accuracy_after"])
