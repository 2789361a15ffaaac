"""One layer's compensation, compared with dense algebra."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress import reference
from fitcompress.compensate import statistics, sweep
from fitcompress.compensate.masks import magnitude_mask
from fitcompress.compensate.options import Compensation
from fitcompress.compensate.statistics import Moments, gather
from fitcompress.compensate.sweep import quantize
from fitcompress.compensate.target import Normal, solve
from fitcompress.errors import NonFiniteError, OptionError
from fitcompress.model import Layer, patches

PLAIN = Compensation(drift=1.0, bias=False, beam=1, damping=0.01)


def layer_of(module: nn.Module) -> Layer:
    return Layer("layer", module, getattr(module, "groups", 1))


KINDS = [
    (nn.Linear(5, 3), (7, 5)),
    (nn.Linear(5, 3, bias=False), (7, 4, 5)),
    (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (5, 4, 6, 7)),
    (nn.Conv2d(4, 4, 3, groups=4, padding="same"), (5, 4, 6, 6)),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (5, 2, 6, 6)),
    (nn.Conv1d(3, 2, 4, dilation=2), (6, 3, 12)),
    (nn.Conv3d(2, 2, 2), (3, 2, 3, 4, 3)),
    (nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), (5, 4, 4, 3)),
    (nn.ConvTranspose1d(3, 2, 4, stride=3), (6, 3, 5)),
]


def columns(module: nn.Module, batches: torch.Tensor) -> torch.Tensor:
    """All inputs of one output, float64 [groups, positions, columns]."""
    return torch.cat([patches(module, x).flatten(1, 2) for x in batches], 1).double()


def outputs(module: nn.Module, a: torch.Tensor) -> torch.Tensor:
    """W x, float64 [groups, positions, rows / groups]."""
    weight = layer_of(module).matrix().double()
    return a @ weight.reshape(len(a), -1, a.shape[-1]).transpose(1, 2)


@pytest.mark.parametrize(("module", "shape"), KINDS, ids=repr)
def test_moments_equal_explicit_outer_products(module, shape) -> None:
    torch.manual_seed(0)
    dense, now = (list(torch.randn(2, *shape)) for _ in range(2))
    with torch.no_grad():
        moments = gather(layer_of(module), dense, now)
    x, y = columns(module, now), outputs(module, columns(module, dense))
    x = torch.cat([x, torch.ones(*x.shape[:2], 1)], 2)
    assert moments.count == x.shape[1]
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(moments.second, x.transpose(1, 2) @ x, **close)
    torch.testing.assert_close(moments.cross, y.transpose(1, 2) @ x, **close)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(1, 2, 2), (8, 1, 33, 33)),
        (nn.Linear(3, 2), (8, 1000, 3)),
        (nn.ConvTranspose2d(1, 2, 4, stride=2), (8, 1, 33, 33)),
    ],
    ids=repr,
)
@torch.no_grad()
def test_many_positions_are_subsampled_evenly(monkeypatch, module, shape) -> None:
    torch.manual_seed(0)
    x = list(torch.randn(shape).split(2))
    whole = gather(layer_of(module), x, x)
    monkeypatch.setattr(statistics, "ENOUGH_ROWS", 800)
    some = gather(layer_of(module), x, x)
    assert 800 <= some.count < 0.5 * whole.count
    assert (some.second.diagonal(dim1=1, dim2=2) > 0).all()
    torch.testing.assert_close(
        some.second / some.count, whole.second / whole.count, rtol=0, atol=0.2
    )


@torch.no_grad()
def test_inputs_that_are_not_finite_are_an_error() -> None:
    module, x = nn.Linear(3, 2), torch.ones(4, 3)
    x[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="'layer'"):
        gather(layer_of(module), [torch.ones(4, 3)], [x])


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


# Not the last kind: all its H_jj are equal but for rounding, so their order is.
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("module", "shape"), KINDS[:-1], ids=repr)
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


def correlated(samples: int, width: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(samples, width) @ torch.randn(width, width) / width**0.5


def moments_of(x: torch.Tensor, y: torch.Tensor, groups: int = 1) -> Moments:
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    second = (x.T @ x).expand(groups, -1, -1).clone()
    rows = y.shape[1] // groups
    return Moments(second, (y.double().T @ x).reshape(groups, rows, -1))


def level_of(grid: fc.Grid, weight: torch.Tensor, sparsity: float = 0.0) -> fc.Level:
    return fc.Level(grid, sparsity, tuple(weight.shape))


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


def test_a_forward_of_its_own_is_not_asked() -> None:
    class Tenth(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, 0.1 * self.weight, self.bias)

    torch.manual_seed(0)
    module, x = Tenth(6, 4), torch.randn(50, 6)
    moments = gather(layer_of(module), [x], [x])
    torch.testing.assert_close(
        moments.cross[0, :, :-1],
        (module.weight @ x.T @ x).double(),
        rtol=1e-4,
        atol=1e-4,
    )
