"""Compensation: its statistics, what it buys, budgets, resuming, and repeatability."""

import copy
import logging

import pytest
import torch
from torch import nn

import fitcompress as fc
from fitcompress.compensate import attempts, one_layer
from fitcompress.compensate.masks import magnitude_mask
from fitcompress.data import Batches
from fitcompress.errors import BudgetExceededError
from fitcompress.model import compressible_layers
from fitcompress.quantize import grid_of, plan_of
from fitcompress.storage.save_load import packed_bytes
from fitcompress.train import divergence


def plan_for(
    model: nn.Module, grid: fc.Grid, sparsity: float = 0.0, **changes
) -> fc.Plan:
    layers = compressible_layers(model)
    levels = {x.name: fc.Level(grid, sparsity, x.shape) for x in layers}
    return fc.Plan(levels, **changes)


def test_masks_drop_the_smallest_ties_by_position() -> None:
    matrix = torch.tensor([[3.0, -1.0, 1.0], [2.0, 1.0, -4.0]])
    assert magnitude_mask(matrix, 0.0) is None
    assert magnitude_mask(matrix, 2 / 6).tolist() == [[1, 0, 0], [1, 1, 1]]
    assert magnitude_mask(matrix, 0.7).sum() == 2
    share = 5 / 7  # not a sum of powers of two: 4.999… of 7 are five
    assert int((~magnitude_mask(torch.randn(1, 7), share)).sum()) == 5


@pytest.mark.parametrize("grid", [fc.Grid(bits=3), fc.Grid(step=0.25)], ids=str)
def test_compensation_beats_rounding(net, images, grid) -> None:
    plan = plan_for(net, grid)
    held_out = [torch.flip(images, (3,))]
    rounded = fc.apply(net, plan, progress=False)
    compensated = fc.apply(net, plan, [images], progress=False)
    assert divergence(net, compensated, held_out) < 0.8 * divergence(
        net, rounded, held_out
    )


def test_weights_lie_on_the_levels_of_the_plan(net, images) -> None:
    levels = {
        "conv": fc.Level(fc.Grid(bits=4), 0.25, (8, 2, 3, 3)),
        "deep": fc.Level(fc.Grid(step=0.2), 0.0, (8, 1, 3, 3)),
        "head": fc.Level(fc.Grid(step=0.1), 0.5, (7, 72)),
        "out": fc.Level(fc.Grid(bits=8), 0.0, (5, 7)),
    }
    for calibrate in (None, [images]):
        small = fc.apply(net, fc.Plan(levels), calibrate, progress=False)
        assert not small.training
        for name, level in levels.items():
            module = small.get_submodule(name)
            weight, grid = module.weight.detach(), grid_of(module)
            codes = grid.codes(weight)
            on_grid = codes.float() * grid.scale.reshape(-1, 1)
            assert torch.equal(weight.flatten(1), on_grid)
            if level.grid.bits:
                assert codes.abs().max() <= 2 ** (level.grid.bits - 1) - 1
            else:
                assert grid.scale.tolist() == pytest.approx([level.grid.step])
            dropped = int(level.sparsity * weight.numel())
            assert int((weight == 0).sum()) >= dropped
            kept = magnitude_mask(net.get_submodule(name).weight, level.sparsity)
            if calibrate is None and kept is not None:
                assert not weight[~kept.reshape(weight.shape)].any()
        kept = plan_of(small).levels
        assert {n: x.sparsity for n, x in kept.items()} == {
            n: x.sparsity for n, x in levels.items()
        }


def test_the_model_is_left_alone(net, loader, sensitivity) -> None:
    net.train()
    before = copy.deepcopy(net.state_dict())
    plan = fc.search(sensitivity, fc.Budget(size=1200))
    small = fc.apply(net, plan, loader, progress=False)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in [*net.modules(), *small.modules()])
    assert grid_of(net.conv) is None


