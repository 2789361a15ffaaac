"""error_feedback_sweep: quantization with the errors spread over later columns."""

import pytest
import torch

from fitcompress import ops, reference
from fitcompress.threads import threads


def example(rows, cols, masked=False):
    generator = torch.Generator().manual_seed(0)
    double = {"generator": generator, "dtype": torch.float64}
    weight = torch.randn(rows, cols, **double)
    # triangular with a dominant diagonal: no library whose last bits depend on threads
    factor = torch.randn(cols, cols, **double).triu(1) * 0.3
    factor += torch.diag(torch.rand(cols, **double) + 0.5)
    scale = torch.rand(rows, **double) * 0.3 + 0.1
    mask = torch.rand(rows, cols, generator=generator) < 0.7 if masked else None
    return weight, factor, scale, mask


# the kernel works on 32 rows and 64 columns at a time, in tiles of 4 rows
@pytest.mark.parametrize("max_code", [0, 3])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (1, 1), (3, 7), (33, 64), (5, 150), (38, 201)]
)
def test_equals_the_twin(shape, masked, max_code):
    arguments = (*example(*shape, masked=masked), max_code)
    codes = ops.error_feedback_sweep(*arguments)
    assert torch.equal(codes, reference.error_feedback_sweep(*arguments))


def test_by_hand():
    weight = torch.tensor([[1.4, 1.0, 1.0]], dtype=torch.float64)
    factor = torch.tensor(
        [[2.0, 1.0, -4.0], [0.0, 1.0, 3.0], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    # 1.4 → 1, e = 0.4 / 2 = 0.2: others 0.8 and 1.8; 0.8 → 1, e = −0.2: 1.8 + 0.6 → 2
    codes = ops.error_feedback_sweep(weight, factor, torch.ones(1).double())
    assert codes.tolist() == [[1, 1, 2]]


def test_identity_rounds_half_to_even():
    weight = torch.tensor([[0.5, 1.5, -2.5, 3.5, -0.5]], dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64)
    codes = ops.error_feedback_sweep(weight, eye, torch.ones(1).double())
    assert codes.tolist() == [[0, 2, -2, 4, 0]]
    codes = ops.error_feedback_sweep(weight, eye, torch.ones(1).double(), None, 2)
    assert codes.tolist() == [[0, 2, -2, 2, 0]]


def test_reduces_the_output_error():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 20, generator=generator, dtype=torch.float64)
    inputs += 2 * inputs[:, :1]  # correlated: there is something to compensate with
    weight = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    moments = inputs.T @ inputs / 200
    factor = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    step = torch.tensor([0.5], dtype=torch.float64)
    rounded = (weight / step).round() * step
    swept = ops.error_feedback_sweep(weight, factor, step) * step
    errors = [(inputs @ (weight - w).T).square().sum() for w in (rounded, swept)]
    assert errors[1] < 0.6 * errors[0]


def test_a_scale_that_is_not_positive_gives_zeros():
    weight, factor, scale, _ = example(3, 9)
    scale[1] = 0
    scale[2] = -1
    codes = ops.error_feedback_sweep(weight, factor, scale)
    assert codes[0].any()
    assert not codes[1:].any()


def test_arguments_are_not_changed():
    arguments = example(5, 70)
    copies = [None if x is None else x.clone() for x in arguments]
    ops.error_feedback_sweep(*arguments)
    for before, after in zip(copies, arguments, strict=True):
        assert before is after is None or torch.equal(before, after)


def test_uint8_mask_and_non_contiguous_tensors():
    weight, factor, scale, mask = example(6, 70, masked=True)
    expected = ops.error_feedback_sweep(weight, factor, scale, mask, 7)
    codes = ops.error_feedback_sweep(
        weight.t().contiguous().t(),
        factor.t().contiguous().t(),
        scale.repeat_interleave(2)[::2],
        mask.t().contiguous().t().to(torch.uint8) * 2,
        7,
    )
    assert torch.equal(codes, expected)


def test_same_codes_for_any_number_of_threads():
    codes = []
    for count in (1, 2):
        with threads(count):
            codes.append(ops.error_feedback_sweep(*example(41, 130)))
    assert torch.equal(*codes)


def test_opcheck():
    torch.library.opcheck(
        torch.ops.fitcompress.error_feedback_sweep.default,
        (*example(3, 5, masked=True), 7),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(5).double()}, r"\[rows, columns\], got \[5\]"),
        ({0: torch.zeros(3, 5)}, "weight must be float64, got float32"),
        ({1: torch.zeros(5, 5)}, "factor must be float64, got float32"),
        ({1: torch.zeros(5, 4).double()}, r"shape \[5, 5\], got \[5, 4\]"),
        ({2: torch.ones(2).double()}, "1 element or one a row, 3, got 2"),
        ({2: torch.ones(3)}, "scale must be float64, got float32"),
        ({3: torch.ones(5).bool()}, r"mask must have shape \[3, 5\], got \[5\]"),
        ({3: torch.ones(3, 5)}, "mask must be bool or uint8, got float32"),
        ({0: torch.full((3, 5), 1e10).double()}, "not a finite 32-bit integer"),
        ({0: torch.full((3, 5), torch.nan).double()}, "not a finite 32-bit integer"),
        ({1: torch.zeros(5, 5).double()}, "not a finite 32-bit integer"),
    ],
)
def test_bad_arguments(change, message):
    arguments = list(example(3, 5))
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=f"error_feedback_sweep: .*{message}"):
        ops.error_feedback_sweep(*arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (5, 150), (38, 201)])
def test_cuda_equals_cpu(shape, masked):
    arguments = (*example(*shape, masked=masked), 7)
    on_device = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
    codes = ops.error_feedback_sweep(*on_device).cpu()
    assert torch.equal(codes, ops.error_feedback_sweep(*arguments))
