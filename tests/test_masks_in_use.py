"""Rules for masks in measure and apply; rules that do not fit."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress import ops
from fitcompress.compensate import attempts, one_layer
from fitcompress.compensate.levels import level_weights
from fitcompress.compensate.masks import importance_mask
from fitcompress.compensate.options import Compensation
from fitcompress.compensate.outlets import Outlet
from fitcompress.errors import (
    DataError,
    NonFiniteError,
    OptionError,
    PlanMismatchError,
)
from fitcompress.masks import Fisher, Magnitude, MaskRule, OutputError, Smoothed
from fitcompress.model import compressible_layers
from fitcompress.quantize import grid_of
from fitcompress.sensitivity import estimate, measurement
from fitcompress.storage.save_load import packed_bytes
from fitcompress.train import divergence
from mask_rules import RULES, SPARSITIES, Given, by_name, make_rule, plan_for


@pytest.fixture
def moments(net, loader) -> fc.FisherMoments:
    return fc.measure_fisher(net, loader, diagonal=True, progress=False)


@pytest.fixture(params=RULES)
def rule(request, net, loader, moments) -> MaskRule:
    return make_rule(request.param, net, loader, moments)


# --- measure --------------------------------------------------------------------------


def test_tables_know_the_rule(net, loader, rule, tmp_path) -> None:
    grids = (fc.Grid(bits=4), fc.Grid(step=0.05))
    table = fc.measure(
        net,
        loader,
        grids=grids,
        sparsities=SPARSITIES,
        masks=rule,
        allocation="uniform",
        progress=False,
    )
    for i, layer in enumerate(compressible_layers(net)):
        for s, sparsity in enumerate(SPARSITIES):
            kept = importance_mask(rule.importance(layer), sparsity)
            codes = (layer.matrix() / torch.tensor(0.05)).round()
            codes = codes if kept is None else codes * kept
            assert table.nonzeros[i, 1, s] == int(codes.count_nonzero())
    about = table.provenance
    assert (about["masks"], about["allocation"]) == (rule.name, "uniform")
    assert about["masks_digest"] == rule.digest()
    table.save(tmp_path / "table")
    loaded = fc.Sensitivity.load(tmp_path / "table")
    assert loaded.provenance == about
    np.testing.assert_array_equal(loaded.distortion, table.distortion)


def test_magnitude_is_the_default(net, loader, sensitivity) -> None:
    table = fc.measure(
        net, loader, masks=Magnitude(), allocation="magnitude", progress=False
    )
    np.testing.assert_array_equal(table.distortion, sensitivity.distortion)
    np.testing.assert_array_equal(table.sparsity, sensitivity.sparsity)
    assert table.provenance == sensitivity.provenance
    assert table.provenance["masks"] == table.provenance["allocation"] == "magnitude"


def test_the_fisher_rule_drops_what_is_nearly_free_in_the_table(net, loader) -> None:
    moments = fc.measure_fisher(net, loader, diagonal=True, progress=False)
    same = {"sparsities": (0.0, 0.5), "allocation": "uniform", "progress": False}
    plain = fc.measure(net, loader, **same)
    other = fc.measure(net, loader, masks=Fisher(moments), **same)
    assert (other.distortion[:, 0, 1] < plain.distortion[:, 0, 1]).all()


def test_a_checkpoint_serves_every_rule(net, loader, tmp_path, monkeypatch) -> None:
    """It holds moments only: a run goes on whichever rule it is started with again."""
    moments = fc.measure_fisher(net, loader, diagonal=True, progress=False)
    rule = Smoothed(moments)
    options = {"masks": rule, "allocation": "importance", "progress": False}
    whole = fc.measure(net, loader, **options)
    monkeypatch.setattr(estimate, "SAVE_EVERY", -1.0)
    file = tmp_path / "partial"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measurement, "allocated", killed)
        with pytest.raises(KeyboardInterrupt):
            fc.measure(net, loader, checkpoint=file, progress=False)
    assert file.exists()
    seen = []
    real = measurement.FisherEstimator
    monkeypatch.setattr(
        measurement,
        "FisherEstimator",
        lambda *args, **named: seen.append(named["moments"]) or real(*args, **named),
    )
    again = fc.measure(
        net,
        loader,
        masks=rule,
        allocation="importance",
        checkpoint=file,
        progress=False,
    )
    assert seen[0].samples == 96
    np.testing.assert_array_equal(again.distortion, whole.distortion)
    assert again.provenance == whole.provenance
    assert not file.exists()


# --- apply ----------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [fc.Grid(bits=6), fc.Grid(step=0.05)], ids=str)
@pytest.mark.parametrize("calibrated", [True, False])
def test_masks_of_the_dense_weights_are_applied(
    net, images, rule, grid, calibrated
) -> None:
    plan = plan_for(net, grid, 0.5)
    small = fc.apply(
        net, plan, [images] if calibrated else None, masks=rule, progress=False
    )
    for layer in compressible_layers(net):
        wanted = importance_mask(rule.importance(layer), 0.5)
        module = small.get_submodule(layer.name)
        kept = ops.unpack_mask(grid_of(module).mask, wanted.shape)
        assert torch.equal(kept, wanted)
        assert not module.weight.detach().flatten(1)[~wanted].any()


def test_masks_by_a_rule_are_refitted_and_obs_does_better_than_magnitude(
    net, images
) -> None:
    plan, data = plan_for(net, fc.Grid(bits=8), 0.5), [torch.flip(images, (3,))]

    def cost(calibrate: object, masks: MaskRule | None) -> float:
        small = fc.apply(net, plan, calibrate, masks=masks, progress=False)
        return divergence(net, small, data)

    refitted = cost([images], Magnitude())
    assert refitted < 0.7 * cost(None, Magnitude())
    assert cost([images], None) < 0.9 * refitted
    assert cost(None, None) == cost(None, Magnitude())


def test_embeddings_take_rules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3)).eval()
    ids = torch.randint(9, (40, 2))
    rule = OutputError.measure(model, [ids], progress=False)
    plan = plan_for(model, fc.Grid(bits=8), 0.5)
    for calibrate in ([ids], None):
        small = fc.apply(model, plan, calibrate, masks=rule, progress=False)
        dropped = ~importance_mask(rule.importance(by_name(model)["0"]), 0.5)
        assert not small[0].weight.detach()[dropped].any()


def test_single_levels_take_rules(net, images) -> None:
    layer = by_name(net)["out"]
    levels = [fc.Level(fc.Grid(bits=8), s, layer.shape) for s in (0.0, 0.3, 0.6)]
    inputs = [torch.randn(64, 7)]
    for options in (None, Compensation()):
        made = level_weights(
            layer, levels, inputs, Outlet(None), options, masks=Magnitude()
        )
        assert made[0].mask is None
        for level, one in zip(levels[1:], made[1:], strict=True):
            wanted = importance_mask(layer.matrix().abs(), level.sparsity)
            assert torch.equal(one.mask, wanted)


def test_a_model_from_a_rule_survives_its_file(net, loader, tmp_path) -> None:
    table = fc.measure(net, loader, masks=Magnitude(), progress=False)
    plan = fc.search(table, fc.Budget(size=1600), family="bits")
    small = fc.apply(net, plan, loader, masks=Magnitude(), progress=False)
    fc.save(small, tmp_path / "net.fitc")
    loaded = fc.load(tmp_path / "net.fitc", net)
    assert divergence(small, loaded, loader) == 0


def test_killed_and_resumed_with_a_rule(
    net, loader, moments, tmp_path, monkeypatch, caplog
) -> None:
    plan, rule = plan_for(net, fc.Grid(bits=4), 0.5), Smoothed(moments)
    whole = packed_bytes(fc.apply(net, plan, loader, masks=rule, progress=False))
    plain = packed_bytes(fc.apply(net, plan, loader, progress=False))
    assert whole != plain
    monkeypatch.setattr(attempts, "SAVE_EVERY", -1.0)
    file, calls, real = tmp_path / "partial", [], one_layer.quantize

    def counted(*args, **named) -> object:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(named["name"])
        return real(*args, **named)

    def start() -> None:
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(one_layer, "quantize", counted)
            with pytest.raises(KeyboardInterrupt):
                fc.apply(net, plan, loader, masks=rule, checkpoint=file, progress=False)
        assert file.exists()

    start()
    calls = [None] * 3  # count on, beyond the kill
    monkeypatch.setattr(one_layer, "quantize", counted)
    again = fc.apply(
        net, plan, loader, masks=Smoothed(moments), checkpoint=file, progress=False
    )
    assert packed_bytes(again) == whole
    assert len(calls) == 3 + 2  # of four layers
    monkeypatch.undo()
    monkeypatch.setattr(attempts, "SAVE_EVERY", -1.0)
    for masks in (None, Smoothed(moments, 2.0)):
        calls = []
        start()
        with caplog.at_level(logging.WARNING):
            other = fc.apply(
                net, plan, loader, masks=masks, checkpoint=file, progress=False
            )
        assert "another run" in caplog.text
        caplog.clear()
        fresh = fc.apply(net, plan, loader, masks=masks, progress=False)
        assert packed_bytes(other) == packed_bytes(fresh)


# --- Rules that do not fit ------------------------------------------------------------


class Wider(nn.Module):
    """Layers of the tiny net's names, one of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 4, 3), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.conv(x).relu().flatten(1))


