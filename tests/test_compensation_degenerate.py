"""Layers whose inputs are dead, constant or all alike."""

from __future__ import annotations

import torch
from torch import nn

import fitcompress as fc
from compensation_layers import PLAIN, correlated, layer_of, level_of, moments_of
from fitcompress.compensate.options import Compensation
from fitcompress.compensate.statistics import Moments, gather
from fitcompress.compensate.sweep import quantize


def test_inputs_that_are_dead_cost_no_bits() -> None:
    x, weight = correlated(500, 8), torch.randn(4, 8)
    x[:, [2, 5]] = 0
    for grid in (fc.Grid(step=0.01), fc.Grid(bits=6)):
        moments = moments_of(x, x @ weight.T)
        made = quantize(weight, moments, None, level_of(grid, weight), Compensation())
        assert not made.codes[:, [2, 5]].any()
        assert made.codes[:, [0, 1, 3, 4, 6, 7]].count_nonzero() > 20
    # A small input with a large weight is not dead.
    x[:, 2] = 1e-4 * torch.randn(500)
    weight[:, 2] = 1e4
    moments = moments_of(x, x @ weight.T)
    level = level_of(fc.Grid(step=0.01), weight)
    made = quantize(weight, moments, None, level, Compensation())
    assert made.codes[:, 2].all()


def test_degenerate_inputs_are_no_obstacle(caplog) -> None:
    weight, level = torch.randn(3, 4), fc.Level(fc.Grid(step=0.1), 0.0, (3, 4))
    x = torch.ones(50, 4)  # all inputs are always equal
    made = quantize(weight, moments_of(x, x @ weight.T), None, level, PLAIN)
    assert ((weight - 0.1 * made.codes).sum(1).abs() <= 0.06).all()
    singular = Compensation(drift=0.0, bias=False, damping=1e-12)
    first = torch.zeros(1, 5, 5, dtype=torch.float64)
    first[0, :4, :4] = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1e-5]))
    first[0, 4, 4] = 1
    cross = torch.zeros(1, 3, 5, dtype=torch.float64)
    quantize(weight, Moments(first, cross), None, level, singular)
    assert "damping raised tenfold" in caplog.text


def test_a_large_constant_input_leaves_the_others_alive() -> None:
    x, weight = correlated(400, 16), torch.randn(8, 16)
    x[:, 0] = 1000.0
    level = level_of(fc.Grid(step=0.02), weight)
    moments = moments_of(x, x @ weight.T)
    made = quantize(weight, moments, None, level, Compensation(drift=0.0), biased=True)
    assert (made.codes[:, 1:] != 0).float().mean() > 0.9


def test_constant_inputs_do_not_make_weights_of_noise() -> None:
    weight = torch.randn(8, 16)
    for x in (torch.randn(1, 16), torch.full((64, 16), 0.1), 1e4 + torch.randn(64, 16)):
        layer = nn.Linear(16, 8)
        with torch.no_grad():
            layer.weight.copy_(weight)
        moments = gather(layer_of(layer), [x], [x])
        level = level_of(fc.Grid(step=0.02), weight)
        options = Compensation(drift=1.0)
        made = quantize(weight, moments, None, level, options, biased=True)
        assert (made.codes * 0.02 - weight).abs().max() < 0.2  # not 3


def test_masks_spend_nothing_on_groups_without_input() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(8, 8, 3, groups=8, bias=False)
    x = torch.randn(64, 8, 8, 8)
    x[:, :4] = 0
    layer = layer_of(module)
    level = fc.Level(fc.Grid(step=0.01), 0.5, layer.shape)
    moments = gather(layer, [x], [x])
    made = quantize(layer.matrix(), moments, None, level, Compensation(drift=0.0))
    assert not made.codes[:4].any()
    assert made.codes[4:].all()
