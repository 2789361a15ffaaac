"""Observers: ranges by hand, batches in any cut, and the least error there is."""

import pytest
import torch

from fitcompress.errors import CalibrationError, NonFiniteError, OptionError
from fitcompress.model.value_histogram import ValueHistogram
from fitcompress.model.value_ranges import Range, least_error
from fitcompress.quantize import (
    MinMaxObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
)

OBSERVERS = [MinMaxObserver, PercentileObserver, MSEObserver]


def values(kind: str, count: int = 20000) -> torch.Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(3))
    return {
        "normal": x,
        "relu": x.relu(),
        "gelu": torch.nn.functional.gelu(3 * x),
        "heavy": x**3,
        "negative": -x.abs() - 1,
    }[kind]


def on_grid(x: torch.Tensor, found: Range) -> torch.Tensor:
    codes = (x / found.scale).round().clamp(found.min_code, found.max_code)
    return codes * found.scale


def error(x: torch.Tensor, found: Range) -> float:
    return float((x - on_grid(x, found)).double().square().sum())


def seen(observer: Observer, *batches: torch.Tensor) -> Observer:
    for x in batches:
        observer.observe(x)
    return observer


def test_min_max_by_hand() -> None:
    # 0 … 6 in 3 bits: codes 0 … 7, Δ = 6/7.
    found = seen(MinMaxObserver(), torch.tensor([0.0, 6.0, 3.0])).range(3)
    assert (found.min_code, found.max_code) == (0, 7)
    assert found.scale.tolist() == pytest.approx([6 / 7])
    # −1 … 6: z = round(7 · 1/7) = 1, codes −1 … 6, Δ = 1.
    found = seen(MinMaxObserver(), torch.tensor([-1.0]), torch.tensor([6.0])).range(3)
    assert (found.min_code, found.max_code) == (-1, 6)
    assert found.scale.tolist() == [1.0]
    found = seen(MinMaxObserver(), torch.tensor([-1.0, 6.0])).range(3, symmetric=True)
    assert (found.min_code, found.max_code) == (-3, 3)
    assert found.scale.tolist() == [2.0]


@pytest.mark.parametrize("kind", ["normal", "relu", "gelu", "heavy", "negative"])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_min_max_clips_nothing(kind, bits) -> None:
    x = values(kind)
    found = seen(MinMaxObserver(), x).range(bits)
    assert found.min_code <= 0 < found.max_code
    assert found.max_code - found.min_code == 2**bits - 1
    half = 0.5001 * float(found.scale)
    assert float((x - on_grid(x, found)).abs().max()) <= half


def test_bins_and_their_doubling_by_hand() -> None:
    histogram = ValueHistogram(bins=4)
    histogram.add(torch.tensor([0.0, 0.5, 1.5, 3.5, -0.5]))  # below 4: w = 1
    assert histogram.counts.tolist() == [[0, 0, 0, 1, 1, 1, 0, 1]]
    assert histogram.zeros.tolist() == [1]
    histogram.add(torch.tensor([4.0]))  # below 8: w = 2
    assert histogram.counts.tolist() == [[0, 0, 0, 1, 2, 1, 1, 0]]
    assert histogram.exponents.tolist() == [1]
    assert histogram.total.tolist() == [6]


@pytest.mark.parametrize("channel", [None, 1])
@pytest.mark.parametrize("made", OBSERVERS)
def test_the_range_does_not_depend_on_batches(made, channel) -> None:
    x = values("heavy", 24000).view(800, 3, 10)
    x[:, 2] *= 1e-3
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    whole = seen(made(channel=channel), x).range(4)
    for size in (1, 37, 400):
        parts = seen(made(channel=channel), *shuffled.split(size)[:800]).range(4)
        assert torch.equal(parts.scale, whole.scale)
        assert (parts.min_code, parts.max_code) == (whole.min_code, whole.max_code)
    assert len(whole.scale) == (1 if channel is None else 3)


def test_merging_is_exact() -> None:
    x = values("heavy").view(-1, 4)
    whole, left, right = (ValueHistogram(1) for _ in range(3))
    whole.add(x)
    left.add(1 * x[:300])
    right.add(x[300:])
    left.merge(right)
    left.merge(ValueHistogram(1))  # empty
    for name in ("counts", "zeros", "exponents", "low", "high"):
        assert torch.equal(getattr(left, name), getattr(whole, name))
    for name in ("distances", "squares"):
        assert torch.allclose(
            getattr(left, name), getattr(whole, name), rtol=1e-12, atol=1e-9
        )
    empty = ValueHistogram(1)
    empty.merge(whole)
    assert torch.equal(empty.counts, whole.counts)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_ranges_scale_with_the_values(scale) -> None:
    found = seen(MSEObserver(), values("relu") * scale).range(4)
    unit = seen(MSEObserver(), values("relu")).range(4)
    assert float(found.scale) / scale == pytest.approx(float(unit.scale), rel=0.02)


@pytest.mark.parametrize("kind", ["normal", "relu", "gelu", "heavy"])
def test_the_histogram_knows_the_squared_error(kind) -> None:
    x = values(kind)
    histogram = ValueHistogram()
    histogram.add(x)
    for bits, clip in ((2, 0.2), (4, 0.7), (6, 1.0)):
        found = seen(MinMaxObserver(), x * clip).range(bits)
        estimate = histogram.squared_error(found.scale, found.min_code, found.max_code)
        assert float(estimate) == pytest.approx(error(x, found), rel=0.02)