@pytest.mark.parametrize("kind", ["fisher", "smoothed", "output error"])
def test_rules_of_another_model(net, images, kind) -> None:
    other = Wider().eval()
    moments = fc.measure_fisher(other, [images], diagonal=True, progress=False)
    rule = {
        "fisher": Fisher(moments),
        "smoothed": Smoothed(moments),
        "output error": OutputError.measure(other, [images], progress=False),
    }[kind]
    plan = plan_for(net, fc.Grid(bits=4), 0.5)
    with pytest.raises(PlanMismatchError, match=r"'conv'.*To fix it: measure the rule"):
        fc.measure(net, [images], masks=rule, progress=False)
    with pytest.raises(PlanMismatchError, match="'conv'"):
        fc.apply(net, plan, masks=rule, progress=False)
    with pytest.raises(PlanMismatchError, match="'deep'"):
        rule.importance(by_name(net)["deep"])


def test_moments_of_traces_give_no_importance(net, images) -> None:
    moments = fc.measure_fisher(net, [images], progress=False)
    with pytest.raises(DataError, match="diagonal=True"):
        fc.measure(net, [images], masks=Fisher(moments), progress=False)


@pytest.mark.parametrize("masks", ["magnitude", Magnitude, 3, ""])
def test_what_is_no_rule(net, images, masks) -> None:
    with pytest.raises(OptionError, match=r"no rule.*Magnitude\(\)"):
        fc.measure(net, [images], masks=masks, progress=False)
    with pytest.raises(OptionError, match="no rule"):
        fc.apply(net, plan_for(net, fc.Grid(bits=4), 0.5), masks=masks, progress=False)


def test_options_that_cannot_be(net, images, moments) -> None:
    with pytest.raises(OptionError, match="magnitude or importance or uniform"):
        fc.measure(net, [images], allocation="even", progress=False)
    for kappa in (-1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="kappa"):
            Smoothed(moments, kappa)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t[:1], PlanMismatchError),
        (lambda t: -t, OptionError),
        (lambda t: t.double(), OptionError),
        (lambda t: t / 0, NonFiniteError),
    ],
)
def test_importances_that_no_mask_can_be_made_of(net, images, change, error) -> None:
    good = {x.name: x.matrix().abs() + 1 for x in compressible_layers(net)}
    rule = Given(good | {"head": change(good["head"])})
    with pytest.raises(error, match="'head'"):
        fc.measure(net, [images], masks=rule, progress=False)
    assert fc.measure(net, [images], masks=Given(good), progress=False).names
