"""fake_quantize_prune: fused quantize-prune, forward and backward."""

import pytest
import torch

from fitcompress import ops, reference
from fitcompress.threads import threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 8192 elements are one piece of the kernel, 512 one block
SHAPES = [(), (1,), (0,), (0, 3), (3, 0), (7, 3), (5, 3, 3, 3), (2, 8195), (3, 517)]
backward = torch.ops.fitcompress.fake_quantize_prune_backward


def example(shape, dtype=torch.float32, per_row=True, masked=True):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    rows = shape[0] if per_row and shape else 1
    scale = torch.rand(rows, generator=generator) * 0.5 + 0.01
    mask = None
    if masked:
        mask = ops.pack_mask(torch.rand(shape, generator=generator) < 0.6)
    return weight, scale, mask


@pytest.mark.parametrize("max_code", [0, 1, 7])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_twin(shape, dtype, per_row, masked, max_code):
    arguments = (*example(shape, dtype, per_row, masked), max_code)
    result = ops.fake_quantize_prune(*arguments)
    assert result.dtype == dtype
    assert torch.equal(result, reference.fake_quantize_prune(*arguments))

    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = backward(grad, *arguments)
    expected = reference.fake_quantize_prune_backward(grad, *arguments)
    assert torch.equal(grads[0], expected[0])
    torch.testing.assert_close(grads[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize(("min_code", "max_code"), [(None, 0), (0, 15), (-3, 4)])
@pytest.mark.parametrize("group", [1, 8, 32, 60, 10_000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (0, 3), (7, 3), (3, 517), (2, 8195)], ids=str)
def test_groups_bounds_and_regrowth(shape, dtype, group, min_code, max_code, regrow):
    weight, _, mask = example(shape, dtype)
    rows = shape[0]
    groups = rows * -(-(weight.numel() // max(rows, 1)) // group)
    generator = torch.Generator().manual_seed(2)
    scale = torch.rand(groups, generator=generator) * 0.5 - 0.02  # some not positive
    grad = torch.randn(shape, generator=generator).to(dtype)
    options = {"min_code": min_code, "group": group, "regrow": regrow}
    result = ops.fake_quantize_prune(weight, scale, mask, max_code, **options)
    expected = reference.fake_quantize_prune(weight, scale, mask, max_code, **options)
    assert torch.equal(result, expected)
    grads = backward(grad, weight, scale, mask, max_code, *options.values())
    expected = reference.fake_quantize_prune_backward(
        grad, weight, scale, mask, max_code, **options
    )
    assert torch.equal(grads[0], expected[0])
    torch.testing.assert_close(grads[1], expected[1], rtol=1e-5, atol=1e-5)


def test_groups_by_hand():
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0])
    result = ops.fake_quantize_prune(weight, scale, None, 1, min_code=0, group=2)
    assert result.tolist() == [[1.0, 1.0, 2.0], [4.0, 4.0, 8.0]]
    grads = backward(torch.ones(2, 3), weight, scale, None, 1, 0, 2, False)
    # 3/2 and 6/8 round to 2 and 1, 4/4 and 5/4 to 1
    assert grads[0].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert grads[1].tolist() == [1.0, 1.0, 1 - 5 / 4, 1 - 6 / 8]


def test_regrowth_lets_masked_weights_come_back():
    weight, scale = torch.tensor([0.4, 2.6, 9.0]), torch.ones(1)
    mask = ops.pack_mask(torch.tensor([0, 1, 0]))
    grad = torch.tensor([5.0, 7.0, 11.0])
    kept = backward(grad, weight, scale, mask, 3, None, 0, False)
    back = backward(grad, weight, scale, mask, 3, None, 0, True)
    assert kept[0].tolist() == [0.0, 7.0, 0.0]
    assert back[0].tolist() == [5.0, 7.0, 0.0]  # the last one is clipped
    assert torch.equal(kept[1], back[1])
    assert not ops.fake_quantize_prune(weight, scale, mask, 3, regrow=True)[0]


def test_by_hand():
    weight = torch.tensor([[0.5, 1.5, -2.5, 9.0], [0.5, 1.5, -2.5, 9.0]])
    scale = torch.tensor([1.0, 2.0])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]])
    result = ops.fake_quantize_prune(weight, scale, ops.pack_mask(mask), 3)
    # codes, half to even: 0, 2, −2, 9 → 3; then w/Δ = 0.25, 0.75, −1.25, 4.5 → 3
    assert result.tolist() == [[0.0, 2.0, -2.0, 3.0], [0.0, 2.0, 0.0, 6.0]]
    grads = backward(torch.ones(2, 4), weight, scale, ops.pack_mask(mask), 3)
    assert grads[0].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    # −0.5 + 0.5 + 0.5 + 3 and −0.25 + 0.25 + 0 + 3
    assert grads[1].tolist() == [3.5, 3.0]


