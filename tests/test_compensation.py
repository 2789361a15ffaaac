"""One layer's compensation, compared with dense algebra."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fitcompress as fc
from compensation_layers import (
    KINDS,
    PLAIN,
    columns,
    correlated,
    layer_of,
    level_of,
    moments_of,
    outputs,
)
from fitcompress import reference
from fitcompress.compensate import sweep
from fitcompress.compensate.masks import magnitude_mask
from fitcompress.compensate.options import Compensation
from fitcompress.compensate.statistics import gather
from fitcompress.compensate.sweep import quantize
from fitcompress.compensate.target import Normal, solve
from fitcompress.errors import OptionError


def dense_codes(module, dense, now, step: float, options=PLAIN) -> torch.Tensor:
    """The whole method in float64 with explicit inverses, no blocks, no kernels."""
    codes = []
    x, y = columns(module, now), outputs(module, columns(module, dense))
    weight = layer_of(module).matrix().double().reshape(len(x), -1, x.shape[-1])
    for own, a, out in zip(weight, x, y, strict=True):
        if options.bias:
            a, out = a - a.mean(0), out - out.mean(0)
        h, c = a.T @ a / len(a), out.T @ a / len(a)
        ridge = options.damping * h.diagonal().mean()
        ridged = h + ridge * torch.eye(len(h))
        star = (c + ridge * own) @ torch.linalg.inv(ridged)
        w = own + options.drift * (star - own)
        order = h.diagonal().argsort(descending=True, stable=True)
        result = torch.zeros_like(w)
        left = order.tolist()
        while left:  # optimal brain surgeon, one column after the other
            inverse = torch.linalg.inv(ridged[left][:, left])
            j = left[0]
            result[:, j] = (w[:, j] / step).round()
            error = (w[:, j] - step * result[:, j]) / inverse[0, 0]
            w[:, left] -= error[:, None] * inverse[0]
            left = left[1:]
        codes.append(result)
    return torch.cat(codes).int()


# Where columns see the same inputs their H_jj are equal, but for rounding once means
# are left out: their order is then chance. So are all of the last kind, and some of the
# one before, which without output padding are not.
*SURE, TIES, _ = KINDS
PLAIN_TRANSPOSED = nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2), TIES[1]


@pytest.mark.parametrize(
    ("module", "shape", "bias"),
    [(*kind, bias) for kind in (*SURE, PLAIN_TRANSPOSED) for bias in (False, True)]
    + [(*TIES, False)],
    ids=repr,
)
@torch.no_grad()
def test_codes_equal_those_of_a_dense_reference(module, shape, bias) -> None:
    torch.manual_seed(3)
    dense = list(torch.randn(6, *shape))
    now = [x + 0.2 * torch.randn(shape) for x in dense]
    options = Compensation(drift=0.7, bias=bias, beam=1, damping=0.05)
    module.weight.copy_((64 * module.weight).round() / 64)
    layer = layer_of(module)
    level = fc.Level(fc.Grid(step=0.1), 0.0, layer.shape)
    # Products of few values that float32 holds exactly: bit-equal input to both.
    dense, now = ([(8 * x).round() / 8 for x in part] for part in (dense, now))
    moments = gather(layer, dense, now)
    made = quantize(layer.matrix(), moments, None, level, options, biased=bias)
    assert torch.equal(
        made.codes, dense_codes(module, dense, now, level.grid.step, options)
    )


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("grid", [fc.Grid(step=0.8), fc.Grid(bits=3)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.4])
def test_outputs_are_closer_than_those_of_rounded_weights(
    groups, grid, sparsity
) -> None:
    x, weight = correlated(500, 24), torch.randn(8, 24)
    level = level_of(grid, weight, sparsity)
    made = quantize(weight, moments_of(x, x @ weight.T, groups), None, level, PLAIN)
    values = made.codes * made.scale.reshape(-1, 1)
    if grid.bits:
        assert made.codes.abs().max() <= 3
        scale = weight.abs().amax(1, keepdim=True) / 3
    else:
        scale = torch.tensor([[grid.step]])
    rounded = (weight / scale).round() * scale
    mask = magnitude_mask(weight, sparsity)
    rounded = rounded if mask is None else rounded * mask

    def error(other: torch.Tensor) -> float:
        return float((x @ (weight - other).T).square().mean())

    assert error(values) < 0.7 * error(rounded)
    if sparsity:
        assert made.mask is not None
        assert int((~made.mask).sum()) == int(sparsity * weight.numel())
        assert not made.codes[~made.mask].any()


def test_masks_drop_what_others_can_make_up_for() -> None:
    # Inputs 0 and 1 are all but equal: either may go, whatever its weight.
    x = correlated(2000, 6)
    x[:, 1] = x[:, 0] + 0.01 * torch.randn(2000)
    weight = torch.tensor([[3.0, 3.0, 1.0, -1.0, 1.0, 1.0]])
    level = level_of(fc.Grid(step=1e-3), weight, 1 / 6)
    made = quantize(weight, moments_of(x, x @ weight.T), None, level, PLAIN)
    assert made.codes[0, :2].count_nonzero() == 1
    assert float(made.codes[0, :2].sum() * 1e-3) == pytest.approx(6, abs=0.2)


def test_more_paths_leave_less_error() -> None:
    x, weight = correlated(500, 40), torch.randn(16, 40)
    level = level_of(fc.Grid(step=1.0), weight)

    def error(beam: int) -> float:
        options = Compensation(drift=0.0, bias=False, beam=beam)
        made = quantize(weight, moments_of(x, x @ weight.T), None, level, options)
        return float((x @ (weight - made.codes).T).square().mean())

    assert error(16) < 0.95 * error(1)


def test_means_are_left_to_the_bias() -> None:
    x = correlated(500, 12) + 3.0
    weight = torch.randn(5, 12)
    level = level_of(fc.Grid(step=0.7), weight)
    moments = moments_of(x, x @ weight.T)
    made = quantize(weight, moments, None, level, Compensation(drift=0.0), biased=True)
    assert made.shift is not None
    difference = x @ (weight - made.codes * 0.7).T
    torch.testing.assert_close(difference.mean(0), made.shift, rtol=1e-3, atol=1e-3)
    assert difference.var(0).mean() < difference.square().mean(0).mean()
    unbiased = quantize(
        weight, moments_of(x, x @ weight.T), None, level, Compensation(drift=0.0)
    )
    assert unbiased.shift is None
    other = x @ (weight - unbiased.codes * 0.7).T
    assert difference.var(0).mean() < other.square().mean()


def test_the_drift_of_inputs_is_corrected() -> None:
    # The layers before have shrunk the inputs by a fifth: weights grow by a quarter.
    x, weight = correlated(4000, 6), torch.randn(3, 6)
    level = level_of(fc.Grid(step=1e-3), weight)
    options = Compensation(bias=False, damping=1e-6)
    halves = [moments_of(0.8 * part, part @ weight.T) for part in x.chunk(2)]
    made = quantize(weight, halves[0], halves[1], level, options)
    assert made.drift == pytest.approx(1, abs=0.01)
    assert made.trust == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(made.codes * 1e-3, weight / 0.8, rtol=0.01, atol=5e-3)


def test_corrections_that_fit_noise_are_shrunk() -> None:
    # Outputs that no weight explains: a correction fitted to few samples is noise.
    torch.manual_seed(5)
    x, weight = torch.randn(120, 30), torch.randn(4, 30)
    y = x @ weight.T + 3 * torch.randn(120, 4)
    level = level_of(fc.Grid(step=1e-3), weight)
    halves = [moments_of(x[i::2], y[i::2]) for i in range(2)]
    made = quantize(weight, halves[0], halves[1], level, Compensation(bias=False))
    assert made.drift < 0.5
    assert made.trust < 0.3

    def gain(drift: float) -> float:
        fitted, copy = (
            Normal.of(moments_of(x[::2], y[::2]), 0, centered=False) for _ in range(2)
        )
        target = solve(
            weight.double(), fitted, None, copy, damping=0.02, drift=drift, name=""
        )
        moved = torch.empty_like(target.weight)
        moved[:, target.order] = target.weight
        return float(((y[1::2].double() - x[1::2].double() @ moved.T).square()).sum())

    errors = {d: gain(d) for d in (0.0, made.drift, 1.0)}
    assert errors[made.drift] <= min(errors[0.0], errors[1.0]) * (1 + 1e-9)


def test_the_least_squares_factor_of_a_row() -> None:
    x, weight = correlated(500, 20), torch.randn(6, 20)
    options = Compensation(drift=0.0, bias=False, row_scale=True, damping=1e-9)
    level = level_of(fc.Grid(step=2.0), weight)
    moments = moments_of(x, x @ weight.T)
    made = quantize(weight, moments, None, level, options, scalable=True)
    assert made.gain is not None
    have, want = x @ (2.0 * made.codes).T, x @ weight.T
    best = (have * want).sum(0) / have.square().sum(0)
    torch.testing.assert_close(made.gain, best, rtol=1e-3, atol=1e-4)


def test_rate_aware_rounding_saves_bits() -> None:
    x, weight = correlated(500, 60), torch.randn(40, 60)
    level = level_of(fc.Grid(step=0.8), weight)

    def entropy(rate: float) -> float:
        options = Compensation(drift=0.0, beam=4, rate=rate)
        made = quantize(weight, moments_of(x, x @ weight.T), None, level, options)
        bits = sweep.code_bits(made.codes)
        half = len(bits) // 2
        return float(bits[made.codes.long() + half].mean())

    assert entropy(1.0) < 0.97 * entropy(0.0)


def test_clipping_helps_few_bits() -> None:
    x, weight = correlated(500, 40), torch.randn(16, 40)
    weight[:, 0] *= 4  # outliers
    for bits in (2, 3, 4):
        level = level_of(fc.Grid(bits=bits), weight)

        def error(clipping: bool, level: fc.Level = level) -> float:
            options = Compensation(drift=0.0, bias=False, clipping=clipping)
            made = quantize(weight, moments_of(x, x @ weight.T), None, level, options)
            assert torch.equal(made.scale, made.scale.half().float())
            values = made.codes * made.scale[:, None]
            return float((x @ (weight - values).T).square().mean())

        assert error(clipping=True) < 0.95 * error(clipping=False)


def test_the_sweep_equals_its_twin_on_a_layer(monkeypatch) -> None:
    x, weight = correlated(300, 70), torch.randn(9, 70)
    level = level_of(fc.Grid(step=0.5), weight, 0.3)
    options = Compensation(beam=3)
    native = quantize(weight, moments_of(x, x @ weight.T), None, level, options)
    monkeypatch.setattr(
        sweep.ops, "error_feedback_sweep", reference.error_feedback_sweep
    )
    twin = quantize(weight, moments_of(x, x @ weight.T), None, level, options)
    assert torch.equal(native.codes, twin.codes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"drift": 1.5},
        {"drift": math.nan},
        {"beam": 0},
        {"beam": 2.0},
        {"rate": -1},
        {"damping": 0},
    ],
    ids=str,
)
def test_wrong_options(wrong) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Compensation(**wrong)


def test_the_default_beam_is_as_wide_as_it_is_cheap() -> None:
    options = Compensation()
    assert options.paths(64, 576) == 16
    assert options.paths(4096, 4096) == 1
    assert 1 < options.paths(1024, 2048) < 16
    assert Compensation(beam=5).paths(10**6, 10**6) == 5
