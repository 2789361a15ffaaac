"""Rules for masks: formulas, nested masks, shares of layers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress import ops
from fitcompress.compensate import masks as pruning
from fitcompress.compensate.masks import importance_mask, prune_
from fitcompress.compensate.options import Compensation
from fitcompress.compensate.target import Target
from fitcompress.masks import Fisher, Magnitude, MaskRule, OutputError, Smoothed
from fitcompress.model import compressible_layers
from fitcompress.sensitivity.levels import allocated, layer_sparsities
from mask_rules import RULES, SPARSITIES, Given, by_name, make_rule


@pytest.fixture
def moments(net, loader) -> fc.FisherMoments:
    return fc.measure_fisher(net, loader, diagonal=True, progress=False)


@pytest.fixture(params=RULES)
def rule(request, net, loader, moments) -> MaskRule:
    return make_rule(request.param, net, loader, moments)


# --- Formulas -------------------------------------------------------------------------


def linear(weight: list[list[float]]) -> nn.Module:
    model = nn.Sequential(nn.Linear(len(weight[0]), len(weight), bias=False))
    model[0].weight = nn.Parameter(torch.tensor(weight))
    return model


def moments_of(squares: list[list[float]], samples: int) -> fc.FisherMoments:
    sums = torch.tensor(squares)
    trace = torch.tensor([float(sums.sum()), 0.0], dtype=torch.float64)
    return fc.FisherMoments({"0": trace}, {"0": sums}, samples=samples)


def test_importances_worked_out_by_hand() -> None:
    (layer,) = compressible_layers(linear([[1.0, -2.0], [0.0, 3.0]]))
    moments = moments_of([[8.0, 4.0], [2.0, 2.0]], samples=2)  # F = 4 2 / 1 1, mean 2
    assert Magnitude().importance(layer).tolist() == [[1, 2], [0, 3]]
    assert Fisher(moments).importance(layer).tolist() == [[4, 8], [0, 9]]
    assert Smoothed(moments).importance(layer).tolist() == [[6, 16], [0, 27]]
    assert Smoothed(moments, 0.5).importance(layer).tolist() == [[5, 12], [0, 18]]


def test_smoothing_is_that_of_the_table_op(net, moments) -> None:
    layer = by_name(net)["head"]
    fisher, weight = moments.diagonal("head"), layer.matrix()
    table = ops.distortion_table(weight, fisher, (4,), (), SPARSITIES, smoothing=0.25)
    importance = Smoothed(moments, 0.25).importance(layer)
    for i, sparsity in enumerate(SPARSITIES[1:], 1):
        wanted = ops.level_mask(table, i, weight, fisher)
        assert torch.equal(importance_mask(importance, sparsity), wanted)


def test_fisher_information_is_read_as_the_matrix_that_the_weight_is() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, (2, 3), groups=2))
    (layer,) = compressible_layers(model)
    squares = torch.rand(4, 3 * 2 * 3)
    moments = fc.FisherMoments({"0": torch.ones(2)}, {"0": squares}, samples=1)
    wanted = layer.matrix_of(squares.view(layer.shape) * layer.weight.detach() ** 2)
    torch.testing.assert_close(Fisher(moments).importance(layer), wanted)


def test_output_errors_are_what_dropping_one_weight_costs(net, images) -> None:
    """Of the last layer: drop w_j, fit the row's others, and look at its outputs."""
    rule = OutputError.measure(net, [images], progress=False)
    seen = []
    handle = net.out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(images)
    handle.remove()
    x = seen[0].detach().double()
    x = x - x.mean(0)  # the layer has a bias, which restores the mean
    h = x.T @ x / len(x)
    h += 0.02 * h.diagonal().mean() * torch.eye(7)
    found = rule.importance(by_name(net)["out"])
    for row, w in enumerate(net.out.weight.detach().double()):
        for j in range(7):
            left = [k for k in range(7) if k != j]
            best = torch.zeros(7, dtype=torch.float64)
            best[left] = torch.linalg.solve(h[left][:, left], h[left] @ w)
            cost = float((w - best) @ h @ (w - best))
            assert float(found[row, j]) == pytest.approx(cost, rel=2e-3)


