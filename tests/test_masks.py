"""Mask rules: orders of weights, nested masks, and their way through the package."""

import numpy as np
import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress import masks
from fitcompress.compensate.masks import _rungs, lowest_dropped, prune_
from fitcompress.compensate.target import Target
from fitcompress.errors import NonFiniteError, OptionError, PlanMismatchError
from fitcompress.model import compressible_layers
from test_refinement import Branched

SHARES = (0.0, 0.1, 0.3, 0.33, 0.5, 0.55, 0.7, 0.8, 0.9)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Branched().eval()


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 6, 6, generator=generator) for _ in range(6)]


@pytest.fixture
def moments(net, loader):
    return fc.measure_fisher(net, loader, diagonal=True, progress=False)


def rules(net, loader, moments):
    return [
        masks.Magnitude(),
        masks.Fisher(moments),
        masks.Smoothed(moments, 0.3),
        masks.OutputError.measure(net, loader),
    ]


def correlated(rows, columns, seed=0):
    """Return a target with a random covariance of decaying spectrum."""
    random = torch.Generator().manual_seed(seed)
    options = {"generator": random, "dtype": torch.float64}
    basis = torch.linalg.qr(torch.randn(columns, columns, **options))[0]
    h = basis * torch.logspace(0, -2, columns, dtype=torch.float64) @ basis.T
    inverse = torch.linalg.inv(h)
    weight = torch.randn(rows, columns, **options)
    upper = torch.linalg.cholesky(inverse, upper=True)
    order = torch.arange(columns)
    return Target(weight, upper, inverse.diagonal().clone(), order, 0.0), h


def test_importances_are_their_formulas(net, loader, moments) -> None:
    layer = {each.name: each for each in compressible_layers(net)}["last"]
    w = net.last.weight.detach()
    f = moments.diagonal("last").view(5, 6)
    magnitude, fisher, smoothed, output = (
        rule.importance(layer) for rule in rules(net, loader, moments)
    )
    torch.testing.assert_close(magnitude, w.abs())
    torch.testing.assert_close(fisher, f * w**2)
    torch.testing.assert_close(smoothed, (f + 0.3 * f.mean()) * w**2)
    x = torch.cat(loader)
    inputs = []
    with torch.no_grad():
        handle = net.last.register_forward_pre_hook(lambda _, a: inputs.append(a[0]))
        net(x)
        handle.remove()
    h = torch.cov(inputs[0].double().T, correction=0)
    h += 0.02 * h.diagonal().mean() * torch.eye(6)
    wanted = w.double() ** 2 / torch.linalg.inv(h).diagonal()
    torch.testing.assert_close(output, wanted.float(), rtol=1e-4, atol=0)


def test_masks_are_nested_and_ties_go_by_position(net, loader, moments) -> None:
    for rule in rules(net, loader, moments):
        for values in masks.importances(rule, compressible_layers(net)).values():
            before = torch.ones(values.shape, dtype=torch.bool)
            for share in SHARES[1:]:
                kept = lowest_dropped(values, share)
                assert int((~kept).sum()) == int(share * values.numel())
                assert not (kept & ~before).any()
                before = kept
    assert lowest_dropped(torch.ones(2, 3), 0.5).tolist() == [[0, 0, 0], [1, 1, 1]]


def test_rounds_of_pruning_end_at_fixed_sparsities() -> None:
    for share in SHARES[1:]:
        counts = _rungs(share, 1000)
        assert counts[-1] == int(share * 1000)
        assert counts == sorted(set(counts))
        longer = _rungs(0.97, 1000)
        assert set(counts[:-1]) <= set(longer)


def test_pruning_with_refitting_is_nested() -> None:
    before = torch.ones(12, 24, dtype=torch.bool)
    for share in SHARES[1:]:
        target, _ = correlated(12, 24)
        kept = prune_([target], share)
        assert int((~kept).sum()) == int(share * 12 * 24)
        assert not (kept & ~before).any()
        assert not target.weight[~kept].any()
        before = kept


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_rounds_leave_less_error_than_one_order(share) -> None:
    """And others are refitted: every row is the least-squares solution."""
    target, h = correlated(12, 24)
    dense = target.weight.clone()
    kept = prune_([target], share)
    assert error(target.weight, dense, h) < 0.8 * error(dense * kept, dense, h)
    once, _ = correlated(12, 24)
    values = dense**2 / once.inverse
    assert torch.equal(
        prune_([once], share, values.float()), lowest_dropped(values.float(), share)
    )
    gradient = (once.weight - dense) @ h
    assert float((gradient * (once.weight != 0)).abs().max()) < 1e-3
    assert error(target.weight, dense, h) < error(once.weight, dense, h)


def error(weight, dense, h):
    d = weight - dense
    return float((d @ h * d).sum())