def test_the_largest_code_is_inside():
    # 7.4 rounds to 7 = q: inside; 7.6 rounds to 8: clipped
    grads = backward(torch.ones(2), torch.tensor([7.4, 7.6]), torch.ones(1), None, 7)
    assert grads[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("delta", [0.0, -1.0, -float("inf")])
def test_a_scale_that_is_not_positive_gives_zeros(delta):
    weight = torch.randn(2, 9)
    scale = torch.tensor([delta, 1.0])
    assert not ops.fake_quantize_prune(weight, scale)[0].any()
    grads = backward(torch.ones(2, 9), weight, scale, None, 3)
    assert not grads[0][0].any()
    assert grads[1][0] == 0


@pytest.mark.parametrize("max_code", [0, 3, 2**23])
def test_a_scale_that_is_no_number_is_not_hidden(max_code):
    weight = torch.randn(2, 70)
    mask = ops.pack_mask(torch.arange(140) % 5 > 0)
    scale = torch.tensor([float("nan"), 1.0])
    result = ops.fake_quantize_prune(weight, scale, mask, max_code)
    kept = ops.unpack_mask(mask, weight.shape)
    assert torch.equal(result[0].isnan(), kept[0])
    twin = reference.fake_quantize_prune(weight, scale, mask, max_code)
    assert torch.equal(result.nan_to_num(99), twin.nan_to_num(99))
    grads = backward(torch.ones(2, 70), weight, scale, mask, max_code)
    expected = reference.fake_quantize_prune_backward(
        torch.ones(2, 70), weight, scale, mask, max_code
    )
    assert torch.equal(grads[0], expected[0])
    torch.testing.assert_close(grads[1], expected[1], equal_nan=True)
    assert grads[1].isnan().tolist() == [True, False]


@pytest.mark.parametrize("group", [6, 10**9, 2**63 - 1])
def test_a_group_wider_than_the_row_is_the_row(group):
    weight, scale, mask = example((4, 5))
    rows = ops.fake_quantize_prune(weight, scale, mask, 3)
    assert torch.equal(
        ops.fake_quantize_prune(weight, scale, mask, 3, group=group), rows
    )
    grads = backward(weight, weight, scale, mask, 3, None, group)
    for ours, other in zip(
        grads, backward(weight, weight, scale, mask, 3), strict=True
    ):
        assert torch.equal(ours, other)


def test_large_codes_are_exact():
    codes = torch.tensor([2.0**22 + 1, 2.0**23 - 1, 2.0**23 + 1, 2.0**24, -(2.0**30)])
    assert torch.equal(ops.fake_quantize_prune(codes, torch.ones(1)), codes)
    ties = torch.tensor([2.0**22 + 0.5, 2.0**22 + 1.5, -(2.0**22) - 0.5])
    assert torch.equal(ops.fake_quantize_prune(ties, torch.ones(1)), ties.round())


def test_zeros_have_no_sign():
    result = ops.fake_quantize_prune(torch.tensor([-0.0, -0.1]), torch.ones(1))
    assert result.signbit().tolist() == [False, False]


def test_masked_nan_does_not_reach_the_scale():
    weight = torch.tensor([float("nan"), 1.2])
    mask = ops.pack_mask(torch.tensor([0, 1]))
    grads = backward(torch.ones(2), weight, torch.ones(1), mask, 3)
    assert grads[0].tolist() == [0.0, 1.0]
    torch.testing.assert_close(grads[1], torch.tensor([-0.2]))


def test_bounds_beyond_the_exact_integers():
    weight = torch.tensor([2.0**23 + 1, -(2.0**25), 0.5, 1.5, -3.7])
    for max_code in (2**22 - 1, 2**22, 2**23 + 1, 2**40):
        result = ops.fake_quantize_prune(weight, torch.ones(1), None, max_code)
        expected = weight.round().clamp(-float(max_code), float(max_code))
        assert torch.equal(result, expected)


def test_nan_and_infinity():
    weight = torch.tensor([float("nan"), float("inf"), float("-inf"), float("nan")])
    mask = ops.pack_mask(torch.tensor([1, 1, 1, 0]))
    result = ops.fake_quantize_prune(weight, torch.ones(1), mask, 3)
    assert result[0].isnan()
    assert result[1:].tolist() == [3.0, -3.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_float_survives(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[values.isfinite()]
    step = torch.tensor([2.0**-14])
    result = ops.fake_quantize_prune(values, step)
    assert torch.equal(result, reference.fake_quantize_prune(values, step))
    step = torch.tensor([1 / 3])  # results that need rounding
    result = ops.fake_quantize_prune(values, step)
    assert torch.equal(result, reference.fake_quantize_prune(values, step))


def test_non_contiguous_tensors():
    weight, scale, mask = example((6, 10))
    expected = ops.fake_quantize_prune(weight, scale, mask, 3)
    strided = weight.t().contiguous().t()
    result = ops.fake_quantize_prune(
        strided, scale.repeat_interleave(2)[::2], mask.repeat_interleave(3)[::3], 3
    )
    assert torch.equal(result, expected)
    assert result.is_contiguous()


def test_same_bits_for_any_number_of_threads():
    weight, scale, mask = example((3, 50_000))
    grads = []
    for scales in (scale, scale[:1]):
        for count in (1, 2):
            with threads(count):
                grads.append(backward(weight, weight, scales, mask, 3))
    assert torch.equal(grads[0][1], grads[1][1])
    assert torch.equal(grads[2][1], grads[3][1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4, 5).double()}, "weight must be float32, .* got float64"),
        ({1: torch.ones(3)}, "1 element or one a row, 4, got 3"),
        ({1: torch.ones(4).double()}, "scale must be float32, got float64"),
        ({2: torch.zeros(3, dtype=torch.bool)}, "mask must be uint8, got bool"),
        ({2: torch.zeros(20, dtype=torch.uint8)}, r"shape \[3\], got \[20\]"),
        ({1: torch.ones(4, device="meta")}, "one device, got cpu, meta"),
        ({4: 1}, "min_code must be at most 0, got 1"),
        ({3: 0, 4: -1}, "min_code needs a max_code above 0, got 0"),
        ({5: -1}, "group must be a number of columns, or 0 for the row, got -1"),
        ({5: 2}, "one for each 2 columns of a row, 12, got 4"),
    ],
)
def test_bad_arguments(change, message):
    arguments = [*example((4, 5)), 3, None, 0]
    for place, value in change.items():
        arguments[place] = value
    *arguments, min_code, group = arguments
    with pytest.raises(ValueError, match=f"fake_quantize_prune: .*{message}"):
        ops.fake_quantize_prune(*arguments, min_code=min_code, group=group)