def test_output_errors_of_windows_and_groups(net, images) -> None:
    """The depthwise convolution: one H of nine places for each channel."""
    rule = OutputError.measure(
        net, [images], compensation=Compensation(bias=False), progress=False
    )
    x = net.norm(net.conv(images)).relu().detach().double()
    patches = nn.functional.unfold(x, 3, padding=1, stride=2)
    patches = patches.reshape(len(x), 8, 9, -1).permute(1, 0, 3, 2).reshape(8, -1, 9)
    weight = net.deep.weight.detach().double().flatten(1)
    for channel, x in enumerate(patches):
        h = x.T @ x / len(x)
        ridged = h + 0.02 * h.diagonal().mean() * torch.eye(9)
        wanted = weight[channel].square() / torch.linalg.inv(ridged).diagonal()
        found = rule.importance(by_name(net)["deep"])[channel].double()
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    centered = OutputError.measure(net, [images], progress=False)
    assert not torch.allclose(rule.curvature["deep"], centered.curvature["deep"])


def test_entries_of_an_embedding_count_by_how_often_they_are_looked_up() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(6, 2)).eval()
    ids = torch.tensor([[0, 0], [0, 1], [0, 1], [0, 3]])
    rule = OutputError.measure(model, [ids], progress=False)
    share = torch.tensor([5, 2, 0, 1]) / 8 + 0.02 * 0.25
    wanted = share[:, None] * model[0].weight.detach() ** 2
    torch.testing.assert_close(rule.importance(by_name(model)["0"]), wanted)


def test_the_ends_of_smoothing(net, moments) -> None:
    def order(rule: MaskRule) -> list[int]:
        return rule.importance(by_name(net)["head"]).flatten().argsort().tolist()

    assert order(Smoothed(moments, 0.0)) == order(Fisher(moments))
    assert order(Smoothed(moments, 1e7)) == order(Magnitude())
    assert order(Smoothed(moments, 1.0)) not in (
        order(Fisher(moments)),
        order(Magnitude()),
    )


def test_digests_tell_rules_apart(net, loader, images, moments) -> None:
    fewer = fc.measure_fisher(net, loader, diagonal=True, samples=64, progress=False)

    def make() -> list[MaskRule]:
        return [
            Magnitude(),
            Fisher(moments),
            Fisher(fewer),
            Smoothed(moments),
            Smoothed(moments, 0.5),
            OutputError.measure(net, loader, progress=False),
            OutputError.measure(net, [images[:40]], progress=False),
        ]

    digests = [rule.digest() for rule in make()]
    assert len(set(digests)) == len(digests)
    assert digests == [rule.digest() for rule in make()]


# --- Masks ----------------------------------------------------------------------------


def test_masks_are_nested_and_drop_what_they_say(net, rule) -> None:
    for layer in compressible_layers(net):
        importance = rule.importance(layer)
        assert importance.dtype == torch.float32
        assert importance.shape == (layer.rows, layer.columns)
        masks = [importance_mask(importance, s) for s in SPARSITIES[1:]]
        for sparsity, mask in zip(SPARSITIES[1:], masks, strict=True):
            assert int((~mask).sum()) == int(sparsity * layer.size)
            if int(sparsity * layer.size):
                assert importance[~mask].max() <= importance[mask].min()
        for lower, higher in pairwise(masks):
            assert not (higher & ~lower).any()


def test_ties_go_by_position() -> None:
    assert importance_mask(torch.ones(2, 3), 0.5).tolist() == [[0, 0, 0], [1, 1, 1]]
    equal = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 2.0]])
    assert importance_mask(equal, 0.5).tolist() == [[1, 0, 0], [0, 1, 1]]


def problem(seed: int, rows: int, columns: int) -> tuple[torch.Tensor, Target]:
    """Return H + δ and the target, columns in falling order of H_jj, as layers have."""
    torch.manual_seed(seed)
    x = torch.randn(1000, columns, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, dtype=torch.float64)
    h = x.T @ x / len(x)
    h += 0.02 * h.diagonal().mean() * torch.eye(columns)
    order = h.diagonal().argsort(descending=True)
    h = h[order][:, order]
    inverse = torch.linalg.inv(h)
    factor = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    weight = torch.randn(rows, columns, dtype=torch.float64)
    return h, Target(weight, factor, inverse.diagonal().clone(), order, 0.0)