@pytest.mark.parametrize("size", [1000, 1100, 1250, 1400])
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_file_uses_its_budget_and_does_not_exceed_it(
    net, loader, sensitivity, size, calibrated
) -> None:
    plan = fc.search(sensitivity, fc.Budget(size=size))
    small = fc.apply(net, plan, loader if calibrated else None, progress=False)
    assert 0.98 * size <= len(packed_bytes(small)) <= size


def test_an_unbounded_plan_is_taken_as_it_is(net, loader, sensitivity) -> None:
    plan = fc.pareto(sensitivity)[10]
    small = fc.apply(net, plan, loader, progress=False)
    scales = {
        n: float(grid_of(m).scale) for n, m in small.named_modules() if grid_of(m)
    }
    assert scales == {
        n: pytest.approx(x.grid.step, rel=1e-6) for n, x in plan.levels.items()
    }


def test_budgets_that_no_file_can_meet(net, loader) -> None:
    for grid in (fc.Grid(bits=8), fc.Grid(step=0.1)):
        plan = plan_for(net, grid, limit_bytes=500)
        with pytest.raises(BudgetExceededError, match=r"wanted at most 500.*To fix it"):
            fc.apply(net, plan, loader, progress=False)


@pytest.mark.parametrize("calibrated", [True, False])
def test_fixed_point_scales_are_widened_to_meet_a_budget(
    net, loader, calibrated
) -> None:
    data = loader if calibrated else None
    usual = fc.apply(net, plan_for(net, fc.Grid(bits=5)), data, progress=False)
    size = len(packed_bytes(usual))
    plan = plan_for(net, fc.Grid(bits=5), limit_bytes=int(0.9 * size))
    small = fc.apply(net, plan, data, progress=False)
    assert 0.85 * size < len(packed_bytes(small)) <= 0.9 * size
    for before, after in zip(usual.modules(), small.modules(), strict=True):
        if grid_of(before) is not None:
            assert (grid_of(after).scale >= 0.99 * grid_of(before).scale).all()
            assert grid_of(after).max_code == 15
    strict = fc.Compensation(widen=False)
    with pytest.raises(BudgetExceededError):
        fc.apply(net, plan, data, compensation=strict, progress=False)
    # One that is met needs no other scales.
    loose = plan_for(net, fc.Grid(bits=5), limit_bytes=size + 8)
    same = fc.apply(net, loose, data, progress=False)
    assert torch.equal(same.head.weight, usual.head.weight)


def test_a_generous_budget_is_met(net, loader, sensitivity) -> None:
    plan = fc.search(sensitivity, fc.Budget(size="500%"))
    small = fc.apply(net, plan, loader, progress=False)
    assert divergence(net, small, loader) < 1e-4


def test_one_call_does_it_all(net, loader, images) -> None:
    for options in ({}, {"family": "bits"}, {"method": fc.methods.PathSearch()}):
        small = fc.compress(
            net, loader, fc.Budget(size=1600), progress=False, **options
        )
        assert len(packed_bytes(small)) <= 1600
        assert divergence(net, small, loader) < 0.1


def test_tight_fixed_point_budgets_are_searched_again(net, loader) -> None:
    # The coder needs more than the entropy for so few weights: first plans are over.
    for size in (1150, 1300, 1450):
        budget = fc.Budget(size=size)
        small = fc.compress(net, loader, budget, family="bits", progress=False)
        assert len(packed_bytes(small)) <= size


def test_bit_operations_bound_no_file(net, loader) -> None:
    small = fc.compress(net, loader, fc.Budget(bops="15%"), progress=False)
    plan = plan_of(small)
    assert plan.limit_bytes is None
    assert {x.grid.family for x in plan.levels.values()} == {"bits"}


def test_bytes_and_bit_operations_at_once(net, loader) -> None:
    budget = fc.Budget(size=1600, bops="20%")
    small = fc.compress(net, loader, budget, progress=False)
    plan = plan_of(small)
    assert plan.limit_bytes == 1600
    assert len(packed_bytes(small)) <= 1600
    assert {x.grid.family for x in plan.levels.values()} == {"bits"}


