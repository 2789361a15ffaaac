"""square_accumulate_: the Fisher diagonal of one layer."""

import pytest
import torch

from fitcompress import ops, reference
from fitcompress.threads import threads

# samples, positions, outputs, inputs; the kernel's blocks are 32 outputs, 128 inputs
# and 128 positions
SHAPES = [
    (1, 1, 1, 1),
    (3, 1, 5, 7),
    (2, 17, 33, 130),
    (4, 129, 4, 32),
    (2, 260, 70, 9),
    (0, 4, 3, 5),
    (3, 0, 3, 5),
    (3, 4, 0, 5),
    (3, 4, 3, 0),
]


def example(shape, dtype=torch.float32, moment_dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    samples, positions, outputs, inputs = shape
    moment = torch.rand(outputs, inputs, generator=generator, dtype=moment_dtype)
    output_grad = torch.randn(samples, positions, outputs, generator=generator)
    input = torch.randn(samples, positions, inputs, generator=generator)
    return moment, output_grad.to(dtype), input.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_twin(shape, dtype):
    moment, output_grad, input = example(shape, dtype)
    expected = moment.clone()
    ops.square_accumulate_(moment, output_grad, input)
    reference.square_accumulate_(expected, output_grad, input)
    torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-5)


def test_a_sample_of_one_position_by_hand():
    moment = torch.ones(1, 2)
    # gradients of the two samples: (2, 4) and (−9, 3); squares (4, 16) and (81, 9)
    ops.square_accumulate_(
        moment,
        torch.tensor([[[2.0]], [[3.0]]]),
        torch.tensor([[[1.0, 2.0]], [[-3.0, 1.0]]]),
    )
    assert moment.tolist() == [[86.0, 26.0]]


def test_positions_are_summed_before_squaring():
    moment = torch.zeros(1, 1, dtype=torch.float64)
    ops.square_accumulate_(moment, torch.ones(1, 4, 1), torch.ones(1, 4, 1))
    assert moment.item() == 16.0


def test_samples_are_summed_in_double():
    # 2^24 + 1 is no float32: the second sample would be lost
    output_grad = torch.tensor([4096.0, 1.0]).view(2, 1, 1)
    moment = torch.zeros(1, 1, dtype=torch.float64)
    ops.square_accumulate_(moment, output_grad, torch.ones(2, 1, 1))
    assert moment.item() == 2**24 + 1


def test_float32_moment():
    moment, output_grad, input = example((2, 17, 33, 130), moment_dtype=torch.float32)
    expected = moment.clone()
    ops.square_accumulate_(moment, output_grad, input)
    reference.square_accumulate_(expected, output_grad, input)
    torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-5)


def test_non_contiguous_tensors():
    moment, output_grad, input = example((2, 6, 5, 7))
    expected = moment.clone()
    ops.square_accumulate_(expected, output_grad, input)
    strided = moment.t().contiguous().t()
    ops.square_accumulate_(
        strided,
        output_grad.transpose(1, 2).contiguous().transpose(1, 2),
        input.repeat(1, 1, 2)[:, :, :7],
    )
    assert torch.equal(strided, expected)


def test_same_bits_for_any_number_of_threads():
    results = []
    for count in (1, 2):
        moment, output_grad, input = example((3, 40, 70, 300))
        with threads(count):
            ops.square_accumulate_(moment, output_grad, input)
        results.append(moment)
    assert torch.equal(*results)


def test_arguments_that_require_a_gradient_are_detached():
    moment, output_grad, input = example((2, 3, 4, 5))
    ops.square_accumulate_(moment, output_grad.requires_grad_(), input.requires_grad_())
    assert not moment.requires_grad


def test_opcheck():
    torch.library.opcheck(
        torch.ops.fitcompress.square_accumulate_.default, example((2, 3, 4, 5))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4, 4)}, r"moment must have shape \[4, 5\], got \[4, 4\]"),
        ({0: torch.zeros(4, 5, dtype=torch.int64)}, "float32 or float64, got int64"),
        ({1: torch.zeros(3, 4)}, r"\[samples, positions, outputs\], got \[3, 4\]"),
        ({2: torch.zeros(3, 5)}, r"\[samples, positions, inputs\], got \[3, 5\]"),
        ({2: torch.zeros(2, 4, 5)}, r"input must have shape \[2, 3, 5\]"),
        ({2: torch.zeros(2, 3, 5).half()}, "must be float32, got float16"),
        (
            {1: torch.zeros(2, 3, 4).double(), 2: torch.zeros(2, 3, 5).double()},
            "float32, bfloat16 or float16, got float64",
        ),
    ],
)
def test_bad_arguments(change, message):
    arguments = list(example((2, 3, 4, 5)))
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=f"square_accumulate_.*{message}"):
        ops.square_accumulate_(*arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_equals_cpu(shape, moment_dtype, dtype):
    arguments = example(shape, dtype, moment_dtype)
    on_device = [argument.cuda() for argument in arguments]
    ops.square_accumulate_(*arguments)
    ops.square_accumulate_(*on_device)
    torch.testing.assert_close(on_device[0].cpu(), arguments[0], rtol=1e-4, atol=1e-5)
