"""Weights on a grid, and off it again."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import fitcompress as fc
from fitcompress.quantize import WeightGrid, attach_grid, grid_of, row_scales

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def level(grid: fc.Grid, shape: tuple[int, ...] = (1,)) -> fc.Level:
    return fc.Level(grid, 0.0, shape)


@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(1, 2**20),
    st.booleans(),
)
def test_codes_come_back_exactly(seed, rows, columns, largest, per_row) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-largest, largest + 1, (rows, columns), generator=generator)
    scale = torch.rand(rows if per_row else 1, generator=generator) * 0.1 + 1e-6
    linear = nn.Linear(columns, rows, bias=False)
    attach_grid(linear, WeightGrid(scale), codes * scale.reshape(-1, 1))
    grid = grid_of(linear)
    assert torch.equal(grid.codes(linear.weight), codes.int())
    assert torch.equal(linear.weight.detach(), codes.float() * scale.reshape(-1, 1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_come_back_in_any_precision(dtype) -> None:
    # 16 bits hold 11 or 8 bits of a number: codes up to ±120 are told apart.
    codes = torch.arange(-120, 121).reshape(1, -1)
    scale = torch.tensor([0.013])
    linear = nn.Linear(241, 1, bias=False).to(dtype)
    attach_grid(linear, WeightGrid(scale), codes * scale)
    assert linear.weight.dtype == dtype
    assert torch.equal(grid_of(linear).codes(linear.weight), codes.int())


def test_a_scale_of_zero_makes_a_row_zero() -> None:
    linear = nn.Linear(3, 2, bias=False)
    attach_grid(linear, WeightGrid(torch.tensor([0.0, 0.5]), 3), torch.ones(2, 3))
    assert linear.weight.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert grid_of(linear).codes(linear.weight).tolist() == [[0, 0, 0], [2, 2, 2]]


def test_a_transposed_convolution_has_a_scale_for_every_output_channel() -> None:
    # Two groups of two inputs and one output channel, a kernel of two.
    weight = torch.tensor([[[2.0, 4]], [[6, 8]], [[1, 2]], [[3, 4]]])
    module = nn.ConvTranspose1d(4, 2, 2, groups=2, bias=False)
    mask = torch.tensor([[True, True, False, True], [True] * 4])
    grid = WeightGrid(torch.tensor([2.0, 1.0]), 3, mask)
    attach_grid(module, grid, weight)
    # Columns are inputs, then the kernel back to front: row 0 is 4 2 8 6.
    assert grid.codes(module.weight).tolist() == [[2, 1, 0, 3], [2, 1, 3, 3]]
    wanted = torch.tensor([[[2.0, 4]], [[6, 0]], [[1, 2]], [[3, 3]]])
    assert torch.equal(module.weight, wanted)
    other = nn.ConvTranspose1d(4, 2, 2, groups=2, bias=False)
    matrix = torch.tensor([[4.0, 2, 8, 6], [2, 1, 4, 3]])
    attach_grid(other, WeightGrid(grid.scale, 3, mask), matrix)
    assert torch.equal(other.weight, wanted)
    module.weight.sum().backward()
    # Straight through where neither mask nor range holds the weight.
    gradient = module.parametrizations.weight.original.grad
    assert gradient.tolist() == [[[1, 1]], [[1, 0]], [[1, 1]], [[1, 0]]]
    fc.remove(module)
    assert torch.equal(module.weight, wanted)


def test_masks_and_ranges_hold() -> None:
    mask = torch.tensor([[True, False, True]])
    linear = nn.Linear(3, 1, bias=False)
    grid = WeightGrid(torch.tensor([0.5]), 3, mask)
    attach_grid(linear, grid, torch.tensor([[9.0, 1.0, -9.0]]))
    assert linear.weight.tolist() == [[1.5, 0.0, -1.5]]
    assert "max_code=3, masked" in repr(linear)
    assert "max_code=∞" in repr(WeightGrid(torch.tensor([0.5])))


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_scales_in_16_bits_never_clip_a_weight_and_waste_little(bits, size) -> None:
    matrix = torch.randn(64, 9, generator=torch.Generator().manual_seed(bits)) * size
    matrix[5] = 0
    scale, q = row_scales(matrix, level(fc.Grid(bits=bits)))
    assert q == 2 ** (bits - 1) - 1
    assert (scale * q >= matrix.abs().amax(1) * (1 - 1e-7)).all()
    assert scale[5] == 0
    codes = (matrix / scale.reshape(-1, 1)).nan_to_num().round()
    assert codes.abs().max() <= q
    # All of them are stored in 16 bits, and at most one unit in the last place is lost.
    stored = [scale.to(t).float().equal(scale) for t in (torch.float16, torch.bfloat16)]
    assert any(stored)
    exact = matrix.abs().amax(1) / q
    rest = torch.arange(64) != 5
    assert (scale[rest] <= exact[rest] * (1 + 2**-7)).all()


def test_a_step_is_the_scale_itself() -> None:
    scale, q = row_scales(torch.ones(3, 3), level(fc.Grid(step=0.3)))
    assert (scale.tolist(), q) == ([pytest.approx(0.3)], 0)


def test_removing_leaves_identical_weights_and_outputs(small, images) -> None:
    before = {n: m.weight.clone() for n, m in small.named_modules() if grid_of(m)}
    out = small(images)
    assert set(before) == {"conv", "deep", "head", "out"}
    assert fc.remove(small) is small
    for name, weight in before.items():
        module = small.get_submodule(name)
        assert not parametrize.is_parametrized(module)
        assert isinstance(module.weight, nn.Parameter)
        assert torch.equal(module.weight, weight)
    assert torch.equal(small(images), out)
    fc.remove(small)  # again: nothing to do


def test_removing_keeps_parametrizations_of_others() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3)
    )
    attach_grid(model[1], WeightGrid(torch.tensor([0.1])), model[1].weight.detach())
    fc.remove(model)
    assert parametrize.is_parametrized(model[0], "weight")
    assert not parametrize.is_parametrized(model[1])
    assert grid_of(model[0]) is None


def test_copies_are_independent_and_carry_their_plan(small, images) -> None:
    out = small(images)
    other = copy.deepcopy(small)
    assert torch.equal(other(images), out)
    with torch.no_grad():
        other.head.parametrizations.weight.original.zero_()
        other.head.parametrizations.weight[0].scale.mul_(2)
    assert torch.equal(small(images), out)
    assert not other.head.weight.any()
    from fitcompress.quantize import plan_of

    assert plan_of(other) == plan_of(small)


def test_a_state_dict_carries_weights_and_grids(small, images) -> None:
    state = {k: v.clone() for k, v in small.state_dict().items()}
    other = copy.deepcopy(small)
    with torch.no_grad():
        for value in (*other.parameters(), *other.buffers()):
            value.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(images), small(images))


def test_weights_on_a_grid_can_be_trained(small, images) -> None:
    latent = small.head.parametrizations.weight.original
    small(images).square().mean().backward()
    assert latent.grad is not None
    assert latent.grad.abs().sum() > 0
    with torch.no_grad():
        latent -= 0.1 * latent.grad
    grid = grid_of(small.head)
    codes = grid.codes(small.head.weight)
    weight = codes.float() * grid.scale.reshape(-1, 1)
    assert torch.equal(small.head.weight.detach(), weight)
