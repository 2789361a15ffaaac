"""Tables fitted to whole random plans: design, regression and the way through."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import fitcompress as fc
from fitcompress.compensate.compressor import Compressor
from fitcompress.compensate.options import Compensation
from fitcompress.errors import CalibrationError, OptionError, PlanMismatchError
from fitcompress.refinement import plan_losses
from fitcompress.refinement.plan_fit import Drawn, fit_plans
from fitcompress.refinement.random_plans import draw_inputs, draw_plans, families
from fitcompress.threads import threads
from test_refinement import BITS, Branched
from test_search import random_table

STEPS = [0.03 * 2 ** (i / 2) for i in range(8)]
GRIDS = [*(fc.Grid(bits=b) for b in BITS), *(fc.Grid(step=s) for s in STEPS)]
FAST = Compensation(beam=1, clipping=False)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Branched().eval()


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 6, 6, generator=generator) for _ in range(4)]


@pytest.fixture
def table(net, loader):
    return fc.measure(
        net, loader, samples=32, grids=GRIDS, sparsities=(0, 0.3, 0.6), progress=False
    )


def test_plans_are_spread_evenly() -> None:
    table = random_table(5, 6, 4, 0)
    for family in families(table):
        grids, masks = draw_plans(table, family, 24, 0)
        again = draw_plans(table, family, 24, 0)
        assert np.array_equal(grids, again[0])
        assert np.array_equal(masks, again[1])
        assert not np.array_equal(grids, draw_plans(table, family, 24, 1)[0])
        assert {table.grids[g].family for g in grids.flat} == {family}
        assert len({tuple(row) for row in grids}) > 20
        if family == "bits":
            for column in grids.T:
                counts = np.bincount(column)[np.unique(grids)]
                assert counts.max() - counts.min() <= 1
            assert not masks[::2].any()
            assert masks[1::2].any()


def test_steps_stay_around_one_of_the_network(net, loader) -> None:
    table = fc.measure(net, loader, samples=32, progress=False)
    grids, masks = draw_plans(table, "step", 16, 0)
    assert not masks.any()
    logs = np.log2([[table.grids[g].step for g in row] for row in grids])
    assert (np.ptp(logs, axis=1) <= 1.0 + 0.25).all()
    assert (np.ptp(logs, axis=1) > 0.2).any()
    assert np.ptp(logs.mean(1)) > 1


def test_inputs_draw_bits_that_tell(net, loader, table) -> None:
    assert draw_inputs(table, "bits", 16, 0) is None
    for given, wanted in (((12, 8, 4, 2), {2, 3}), ((2,), {1}), ((12, 8), {2})):
        with_inputs = fc.measure(
            net,
            loader,
            samples=32,
            grids=GRIDS,
            activation_bits=given,
            progress=False,
        )
        assert draw_inputs(with_inputs, "step", 16, 0) is None
        drawn = draw_inputs(with_inputs, "bits", 16, 0)
        assert drawn.shape == (16, 3)
        assert set(drawn.flat) == wanted
        for column in drawn.T:
            counts = np.bincount(column)[sorted(wanted)]
            assert np.ptp(counts) <= 1


def test_inputs_and_weights_get_factors_of_their_own() -> None:
    """Weights cost a fifth of what the table says, inputs twice."""
    random = np.random.default_rng(0)
    table = random_table(6, 5, 1, 0)
    table = dataclasses.replace(
        table,
        grids=tuple(fc.Grid(bits=bits) for bits in (6, 5, 4, 3, 2)),
        activation_bits=(None, 8, 6, 4),
        activation_distortion=np.outer(
            random.uniform(0.5, 2, 6), [0.0, 0.01, 0.1, 1.0]
        ),
    )
    drawn = Drawn(
        *draw_plans(table, "bits", 24, 0), inputs=draw_inputs(table, "bits", 24, 0)
    )
    layers = np.arange(6)
    weights = 0.2 * table.distortion[layers, drawn.grids, drawn.masks].sum(1)
    inputs = 2.0 * table.activation_distortion[layers, drawn.inputs].sum(1)
    noise = np.exp(random.normal(0, 0.01, (24, 2)))
    y = np.stack([weights, weights + inputs], axis=1) * noise
    fit = fit_plans(table, "bits", table.distortion, drawn, y)
    np.testing.assert_allclose(fit.distortion, 0.2 * table.distortion, rtol=0.1)
    np.testing.assert_allclose(fit.inputs, 2 * table.activation_distortion, rtol=0.1)
    assert fit.report["spearman"] > 0.99
    assert len(fit.report["input_factors"]) == 6


def test_inputs_are_measured_on_compensated_plans(net, loader) -> None:
    table = fc.measure(
        net,
        loader,
        samples=32,
        grids=GRIDS[: len(BITS)],
        sparsities=(0.0,),
        activation_bits=(8, 4, 3),
        progress=False,
    )
    settings = {"plans": 16, "samples": 32, "compensation": FAST, "progress": False}
    found = fc.calibrate(table, net, loader, **settings)
    assert found.activation_distortion.shape == table.activation_distortion.shape
    assert not np.allclose(found.activation_distortion, table.activation_distortion)
    x = torch.cat(loader).split(4)
    g, _ = draw_plans(table, "bits", 16, 0)
    a = draw_inputs(table, "bits", 16, 0)
    names, rows = table.names, np.arange(3)
    predicted, true = [], []
    for grids, inputs in zip(g, a, strict=True):
        levels = {
            name: fc.Level(
                table.grids[grids[i]],
                0.0,
                tuple(table.shapes[i]),
                activation_bits=table.activation_bits[inputs[i]],
            )
            for i, name in enumerate(names)
        }
        small = fc.apply(
            net,
            fc.Plan(levels),
            x[::2],
            samples=None,
            compensation=FAST,
            progress=False,
        )
        with torch.no_grad():
            p = net(torch.cat(x[1::2])).double().log_softmax(-1)
            q = small(torch.cat(x[1::2])).double().log_softmax(-1)
        true.append(float((p.exp() * (p - q)).sum(-1).mean()))
        predicted.append(
            found.distortion[rows, grids, 0].sum()
            + found.activation_distortion[rows, inputs].sum()
        )
    assert sum(predicted) == pytest.approx(sum(true), rel=0.3)
    assert spearmanr(predicted, true).statistic > 0.7


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


class Tied(torch.nn.Module):
    """Tokens in, tokens out, one weight for both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(12, 16)
        self.mix = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens)).relu())


@pytest.mark.parametrize("tied", [True, False])
def test_inputs_of_embeddings_stay_as_they_are(tied) -> None:
    torch.manual_seed(0)
    net = Tied().eval()
    if not tied:
        net.head.weight = torch.nn.Parameter(torch.randn(12, 16) / 4)
    tokens = list(torch.randint(0, 12, (32, 5)).split(8))
    table = fc.measure(
        net,
        tokens,
        samples=32,
        grids=GRIDS[: len(BITS)],
        activation_bits=(8, 4, 3),
        progress=False,
    )
    drawn = draw_inputs(table, "bits", 8, 0)
    embedding = table.names.index("embed")
    assert not drawn[:, embedding].any()
    assert np.delete(drawn, embedding, axis=1).all()
    found = fc.calibrate(
        table, net, tokens, plans=8, samples=32, compensation=FAST, progress=False
    )
    assert np.isfinite(found.activation_distortion).all()
    plan = fc.search(found, fc.Budget(bops="12%"))
    assert plan.levels["embed"].activation_bits is None
    assert plan.levels["mix"].activation_bits
    fc.apply(net, plan, tokens, progress=False)


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