def test_allocations(net, loader, moments) -> None:
    settings = {
        "grids": [fc.Grid(bits=4)],
        "sparsities": (0.0, 0.5),
        "samples": 16,
        "progress": False,
    }
    rule = masks.Fisher(moments)
    tables = {
        kind: fc.measure(net, loader, masks=rule, allocation=kind, **settings)
        for kind in ("magnitude", "importance", "uniform")
    }
    sizes = tables["uniform"].sizes
    np.testing.assert_allclose(
        tables["uniform"].sparsity[:, 1], (sizes // 2 + 0.5) / sizes
    )
    plain = fc.measure(net, loader, **settings)
    assert np.array_equal(plain.sparsity, tables["magnitude"].sparsity)
    assert not np.array_equal(plain.distortion, tables["magnitude"].distortion)
    whole = torch.cat(
        [rule.importance(layer).flatten() for layer in compressible_layers(net)]
    )
    threshold = float(whole.sort().values[len(whole) // 2])
    for i, layer in enumerate(compressible_layers(net)):
        share = float((rule.importance(layer) < threshold).float().mean())
        assert tables["importance"].sparsity[i, 1] == pytest.approx(share, abs=0.05)
    names = {t.provenance["allocation"]: t.provenance["masks"] for t in tables.values()}
    assert set(names) == set(tables)
    assert set(names.values()) == {"fisher"}
    with pytest.raises(OptionError, match="allocate"):
        fc.measure(net, loader, allocation="importance", **settings)
    with pytest.raises(OptionError, match="allocation"):
        fc.measure(net, loader, allocation="other", **settings)


def test_the_table_has_the_error_of_the_rules_masks(net, loader, moments) -> None:
    rule = masks.Fisher(moments)
    table = fc.measure(
        net,
        loader,
        masks=rule,
        grids=[fc.Grid(bits=16)],
        sparsities=(0.0, 0.5),
        samples=None,
        seed=0,
        progress=False,
    )
    i = table.names.index("last")
    values = rule.importance(compressible_layers(net)[i])
    dropped = ~lowest_dropped(values, float(table.sparsity[i, 1]))
    # Half of the dropped importance, F being measured by the same samples and seed.
    assert table.distortion[i, 0, 1] == pytest.approx(
        float(values[dropped].sum()) / 2, rel=1e-3, abs=1e-9
    )


@pytest.mark.parametrize("data", [False, True])
def test_apply_drops_what_the_rule_says(net, loader, moments, data) -> None:
    rule = masks.Fisher(moments)
    levels = {
        layer.name: fc.Level(fc.Grid(bits=8), 0.5, tuple(layer.shape))
        for layer in compressible_layers(net)
    }
    small = fc.apply(
        net, fc.Plan(levels), loader if data else None, masks=rule, progress=False
    )
    other = fc.apply(net, fc.Plan(levels), loader if data else None, progress=False)
    differ = 0
    for layer in compressible_layers(net):
        dropped = ~lowest_dropped(rule.importance(layer), 0.5)
        matrix = layer.matrix_of(small.get_submodule(layer.name).weight.detach())
        assert not matrix[dropped].any()
        plain = layer.matrix_of(other.get_submodule(layer.name).weight.detach())
        differ += int(plain[dropped].count_nonzero())
    assert differ


def test_another_rule_does_not_resume(net, loader, moments, tmp_path) -> None:
    from fitcompress.compensate.compressor import Compressor

    layer = compressible_layers(net)
    levels = {x.name: fc.Level(fc.Grid(bits=8), 0.5, tuple(x.shape)) for x in layer}
    keys = {
        Compressor(net, fc.Plan(levels), loader, masks=rule, progress=False)._key()
        for rule in (None, *rules(net, loader, moments))
    }
    assert len(keys) == 5


def test_wrong_rules_are_refused(net, loader, moments) -> None:
    layers = compressible_layers(net)
    other = compressible_layers(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(PlanMismatchError, match="no layer '0'"):
        masks.importances(masks.Fisher(moments), other)
    with pytest.raises(PlanMismatchError, match="no layer '0'"):
        masks.importances(masks.OutputError({}), other)
    with pytest.raises(OptionError, match="rule"):
        masks.importances("magnitude", layers)
    with pytest.raises(OptionError, match="kappa"):
        masks.Smoothed(moments, -1.0)
    wrong = {each.name: torch.ones(1, 1) for each in layers}
    with pytest.raises(PlanMismatchError, match="another layer"):
        masks.importances(masks.OutputError(wrong), layers)
    bad = {x.name: torch.full((x.rows, x.columns), float("nan")) for x in layers}
    with pytest.raises(NonFiniteError):
        masks.importances(masks.OutputError(bad), layers)