def fitted(h: torch.Tensor, wanted: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Return every row's least-squares solution on its support."""
    out = torch.zeros_like(wanted)
    for row, (w, own) in enumerate(zip(wanted, keep, strict=True)):
        out[row, own] = torch.linalg.solve(h[own][:, own], h[own] @ w)
    return out


@pytest.mark.parametrize("work", [1e12, 1e6], ids=["small", "dear"])
def test_pruned_sets_are_nested(monkeypatch, work) -> None:
    monkeypatch.setattr(pruning, "WORK", work)
    masks = []
    shares = [k / 24 for k in range(1, 24)]
    for share in shares:
        parts = [problem(seed, 6, 20)[1] for seed in (0, 1)]
        mask = prune_(parts, share)
        assert int((~mask).sum()) == int(share * 240)
        masks.append(mask)
    for lower, higher in pairwise(masks):
        assert not (higher & ~lower).any()


def eight_rounds(h: torch.Tensor, target: Target, sparsity: float) -> torch.Tensor:
    """Return what eight equal rounds with exact refits leave."""
    w, count = target.weight.clone(), int(sparsity * target.weight.numel())
    for turn in range(1, 9):
        keep = torch.ones(w.numel(), dtype=torch.bool)
        saliency = (w.square() / target.inverse).flatten()
        keep[saliency.argsort(stable=True)[: count * turn // 8]] = False
        w = fitted(h, target.weight, keep.view(w.shape))
    return w


@pytest.mark.parametrize(
    ("sparsity", "bound"), [(0.05, 1.05), (0.2, 1.05), (0.5, 1.05), (0.9, 0.97)]
)
def test_pruning_is_no_worse_than_in_eight_equal_rounds(sparsity, bound) -> None:
    ratio = 1.0
    for seed in range(4):
        h, target = problem(seed, 8, 40)
        wanted = target.weight.clone()
        other = eight_rounds(h, target, sparsity) - wanted
        prune_([target], sparsity)
        mine = target.weight - wanted
        ratio *= float(((mine @ h) * mine).sum() / ((other @ h) * other).sum())
    assert ratio ** (1 / 4) < bound


def test_a_given_mask_is_refitted() -> None:
    h, target = problem(0, 4, 12)
    wanted, importance = target.weight.clone(), torch.rand(4, 12)
    mask = prune_([target], 0.5, importance)
    assert torch.equal(mask, importance_mask(importance, 0.5))
    best = fitted(h, wanted, mask[:, target.order])
    torch.testing.assert_close(target.weight, best, rtol=1e-3, atol=1e-4)
    assert prune_([target], 0.0, importance) is None


# --- Shares of layers -----------------------------------------------------------------


def test_uniform_shares(net) -> None:
    layers = compressible_layers(net)
    shares = allocated(layers, SPARSITIES, Magnitude(), "uniform")
    assert shares == [list(SPARSITIES)] * len(layers)


def test_one_threshold_of_importance_over_all_layers(net, rule) -> None:
    layers = compressible_layers(net)
    found = [rule.importance(layer).flatten() for layer in layers]
    everything = torch.cat(found).sort().values
    shares = np.array(allocated(layers, SPARSITIES, rule, "importance"))
    counts = (shares * [[layer.size] for layer in layers]).astype(int)
    assert (np.diff(shares) >= 0).all()
    for column, sparsity in enumerate(SPARSITIES):
        count = int(sparsity * len(everything))
        assert count - len(layers) <= counts[:, column].sum() <= count
        threshold = float(everything[count])
        # A bin of the histogram is 1/128 of an octave.
        for own, dropped in zip(found, counts[:, column], strict=True):
            assert int((own < 0.99 * threshold).sum()) <= dropped
            assert dropped <= int((own <= 1.01 * threshold).sum())


def test_weights_of_no_importance_are_shared_in_proportion() -> None:
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 10))
    layers = compressible_layers(model)
    first, second = torch.ones(6, 10), torch.ones(10, 6)
    first[:4], second[:2] = 0, 0  # 40 and 12 of 60 weights
    rule = Given({"0": first, "1": second})
    shares = allocated(layers, (0.0, 26 / 120), rule, "importance")
    assert [int(own[1] * 60) for own in shares] == [20, 6]


def test_one_threshold_of_magnitude_is_the_default(net, rule) -> None:
    layers = compressible_layers(net)
    wanted = layer_sparsities(layers, SPARSITIES)
    assert allocated(layers, SPARSITIES, rule, "magnitude") == wanted
