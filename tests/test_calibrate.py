"""Tables fitted to whole random plans: the whole way through."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import fitcompress as fc
from branched_nets import (
    BITS,
    FAST,
    GRIDS,
    branched_batches,
    branched_net,
    branched_table,
)
from fitcompress.compensate.compressor import Compressor
from fitcompress.errors import CalibrationError, OptionError, PlanMismatchError
from fitcompress.refinement import plan_losses
from fitcompress.refinement.random_plans import draw_plans
from fitcompress.threads import threads


@pytest.fixture
def net():
    return branched_net()


@pytest.fixture
def loader():
    return branched_batches()


@pytest.fixture(scope="module")
def table():
    return branched_table()


def test_the_table_follows_the_plans(net, loader, table, tmp_path) -> None:
    found = fc.calibrate(
        table, net, loader, plans=24, samples=32, compensation=FAST, progress=False
    )
    report = found.provenance["calibrated"]
    assert set(report) >= {"bits", "step", "samples", "errors"}
    assert report["samples"] == 16
    for kind in ("bits", "step"):
        assert report[kind]["plans"] == 24
        assert report[kind]["spearman"] > 0
        assert len(report[kind]["factors"]) == 3
    # In nats: the predictions of the plans add up to about what was measured.
    g, s = draw_plans(table, "bits", 24, 0)
    predicted = found.distortion[np.arange(3), g, s].sum(1)
    true = [true_rise(net, table, loader, *cells) for cells in zip(g, s, strict=True)]
    assert predicted.sum() == pytest.approx(sum(true), rel=0.3)
    assert spearmanr(predicted, true).statistic > 0.8
    found.save(tmp_path / "s.safetensors")
    again = fc.Sensitivity.load(tmp_path / "s.safetensors")
    assert np.array_equal(again.distortion, found.distortion)
    plan = fc.search(again, fc.Budget(bops="15%"))
    assert plan.status == "OPTIMAL"


def true_rise(net, table, loader, grids, sparsities):
    levels = {
        name: fc.Level(
            table.grids[g], float(table.sparsity[i, s]), tuple(table.shapes[i])
        )
        for i, (name, g, s) in enumerate(
            zip(table.names, grids, sparsities, strict=True)
        )
    }
    x = torch.cat(loader).split(4)
    small = fc.apply(
        net, fc.Plan(levels), x[::2], samples=None, compensation=FAST, progress=False
    )
    measured = torch.cat(x[1::2])
    with torch.no_grad():
        p = net(measured).double().log_softmax(-1)
        q = small(measured).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_calibrated_table_decides_on_steps(net, loader) -> None:
    """If it is asked to: by default the law of one step holds."""
    table = fc.measure(net, loader, samples=32, progress=False)
    found = fc.calibrate(
        table, net, loader, plans=16, samples=32, compensation=FAST, progress=False
    )
    budget = fc.Budget(size="30%")
    plain, by_law = fc.search(table, budget), fc.search(found, budget)
    fitted = fc.search(
        found, budget, method=fc.methods.Optimal("rounded", fisher_power=1)
    )
    grids = [[level.grid for level in p.levels.values()] for p in (plain, by_law)]
    assert grids[0] == grids[1]
    assert fitted.details["objective"] == pytest.approx(fitted.distortion)


def test_families_can_be_chosen(net, loader, table) -> None:
    settings = {"plans": 8, "samples": 32, "compensation": None, "progress": False}
    found = fc.calibrate(table, net, loader, family="bits", **settings)
    steps = np.array([g.step is not None for g in table.grids])
    assert np.array_equal(found.distortion[:, steps], table.distortion[:, steps])
    assert not np.array_equal(found.distortion[:, ~steps], table.distortion[:, ~steps])
    assert "step" not in found.provenance["calibrated"]
    bits = dataclasses.replace(found, grids=tuple(GRIDS))
    assert fc.Refinement().family_of(bits) == "bits"
    only = fc.measure(
        net, loader, samples=32, grids=GRIDS[:4], sparsities=(0.0,), progress=False
    )
    with pytest.raises(OptionError, match="family"):
        fc.calibrate(only, net, loader, family="step", **settings)


def test_killed_and_resumed_it_ends_with_the_same_table(
    net, loader, table, tmp_path, monkeypatch, caplog
) -> None:
    settings = {"plans": 8, "samples": 32, "compensation": FAST, "progress": False}
    wanted = fc.calibrate(table, net, loader, **settings)
    file, runs = tmp_path / "state", []
    original = Compressor.at

    def killed(self, *args, **named):
        runs.append(1)
        if len(runs) > 5:
            raise KeyboardInterrupt
        return original(self, *args, **named)

    monkeypatch.setattr(Compressor, "at", killed)
    with pytest.raises(KeyboardInterrupt):
        fc.calibrate(table, net, loader, checkpoint=file, **settings)
    assert file.exists()
    monkeypatch.setattr(Compressor, "at", original)
    with caplog.at_level(logging.WARNING):
        found = fc.calibrate(table, net, loader, checkpoint=file, **settings)
    assert "not used" not in caplog.text
    assert np.array_equal(found.distortion, wanted.distortion)
    assert not file.exists()


def test_a_mask_rule_goes_all_the_way(net, loader) -> None:
    moments = fc.measure_fisher(net, loader, diagonal=True, progress=False)
    refinement = fc.Refinement(samples=32, grids=2, sparsities=1, plans=8)
    settings = {"grids": GRIDS, "sparsities": (0, 0.5), "samples": 32}
    rules = (None, fc.masks.Magnitude(), fc.masks.Fisher(moments))
    found = [
        fc.measure(
            net,
            loader,
            **settings,
            masks=rule,
            refine=refinement,
            progress=False,
        )
        for rule in rules
    ]
    # Without a rule masks go by what dropping costs: three different sets of weights.
    reports = [table.provenance["calibrated"]["bits"] for table in found]
    assert len({report["log_error"] for report in reports}) == 3
    single = [
        fc.refine(
            found[1],
            net,
            loader,
            refinement=dataclasses.replace(refinement, plans=0),
            masks=rule,
            progress=False,
        ).distortion
        for rule in (None, fc.masks.Fisher(moments))
    ]
    assert not np.array_equal(single[0][:, :, 1], single[1][:, :, 1])


def test_wrong_input(net, loader, table) -> None:
    with pytest.raises(PlanMismatchError, match="another model"):
        fc.calibrate(table, torch.nn.Sequential(torch.nn.Linear(3, 4)), loader)
    with pytest.raises(CalibrationError, match="at least two"):
        fc.calibrate(table, net, [loader[0][:1]], progress=False)
    for name, value in (("plans", 7), ("plans", 9.0), ("samples", 1)):
        with pytest.raises(OptionError, match=name):
            fc.calibrate(table, net, loader, **{name: value})
    for refit in (fc.calibrate, fc.refine):
        with pytest.raises(OptionError, match="rule"):
            refit(table, net, loader, masks="magnitude", progress=False)
    with pytest.raises(OptionError, match="temperature"):
        fc.calibrate(table, net, loader, temperature=float("nan"))


def test_a_network_of_zeros_keeps_its_table(loader) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 3))
    torch.nn.init.zeros_(net[1].weight)
    table = fc.measure(net, loader, samples=32, progress=False)
    found = fc.calibrate(table, net, loader, plans=8, samples=32, progress=False)
    assert np.isfinite(found.distortion).all()


def wide_table(net, loader):
    return fc.measure(
        net,
        loader,
        samples=32,
        grids=GRIDS[: len(BITS)],
        sparsities=(0.0,),
        activation_bits=(8, 4),
        progress=False,
    )


def test_the_number_of_threads_does_not_matter(net, loader) -> None:
    table = wide_table(net, loader)
    settings = {"plans": 8, "samples": 32, "compensation": FAST, "progress": False}
    found = []
    for count in (1, 3):
        with threads(count):
            found.append(fc.calibrate(table, net, loader, **settings))
    for name in ("distortion", "activation_distortion"):
        assert np.array_equal(getattr(found[0], name), getattr(found[1], name))


def test_a_plan_that_changes_nothing_does_not_rule_the_fit(
    net, loader, monkeypatch
) -> None:
    table = wide_table(net, loader)
    settings = {"plans": 16, "samples": 32, "compensation": FAST, "progress": False}
    usual = fc.calibrate(table, net, loader, **settings)
    real, calls = plan_losses.softened_divergence, []

    def divergence(*args):
        calls.append(1)
        return 0.0 if len(calls) <= 16 else real(*args)  # of the first plan or two

    monkeypatch.setattr(plan_losses, "softened_divergence", divergence)
    with threads(1):  # one plan after the other
        found = fc.calibrate(table, net, loader, **settings)
    ratio = found.distortion.sum() / usual.distortion.sum()
    assert 0.2 < ratio < 5