def test_sums_of_bins_by_hand() -> None:
    histogram = ValueHistogram(bins=4)
    histogram.add(torch.tensor([0.0, 0.5, 1.5, 3.25, -0.5, -1.25]))  # w = 1
    assert histogram.distances.tolist() == [[0, 0, 0.25, 0.5, 0.5, 0.5, 0, 0.25]]
    assert histogram.squares.tolist() == [[0, 0, 1 / 16, 0.25, 0.25, 0.25, 0, 1 / 16]]
    histogram.add(torch.tensor([4.0]))  # w = 2: 0.5 and 1.5 are at ¼ and ¾
    assert histogram.distances.tolist() == [[0, 0, 0, 0.875, 1, 0.625, 0, 0]]
    squares = [0, 0, 0, 1 / 16 + 25 / 64, 10 / 16, 25 / 64, 0, 0]
    assert histogram.squares.tolist() == [squares]


@pytest.mark.parametrize("batches", [1, 7])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("outlier", [1e2, 1e3, 1e4, 1e5, 1e6, -1e5])
def test_outliers_do_not_spoil_the_squared_error(outlier, bits, batches) -> None:
    x = values("normal", 40000)
    x[5] = outlier
    histogram = ValueHistogram()
    for part in x.chunk(batches):
        histogram.add(part)
    found, estimate = least_error(histogram, bits)
    assert float(estimate) == pytest.approx(error(x, found), rel=0.05)
    for share in (0.5, 0.1):  # clips; and the values lie on several codes
        scale = found.scale * share
        lo, hi = found.min_code, found.max_code
        estimate = histogram.squared_error(scale, lo, hi)
        true = error(x, Range(scale, lo, hi))
        assert float(estimate) == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize("kind", ["normal", "relu", "gelu", "heavy", "negative"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_is_near_the_best_of_all_ranges(kind, bits) -> None:
    x = values(kind, 4000)
    found = seen(MSEObserver(), x).range(bits)
    levels, span = 2**bits - 1, float(x.max().clamp_min(0) - x.min().clamp_max(0))
    best = min(
        error(x, Range(torch.tensor([share * span / levels]), -z, levels - z))
        for z in range(levels)
        for share in torch.logspace(-1.7, 0, 150).tolist()
    )
    assert error(x, found) <= 1.03 * best
    covering = seen(MinMaxObserver(), x).range(bits)
    assert error(x, found) <= error(x, covering)


def test_per_channel_errors_are_less_and_sum_up() -> None:
    x = values("relu", 8000).view(-1, 4) * torch.tensor([0.01, 1.0, 5.0, 100.0])
    one, each = ValueHistogram(), ValueHistogram(1)
    one.add(x)
    each.add(x)
    single, total = least_error(one, 4)
    found, errors = least_error(each, 4)
    assert error(x, found) < error(x, single)
    assert float(errors.sum()) < float(total)
    for n in range(4):
        own = Range(found.scale[n : n + 1], found.min_code, found.max_code)
        assert float(errors[n]) == pytest.approx(error(x[:, n], own), rel=0.05)


def test_percentiles() -> None:
    x = torch.arange(-1000, 3001).float()
    histogram = ValueHistogram()
    histogram.add(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))])
    for share in (0.0, 0.01, 0.25, 0.5, 0.99, 1.0):
        expected = float(torch.quantile(x, share))
        assert float(histogram.quantile(share)) == pytest.approx(expected, abs=3)
    found = seen(PercentileObserver(0.9), x).range(8)  # −800 … 2800
    assert found.max_code * float(found.scale) == pytest.approx(2800, abs=20)
    assert found.min_code * float(found.scale) == pytest.approx(-800, abs=20)
    mostly_zero = torch.cat([torch.zeros(900), torch.ones(100)])
    histogram = ValueHistogram()
    histogram.add(mostly_zero)
    assert float(histogram.quantile(0.5)) == 0


@pytest.mark.parametrize("channel", [None, 0])
@pytest.mark.parametrize("made", OBSERVERS)
def test_only_zeros_get_a_step_that_serves(made, channel) -> None:
    found = seen(made(channel=channel), torch.zeros(2, 3)).range(4)
    assert bool((found.scale > 0).all()) and found.max_code > 0


@pytest.mark.parametrize("made", OBSERVERS)
def test_sixteen_bit_floats_and_noncontiguous_values(made) -> None:
    x = values("normal").view(100, 200)
    found = seen(made(), x.bfloat16().T).range(8)
    again = seen(made(), x.bfloat16().float()).range(8)
    assert torch.equal(found.scale, again.scale)


@pytest.mark.parametrize("made", OBSERVERS)
def test_bad_values_are_typed_errors(made) -> None:
    observer = made()
    with pytest.raises(CalibrationError, match="no value was seen"):
        observer.range(4)
    observer.observe(torch.zeros(0, 3))
    with pytest.raises(CalibrationError, match="no value was seen"):
        observer.range(4)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError, match="1 of 2"):
            observer.observe(torch.tensor([bad, 1.0]))
    observer.observe(torch.tensor([1.0, 2.0]))
    for bits in (1, 17, 4.0, True):
        with pytest.raises(OptionError, match="2 … 16"):
            observer.range(bits)
    wide = seen(made(channel=1), torch.ones(2, 3))
    with pytest.raises(CalibrationError, match="got 4; wanted 3"):
        wide.observe(torch.ones(2, 4))


def test_bad_options_are_typed_errors() -> None:
    for share in (0, 1.1):
        with pytest.raises(OptionError):
            PercentileObserver(share)
    with pytest.raises(ValueError, match="power of two"):
        ValueHistogram(bins=3)
