"""The pace of one attempt: layers make up for what others took."""

from __future__ import annotations

import math

import pytest
import torch

from fitcompress.compensate.size_fit import Pace

LAYERS = [f"layer{n}" for n in range(20)]


def total(wrong: list[float], slope: float, factor: float = 1.0) -> float:
    """Bytes of 20 layers over their target, those at one factor off by ``wrong``."""
    expected = dict.fromkeys(LAYERS, 1000.0)
    pace = Pace("p", factor, expected, target=20_000.0, slope=slope)
    for name, off in zip(LAYERS, wrong, strict=True):
        ratio = pace.factor(name) / factor
        assert 1 / 1.11 < ratio < 1.11
        pace.spent(name, round(1000 * (1 + off) * ratio**-slope))
    return sum(pace.bytes.values()) / 20_000


@pytest.mark.parametrize("slope", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_layers_make_up_for_each_other(slope, factor) -> None:
    assert total([0.0] * 20, slope, factor) == pytest.approx(1, abs=1e-4)
    for sign in (-0.2, 0.2):
        alternating = total([sign, -sign] * 10, slope, factor)
        assert alternating == pytest.approx(1, abs=0.01)
        first = total([sign] * 2 + [0.0] * 18, slope, factor)
        assert first == pytest.approx(1, abs=1e-3)
        last = total([0.0] * 19 + [sign], slope, factor)
        assert last == pytest.approx(1 + sign / 20, abs=1e-3)  # nobody left
        assert abs(total([0.15 * sign] * 20, slope, factor) - 1) < 0.015
        # The allocation among layers stays: no factor is moved by more than a tenth.
        assert 0.1 < abs(total([sign] * 20, slope, factor) - 1) < 0.2


def test_scattered_errors_average_out() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [
        total((0.4 * torch.rand(20, generator=generator) - 0.2).tolist(), 0.5)
        for _ in range(200)
    ]
    assert max(abs(ratio - 1) for ratio in found) < 0.05
    assert sum(abs(ratio - 1) for ratio in found) / len(found) < 0.01  # not .021


def test_a_pace_without_expectations_keeps_its_factor() -> None:
    pace = Pace("p", 1.5)
    assert pace.mean_factor() == 1.0  # nothing done
    for name, size in (("a", 300), ("b", 100)):
        assert pace.factor(name) == 1.5
        pace.spent(name, size)
    assert pace.mean_factor() == pytest.approx(1.5)
    assert pace.at(1.5) == pytest.approx({"a": 300, "b": 100})
    # slope ½ by default: a quarter of the step takes twice the bytes
    assert pace.at(1.5 / 4) == pytest.approx({"a": 600, "b": 200})


def test_the_mean_factor_is_that_of_the_bytes() -> None:
    pace = Pace("p", 2.0, {"a": 300.0, "b": 100.0}, target=400.0, slope=0.5)
    assert pace.factor("a") == pytest.approx(2)
    pace.spent("a", 302)
    assert pace.factor("b") == pytest.approx(2 * (100 / 98) ** 2)
    pace.spent("b", 98)
    logs = 302 * math.log(2) + 98 * math.log(2 * (100 / 98) ** 2)
    assert pace.mean_factor() == pytest.approx(math.exp(logs / 400))
    # Nothing left to spend, or nothing left to code: still a factor.
    pace = Pace("p", 2.0, {"a": 300.0}, target=0.0)
    assert pace.factor("a") == pytest.approx(2.2)
    pace.spent("a", 300)
    assert pace.factor("a") == pytest.approx(2 / 1.1)