def test_a_compressed_model_can_be_compressed_further(net, loader) -> None:
    once = fc.compress(net, loader, fc.Budget(size=1400), progress=False)
    before = packed_bytes(once)
    twice = fc.compress(once, loader, fc.Budget(size=1000), progress=False)
    assert len(packed_bytes(twice)) <= 1000
    assert len(twice.conv.parametrizations.weight) == 1
    assert packed_bytes(once) == before


def correlated(samples: int, width: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(samples, width) @ torch.randn(width, width) / width**0.5


class Twice(nn.Module):
    """One layer at two places, windows folded into the batch, an input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(6, 6), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.first(x.reshape(-1, 6)).relu())
        return self.out(input=x.reshape(-1, 24))


def test_layers_that_run_twice_and_folded_batches() -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), correlated(400, 24)
    plan = plan_for(model, fc.Grid(bits=4))
    small = fc.apply(model, plan, [x], progress=False)
    rounded = fc.apply(model, plan, progress=False)

    @torch.no_grad()
    def error(other: nn.Module) -> float:
        return float((other(x) - model(x)).square().mean())

    assert error(small) < error(rounded)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("survived", [1, 3, 6, 9])
def test_killed_and_resumed_gives_the_identical_model(
    net, loader, sensitivity, tmp_path, monkeypatch, survived
) -> None:
    plan = fc.search(sensitivity, fc.Budget(size=1100))
    whole = packed_bytes(fc.apply(net, plan, loader, progress=False))
    monkeypatch.setattr(attempts, "SAVE_EVERY", -1.0)
    done, real = [], one_layer.quantize

    def killed(*args, **kwargs) -> torch.Tensor:
        if len(done) == survived:
            raise KilledError
        done.append(1)
        return real(*args, **kwargs)

    file = tmp_path / "partial"
    with monkeypatch.context() as patch:
        patch.setattr(one_layer, "quantize", killed)
        try:
            fc.apply(net, plan, loader, checkpoint=file, progress=False)
        except KilledError:
            assert file.exists()
    calls: list[str] = []

    def counted(*args, **kwargs) -> torch.Tensor:
        calls.append(kwargs["name"])
        return real(*args, **kwargs)

    monkeypatch.setattr(one_layer, "quantize", counted)
    resumed = fc.apply(net, plan, loader, checkpoint=file, progress=False)
    assert packed_bytes(resumed) == whole
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["plan", "weights", "data", "damage"])
def test_a_checkpoint_of_another_run_is_not_used(
    net, images, sensitivity, tmp_path, monkeypatch, caplog, change
) -> None:
    monkeypatch.setattr(attempts, "SAVE_EVERY", -1.0)
    plan = fc.search(sensitivity, fc.Budget(size=1100))
    file = tmp_path / "partial"
    with monkeypatch.context() as patch:
        patch.setattr(attempts.Attempts, "forget", lambda self: None)
        fc.apply(net, plan, [images], checkpoint=file, progress=False)
    if change == "plan":
        plan = fc.search(sensitivity, fc.Budget(size=1150))
    elif change == "weights":
        with torch.no_grad():
            net.conv.weight.mul_(1.01)
    elif change == "data":
        images = images.flip(0)[:90]
    else:
        file.write_bytes(file.read_bytes()[:-1])
    fresh = packed_bytes(fc.apply(net, plan, [images], progress=False))
    with caplog.at_level(logging.WARNING):
        again = fc.apply(net, plan, [images], checkpoint=file, progress=False)
    assert packed_bytes(again) == fresh
    assert "not used" in caplog.text
    assert not file.exists()


def run(net: nn.Module, images: torch.Tensor) -> bytes:
    batches = Batches(images, batch_size=32, shuffle=True, seed=4)
    small = fc.compress(net, batches, fc.Budget(size=1100), seed=4, progress=False)
    return packed_bytes(small)


def test_the_same_seed_gives_the_same_file_with_any_number_of_threads(
    net, images, one_thread
) -> None:
    single = run(net, images)
    assert run(net, images) == single
    torch.set_num_threads(2)
    assert run(net, images) == single
