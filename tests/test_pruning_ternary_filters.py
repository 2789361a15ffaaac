"""PruningTernary: ternary filters and masks that hold."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fitcompress as fc
from fitcompress.methods.pruning_ternary.schedule import ZeroSchedule, next_mask
from fitcompress.methods.pruning_ternary.ternary import (
    TernaryWeight,
    alignment,
    ternary_codes,
    unit_codes,
    unit_rows,
)
from fitcompress.model import MatrixView
from fitcompress.quantize import WeightGrid, attach_grid, attach_plan
from fitcompress.search.plan import Level, Plan
from fitcompress.storage.save_load import layer_bytes


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The weight


def test_a_filter_of_two_weights_by_hand() -> None:
    """U = (.6, .8), only .8 is kept, so ŵ = 2·(0, 1).

    The gradient (a, b) of ŵ is 2·(a, b) at u, and (I − uuᵀ)·2·(a, b)/5 at w:
    (I − uuᵀ) = ((.64, −.48), (−.48, .36)), so (1, 0) gives (.256, −.192).
    """
    held = TernaryWeight(
        torch.tensor([2.0]), torch.tensor([[False, True]]), MatrixView()
    )
    w = torch.tensor([[3.0, 4.0]], requires_grad=True)
    out = held(w)
    assert out.tolist() == [[0.0, 2.0]]
    out.backward(torch.tensor([[1.0, 0.0]]))
    assert w.grad is not None
    assert torch.allclose(w.grad, torch.tensor([[0.256, -0.192]]))


def test_the_gradient_is_that_of_the_unit_filters() -> None:
    """Straight through from t/‖t‖ to u: finite differences of Σ c ∘ s·u(w)."""
    w, c = normal(3, 6).double(), normal(3, 6, seed=1).double()
    scale = torch.tensor([0.5, 1.0, 2.0])
    mask, _ = next_mask(unit_rows(w).abs(), None, 0.5, 0.0)
    held = TernaryWeight(scale, mask, MatrixView())
    latent = w.clone().requires_grad_()
    (held(latent) * c).sum().backward()

    def surrogate(rows: torch.Tensor) -> float:
        return float((c * scale[:, None] * rows / rows.norm(dim=1, keepdim=True)).sum())

    step, wanted = 1e-6, torch.empty_like(w)
    for i in range(3):
        for j in range(6):
            move = torch.zeros_like(w)
            move[i, j] = step
            wanted[i, j] = (surrogate(w + move) - surrogate(w - move)) / (2 * step)
    assert latent.grad is not None
    assert torch.allclose(latent.grad, wanted, atol=1e-8)
    assert bool((latent.grad[~mask] != 0).all())  # masked weights learn as well


def test_a_frozen_filter_gets_no_gradient() -> None:
    held = TernaryWeight(
        torch.ones(2), torch.ones(2, 4, dtype=torch.bool), MatrixView()
    )
    w = normal(2, 4).requires_grad_()
    moving = held(w)
    held.frozen = True
    frozen = held(w)
    assert torch.equal(moving, frozen)
    assert moving.requires_grad
    assert not frozen.requires_grad


def test_filters_have_their_length_and_ternary_directions() -> None:
    conv = nn.Conv2d(4, 6, 3)
    view = MatrixView.of(conv)
    rows = view.matrix_of(conv.weight.detach())
    scale = torch.linspace(0.1, 3, 6)
    mask, _ = next_mask(unit_rows(rows).abs(), None, 0.7, 0.0)
    weight = view.matrix_of(TernaryWeight(scale, mask, view)(conv.weight).detach())
    assert torch.allclose(weight.norm(dim=1), scale)
    codes = ternary_codes(rows, mask)
    assert set(codes.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert torch.equal(weight.sign(), codes)


def test_the_cosine_is_the_definition() -> None:
    rows = normal(5, 40)
    mask, _ = next_mask(unit_rows(rows).abs(), None, 0.6, 0.0)
    codes = ternary_codes(rows, mask)
    wanted = F.cosine_similarity(rows, codes)
    assert torch.allclose(alignment(rows, mask), wanted, atol=1e-6)
    same = torch.where(mask, codes, torch.zeros_like(rows))
    assert torch.allclose(alignment(same, mask), torch.ones(5))


def test_filters_without_weights_are_safe() -> None:
    """One latent filter is zero; another loses all its weights to the mask."""
    w = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, -3.0]], requires_grad=True)
    mask = torch.tensor([[False, False], [False, False], [True, True]])
    out = TernaryWeight(torch.tensor([0.0, 1.0, 1.0]), mask, MatrixView())(w)
    assert out[:2].abs().sum() == 0
    assert torch.allclose(out[2], torch.tensor([1.0, -1.0]) / math.sqrt(2))
    out.backward(normal(3, 2))
    assert w.grad is not None
    assert bool(w.grad.isfinite().all())
    assert bool((w.grad[0] == 0).all())
    assert bool((w.grad[1] != 0).any())  # can come back
    assert alignment(w, mask)[:2].tolist() == [0.0, 0.0]
    assert unit_codes(torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]


# The schedule


def test_zeros_rise_to_their_target_and_stay() -> None:
    schedule = ZeroSchedule(zeros=0.9, steps=100, ramp=0.6, frozen=0.2)
    shares = [schedule.zeros_at(k) for k in range(100)]
    assert shares[0] == pytest.approx(0.46)
    assert all(b >= a for a, b in pairwise(shares))
    assert shares[30] == pytest.approx(0.46 + 0.44 * (1 - 0.5**3))
    assert shares[60:] == [0.9] * 40
    assert schedule.freeze_step == 80
    masks = [k for k in range(100) if schedule.has_new_mask(k)]
    assert masks == [*range(0, 80, 10), 80]
    assert [schedule.is_frozen(k) for k in (79, 80)] == [False, True]


@pytest.mark.parametrize("ramp", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("frozen", [0.0, 0.15, 0.9])
@pytest.mark.parametrize("steps", [1, 3, 37])
def test_the_last_mask_has_the_target(ramp, frozen, steps) -> None:
    schedule = ZeroSchedule(zeros=0.9, steps=steps, ramp=ramp, frozen=frozen)
    last = max(k for k in range(steps) if schedule.has_new_mask(k))
    assert schedule.zeros_at(last) == 0.9


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.85])
def test_a_mask_has_its_share(zeros) -> None:
    size = normal(30, 50).abs()
    mask, delta = next_mask(size, None, zeros, 0.0)
    assert int((~mask).sum()) == round(zeros * 1500)
    assert torch.equal(mask, size > delta)


def test_noise_within_the_band_changes_no_mask() -> None:
    """Factors below √(1 + h) cannot bring a weight over a gap of 1 + h."""
    size, h = normal(40, 60).abs(), 0.2
    mask, _ = next_mask(size, None, 0.85, h)
    for seed in range(10):
        noise = torch.rand(40, 60, generator=torch.Generator().manual_seed(seed))
        factor = (1 + h) ** ((noise - 0.5) * 0.99)
        again, _ = next_mask(size * factor, mask, 0.85, h)
        assert torch.equal(again, mask)
        without, _ = next_mask(size * factor, mask, 0.85, 0.0)
        assert not torch.equal(without, mask)


def test_a_weight_comes_back_when_clearly_above() -> None:
    size = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    mask, _ = next_mask(size, None, 0.5, 0.5)
    assert mask.tolist() == [[False, False, True, True]]
    near, _ = next_mask(torch.tensor([[1.0, 4.4, 3.0, 4.0]]), mask, 0.5, 0.5)
    assert torch.equal(near, mask)  # 4.4 / 1.5 < 3
    far, _ = next_mask(torch.tensor([[1.0, 4.6, 3.0, 4.0]]), mask, 0.5, 0.5)
    assert far.tolist() == [[False, True, False, True]]


def test_zeros_are_never_kept() -> None:
    mask, delta = next_mask(torch.zeros(3, 4), None, 0.0, 0.1)
    assert not mask.any()
    assert delta == 0


# The file


def test_bits_per_weight_in_the_file_are_the_entropy() -> None:
    """88 % zeros and symmetric signs: h(.12) + .12 = .649 bit per weight."""
    p, rows, columns = 0.88, 256, 4096
    layer = nn.Linear(columns, rows, bias=False)
    codes = normal(rows, columns).sign()
    codes *= torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) > p
    scale = torch.full((rows,), 0.5)
    grid = WeightGrid(scale, 1, codes != 0)
    attach_grid(layer, grid, codes * 0.5)
    net = nn.Sequential(layer)
    level = Level(fc.Grid(bits=2), p, (rows, columns))
    attach_plan(net, Plan({"0": level}))
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p) + (1 - p)
    assert entropy == pytest.approx(0.649, abs=1e-3)
    bits = 8 * layer_bytes(net)["0"] / (rows * columns)
    assert bits == pytest.approx(entropy, rel=0.01)
