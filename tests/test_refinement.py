"""Refinement: loss rises of single levels, and the tables that follow from them."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from torch import nn

import fitcompress as fc
from branched_nets import BITS, branched_batches, branched_net
from fitcompress.compensate.compressor import Compressor
from fitcompress.compensate.levels import level_weights, swapped
from fitcompress.compensate.options import Compensation
from fitcompress.compensate.outlets import Outlet
from fitcompress.errors import CalibrationError, OptionError, PlanMismatchError
from fitcompress.model import compressible_layers
from fitcompress.model.replay import Replay
from fitcompress.refinement import Refinement, refine
from fitcompress.refinement.anchors import anchors, corrected
from fitcompress.refinement.divergences import log_probabilities, softened_divergence
from fitcompress.search.plan import Level
from fitcompress.threads import threads
from test_search import random_table


@pytest.fixture
def net():
    return branched_net()


@pytest.fixture
def loader():
    return branched_batches()


STEPS = (0.02, 0.1)
GRIDS = [*(fc.Grid(bits=b) for b in BITS), *(fc.Grid(step=s) for s in STEPS)]
FEW = Refinement(samples=32, grids=2, sparsities=1, plans=0)


@pytest.fixture
def table(net, loader):
    return fc.measure(
        net, loader, samples=32, grids=GRIDS, sparsities=(0, 0.3, 0.6), progress=False
    )


def names_of(net):
    return {layer.name: layer for layer in compressible_layers(net)}


@pytest.mark.parametrize("name", ["first", "shared", "last"])
def test_a_replay_is_the_whole_pass(net, loader, name) -> None:
    layers = names_of(net)
    modules = {n: layer.module for n, layer in layers.items()}
    with torch.no_grad(), Replay(net, modules, loader[0]) as replay:
        before = net.get_submodule(name).weight.data
        assert torch.equal(replay.run_from(name), replay.output)
        net.get_submodule(name).weight.data = before * 1.5
        found = replay.run_from(name)
        again = replay.run_from(name)
    whole = net(loader[0])
    assert torch.equal(found, whole)
    assert torch.equal(again, whole)
    assert not any("forward" in vars(m) for m in net.modules())


def test_layers_before_are_not_computed_again(net, loader) -> None:
    modules = {n: layer.module for n, layer in names_of(net).items()}
    with torch.no_grad(), Replay(net, modules, loader[0]) as replay:
        net.first.weight.data = net.first.weight.data * float("nan")
        assert torch.isfinite(replay.run_from("shared")).all()


def test_a_replay_that_fails_leaves_the_model_alone(net) -> None:
    modules = {n: layer.module for n, layer in names_of(net).items()}
    with pytest.raises(RuntimeError), Replay(net, modules, torch.ones(1, 2, 6, 6)):
        pass
    assert not any("forward" in vars(m) for m in net.modules())


def test_swapped_weights_come_back(net, loader) -> None:
    layer = names_of(net)["last"]
    level = Level(fc.Grid(bits=3), 0.3, layer.shape)
    outlet = Outlet("last")
    inputs = [torch.randn(16, 6)]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for options in (None, Compensation()):
        (made,) = level_weights(layer, [level], inputs, outlet, options)
        assert made.codes.dtype == torch.int8
        assert made.codes.abs().max() <= 3
        with swapped(net, layer, made, outlet):
            matrix = net.last.weight.detach()
            assert torch.equal(matrix, made.codes * made.scale.reshape(-1, 1))
            assert int((matrix == 0).sum()) >= int(0.3 * 30)
        for key, value in net.state_dict().items():
            assert torch.equal(value, state[key])


def test_softened_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    z, d = torch.randn(2, 50, 7, generator=generator, dtype=torch.float64)
    plain = [log_probabilities(a, 1.0) for a in (z, z + d)]
    wanted = torch.nn.functional.kl_div(
        plain[1], plain[0], reduction="sum", log_target=True
    )
    assert softened_divergence(*plain, 1.0) == pytest.approx(float(wanted), rel=1e-12)
    soft = [log_probabilities(a, 1e4) for a in (z, z + d)]
    variance = d.var(1, correction=0).sum() / 2  # in the limit
    assert softened_divergence(*soft, 1e4) == pytest.approx(float(variance), rel=1e-2)
    assert softened_divergence(plain[0], plain[0], 3.0) == 0


def test_anchors_are_spread_and_within_families() -> None:
    table = random_table(3, 5, 4, 0)
    cells = anchors(table, 3, 2)
    assert len(cells) == len(set(cells))
    assert {s for _, s in cells} == {0, 1, 3}
    families = {grid.family for grid in table.grids}
    assert {table.grids[g].family for g, _ in cells} == families
    assert anchors(table, 99, 0) == [(g, 0) for g in range(5)]


def test_what_was_measured_is_in_the_table() -> None:
    table = random_table(3, 5, 4, 0)
    random = np.random.default_rng(0)
    cells = anchors(table, 3, 2)
    measured = {}
    for g, s in sorted(cells, key=lambda cell: cell[1]):
        factor = random.uniform(0.5, 2, 3)
        if s == 0:
            measured[g, 0] = table.distortion[:, g, 0] * factor
        else:
            mask = table.distortion[:, g, s] - table.distortion[:, g, 0]
            measured[g, s] = measured[g, 0] + mask * factor
    found = corrected(table, measured)
    for (g, s), value in measured.items():
        np.testing.assert_allclose(found[:, g, s], value, rtol=1e-9, atol=1e-15)
    same = {cell: table.distortion[:, cell[0], cell[1]] for cell in cells}
    np.testing.assert_allclose(corrected(table, same), table.distortion, rtol=1e-9)


@pytest.mark.parametrize("compensation", [None, Compensation(beam=1)])
def test_measured_levels_are_those_of_a_plain_loop(
    net, loader, table, compensation
) -> None:
    options = dataclasses.replace(FEW, temperature=1.0, compensation=compensation)
    found = refine(table, net, loader, refinement=options, progress=False)
    assert (found.distortion >= 0).all()
    assert found.provenance["refined"]["samples"] == 16
    if compensation is not None:
        return
    # Rounded, by hand: half of the batches, norms folded to 16 bits.
    g = table.grids.index(fc.Grid(bits=2))
    for i, (name, layer) in enumerate(names_of(net).items()):
        level = Level(fc.Grid(bits=2), 0.0, layer.shape)
        (made,) = level_weights(layer, [level], [], Outlet(None), None)
        total = 0.0
        with torch.no_grad():
            for x in used_to_measure(loader):
                p = net(x).double().log_softmax(-1)
                with swapped(net, layer, made, Outlet(None)):
                    q = net(x).double().log_softmax(-1)
                total += float((p.exp() * (p - q)).sum())
        at = table.names.index(name)
        assert found.distortion[at, g, 0] == pytest.approx(total / 16, rel=0.05), i


def used_to_measure(loader):
    whole = torch.cat(loader)
    return whole.split(4)[1::2]


def test_the_mean_over_layers_is_that_of_the_plain_divergence(
    net, loader, table
) -> None:
    plain, soft = (
        refine(
            table,
            net,
            loader,
            refinement=dataclasses.replace(FEW, temperature=t),
            progress=False,
        )
        for t in (1.0, 4.0)
    )
    for g, s in plain.provenance["refined"]["cells"]:
        if s == 0:
            sums = [t.distortion[:, g, 0].sum() for t in (plain, soft)]
            assert sums[0] == pytest.approx(sums[1], rel=1e-9)
    assert not np.array_equal(plain.distortion, soft.distortion)


def test_a_refined_table_is_saved_and_searched(net, loader, table, tmp_path) -> None:
    found = refine(table, net, loader, refinement=FEW, progress=False)
    found.save(tmp_path / "s.safetensors")
    again = fc.Sensitivity.load(tmp_path / "s.safetensors")
    assert np.array_equal(again.distortion, found.distortion)
    assert again.provenance["refined"]["errors"] == "compensated"
    plan = fc.search(again, fc.Budget(bops="15%"))
    assert plan.status == "OPTIMAL"


def test_killed_and_resumed_it_ends_with_the_same_table(
    net, loader, table, tmp_path, monkeypatch, caplog
) -> None:
    wanted = refine(table, net, loader, refinement=FEW, progress=False)
    file = tmp_path / "state"
    runs = []
    original = Replay.run_from

    def killed(self, name):
        runs.append(name)
        if len(runs) > 40:
            raise KeyboardInterrupt
        return original(self, name)

    monkeypatch.setattr(Replay, "run_from", killed)
    with pytest.raises(KeyboardInterrupt):
        refine(table, net, loader, refinement=FEW, checkpoint=file, progress=False)
    monkeypatch.setattr(Replay, "run_from", original)
    assert file.exists()
    with caplog.at_level(logging.WARNING):
        found = refine(
            table, net, loader, refinement=FEW, checkpoint=file, progress=False
        )
    assert "not used" not in caplog.text
    assert np.array_equal(found.distortion, wanted.distortion)
    assert not file.exists()


def test_a_state_of_something_else_is_not_used(
    net, loader, table, tmp_path, caplog
) -> None:
    file = tmp_path / "state"
    file.write_bytes(b"nonsense")
    with caplog.at_level(logging.WARNING):
        refine(table, net, loader, refinement=FEW, checkpoint=file, progress=False)
    assert "damaged" in caplog.text


def test_the_cost_is_known_before(net, loader, table, monkeypatch, caplog) -> None:
    runs, plans = [], []
    once, at = Replay.run_from, Compressor.at
    monkeypatch.setattr(Replay, "run_from", lambda *a: (runs.append(1), once(*a))[1])
    monkeypatch.setattr(
        Compressor, "at", lambda *a, **k: (plans.append(1), at(*a, **k))[1]
    )
    options = dataclasses.replace(FEW, plans=8)
    with caplog.at_level(logging.INFO, logger="fitcompress.refinement"):
        refine(table, net, loader, refinement=options, progress=False)
    batches = len(used_to_measure(loader))
    cost = options.forward_passes(table)
    assert cost == len(runs) // batches + len(plans)
    assert len(plans) == 8
    assert f"{cost} forward passes over 16 samples" in caplog.text


def test_levels_and_plans_resume_together(
    net, loader, table, tmp_path, monkeypatch
) -> None:
    options = dataclasses.replace(FEW, plans=8, compensation=None)
    wanted = refine(table, net, loader, refinement=options, progress=False)
    file, plans, at = tmp_path / "state", [], Compressor.at

    def killed(*args, **named):
        plans.append(1)
        if len(plans) == 5:
            raise KeyboardInterrupt
        return at(*args, **named)

    monkeypatch.setattr(Compressor, "at", killed)
    with threads(1), pytest.raises(KeyboardInterrupt):  # one plan after the other
        refine(table, net, loader, refinement=options, checkpoint=file, progress=False)
    assert len(list(tmp_path.iterdir())) == 2
    plans.clear()
    runs, once = [], Replay.run_from
    monkeypatch.setattr(Replay, "run_from", lambda *a: (runs.append(1), once(*a))[1])
    found = refine(
        table, net, loader, refinement=options, checkpoint=file, progress=False
    )
    assert not runs
    assert len(plans) == 8 - 4
    assert np.array_equal(found.distortion, wanted.distortion)
    assert not list(tmp_path.iterdir())


def test_the_model_is_unchanged(net, loader, table) -> None:
    state = {k: v.clone() for k, v in net.state_dict().items()}
    refine(table, net, loader, refinement=FEW, progress=False)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_wrong_input(net, loader, table) -> None:
    with pytest.raises(PlanMismatchError, match="another model"):
        refine(table, nn.Sequential(nn.Linear(3, 4)), loader, progress=False)
    with pytest.raises(CalibrationError, match="at least two"):
        refine(table, net, [loader[0][:1]], progress=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", 1),
        ("samples", 2.0),
        ("grids", -1),
        ("plans", 7),
        ("sparsities", -1),
        ("temperature", 0.5),
        ("temperature", float("nan")),
    ],
)
def test_bad_options(name, value) -> None:
    with pytest.raises(OptionError, match=name):
        Refinement(**{name: value})


def test_measure_refines(net, loader, table, tmp_path) -> None:
    few = dataclasses.replace(FEW, compensation=None)
    wanted = refine(table, net, loader, refinement=few, progress=False)
    settings = {"grids": GRIDS, "sparsities": (0, 0.3, 0.6), "samples": 32}
    for given in (loader, iter(loader)):
        found = fc.measure(
            net,
            given,
            **settings,
            refine=few,
            checkpoint=tmp_path / "state",
            progress=False,
        )
        assert np.array_equal(found.distortion, wanted.distortion)
    found = fc.measure(
        net, iter(loader), **settings, activation_bits=8, refine=few, progress=False
    )
    assert np.array_equal(found.distortion, wanted.distortion)
    assert found.activation_distortion[:, 1].sum() > 0
    assert not list(tmp_path.iterdir())