@pytest.mark.cuda
@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize("group", [1, 8, 60])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 3), (3, 517), (3, 2048), (2, 8195)], ids=str)
def test_cuda_groups_equal_cpu(shape, dtype, group, regrow):
    weight, _, mask = example(shape, dtype)
    generator = torch.Generator().manual_seed(2)
    scale = torch.rand(shape[0] * -(-shape[1] // group), generator=generator)
    options = (15, 0, group, regrow)
    arguments = (weight, scale, mask)
    on_device = [x.cuda() for x in arguments]
    forward = torch.ops.fitcompress.fake_quantize_prune
    expected = forward(*arguments, *options)
    assert torch.equal(forward(*on_device, *options).cpu(), expected)
    grads = backward(on_device[0], *on_device, *options)
    expected = backward(weight, *arguments, *options)
    assert torch.equal(grads[0].cpu(), expected[0])
    torch.testing.assert_close(grads[1].cpu(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_equals_cpu(shape, dtype, per_row, masked):
    weight, scale, mask = example(shape, dtype, per_row, masked)
    on_device = [None if x is None else x.cuda() for x in (weight, scale, mask)]
    expected = ops.fake_quantize_prune(weight, scale, mask, 7)
    assert torch.equal(ops.fake_quantize_prune(*on_device, 7).cpu(), expected)
    grads = backward(on_device[0], *on_device, 7)
    expected = backward(weight, weight, scale, mask, 7)
    assert torch.equal(grads[0].cpu(), expected[0])
    torch.testing.assert_close(grads[1].cpu(), expected[1], rtol=1e-5, atol=1e-5)
