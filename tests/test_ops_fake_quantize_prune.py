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


@pytest.mark.parametrize("delta", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_gives_zeros(delta):
    weight = torch.randn(2, 9)
    scale = torch.tensor([delta, 1.0])
    assert not ops.fake_quantize_prune(weight, scale)[0].any()
    grads = backward(torch.ones(2, 9), weight, scale, None, 3)
    assert not grads[0][0].any()
    assert grads[1][0] == 0


def test_large_codes_are_exact():
    codes = torch.tensor([2.0**22 + 1, 2.0**23 - 1, 2.0**23 + 1, 2.0**24, -(2.0**30)])
    assert torch.equal(ops.fake_quantize_prune(codes, torch.ones(1)), codes)
    ties = torch.tensor([2.0**22 + 0.5, 2.0**22 + 1.5, -(2.0**22) - 0.5])
    assert torch.equal(ops.fake_quantize_prune(ties, torch.ones(1)), ties.round())


def test_zeros_have_no_sign():
    result = ops.fake_quantize_prune(torch.tensor([-0.0, -0.1]), torch.ones(1))
    assert result.signbit().tolist() == [False, False]


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


@pytest.mark.parametrize("max_code", [0, 2])
def test_autograd_uses_the_backward_op(max_code):
    weight, scale, mask = example((4, 9))
    weight.requires_grad_()
    scale.requires_grad_()
    grad = torch.randn(4, 9)
    ops.fake_quantize_prune(weight, scale, mask, max_code).backward(grad)
    expected = reference.fake_quantize_prune_backward(
        grad, weight.detach(), scale.detach(), mask, max_code
    )
    assert torch.equal(weight.grad, expected[0])
    torch.testing.assert_close(scale.grad, expected[1])


def test_scale_gradient_is_a_finite_difference():
    # d/dΔ of Δ·k at a fixed code is k, and STE adds −w/Δ: the clipped weights alone
    # have a derivative in the ordinary sense
    weight = torch.tensor([5.3, -8.1, 100.0])
    scale = torch.tensor([0.5], requires_grad=True)
    grad = torch.tensor([1.0, 2.0, 3.0])
    (ops.fake_quantize_prune(weight, scale, None, 3) * grad).sum().backward()
    with torch.no_grad():
        above, below = (
            (ops.fake_quantize_prune(weight, scale + e, None, 3) * grad).sum()
            for e in (0.125, -0.125)
        )
    assert scale.grad.item() == ((above - below) / 0.25).item()


def test_composition_of_torch_ops_has_the_same_gradient():
    weight, scale, _ = example((4, 9), masked=False)
    results = []
    for native in (True, False):
        w = weight.clone().requires_grad_()
        s = scale.clone().requires_grad_()
        if native:
            out = ops.fake_quantize_prune(w, s, None, 2)
        else:
            x = w / s[:, None]
            # identity inside the range that rounds to q, constant outside
            x = torch.where(x.detach().round().abs() <= 2, x, x.detach().sign() * 2)
            out = s[:, None] * (x + (x.round() - x).detach())
        out.square().sum().backward()
        results.append((out.detach(), w.grad, s.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


class Quantized(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(8, 6, generator=generator))
        self.scale = torch.nn.Parameter(torch.full((8,), 0.2))
        self.register_buffer("mask", ops.pack_mask(self.weight.abs() > 0.3))

    def forward(self, x):
        weight = ops.fake_quantize_prune(self.weight, self.scale, self.mask, 7)
        return torch.nn.functional.linear(x, weight).relu()


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_training_equals_eager(dynamic):
    torch.compiler.reset()
    weights = []
    for compiled in (True, False):
        model = Quantized()
        step = torch.compile(
            model,
            fullgraph=True,
            backend="aot_eager",
            dynamic=dynamic,
            disable=not compiled,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in range(3):
            x = torch.randn(
                5 + batch, 6, generator=torch.Generator().manual_seed(batch)
            )
            optimizer.zero_grad()
            step(x).square().mean().backward()
            optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(masked):
    weight, scale, mask = example((4, 5), masked=masked)
    forward = torch.ops.fitcompress.fake_quantize_prune.default
    arguments = (weight.requires_grad_(), scale.requires_grad_(), mask, 3)
    torch.library.opcheck(forward, arguments)
    torch.library.opcheck(
        backward.default,
        (torch.randn(4, 5), weight.detach(), scale.detach(), mask, 3),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4, 5).double()}, "weight must be float32, .* got float64"),
        ({1: torch.ones(3)}, "1 element or one a row, 4, got 3"),
        ({1: torch.ones(4).double()}, "scale must be float32, got float64"),
        ({2: torch.zeros(3, dtype=torch.bool)}, "mask must be uint8, got bool"),
        ({2: torch.zeros(20, dtype=torch.uint8)}, r"shape \[3\], got \[20\]"),
    ],
)
def test_bad_arguments(change, message):
    arguments = [*example((4, 5)), 3]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=f"fake_quantize_prune: .*{message}"):
        ops.fake_quantize_prune(*arguments)


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
