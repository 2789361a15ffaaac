"""magnitude_histogram: counts of weights by the leading bits of |w|."""

import math

import pytest
import torch

from fitcompress import ops, reference
from fitcompress.threads import threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (0, 3), (7, 5), (3, 1025), (2, 3, 5, 7), (1500, 1500)]


def example(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_twin(shape, dtype):
    weight = example(shape, dtype)
    counts = ops.magnitude_histogram(weight)
    assert torch.equal(counts, reference.magnitude_histogram(weight))
    assert int(counts.sum()) == weight.numel()


def test_by_hand():
    weight = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0078125, 2.0, 1e-45, 3.0e38])
    counts = ops.magnitude_histogram(weight)
    bins = {0: 3, 0x3F80: 2, 0x3F81: 1, 0x4000: 1, 0x7F61: 1}
    assert {int(k): int(counts[k]) for k in counts.nonzero()} == bins


def test_many_equal_weights():
    weight = torch.full((3_000_001,), 0.25)
    assert int(ops.magnitude_histogram(weight).max()) == 3_000_001


def test_non_contiguous_tensors():
    weight = example((40, 50))
    expected = ops.magnitude_histogram(weight)
    assert torch.equal(ops.magnitude_histogram(weight.t()), expected)
    spread = torch.stack([weight, torch.zeros_like(weight)], 2)[..., 0]
    assert torch.equal(ops.magnitude_histogram(spread), expected)


def test_same_counts_for_any_number_of_threads():
    weight = example((3000, 1500))
    found = []
    for count in (1, 2):
        with threads(count):
            found.append(ops.magnitude_histogram(weight))
    assert torch.equal(*found)


def test_meta_tensors_have_a_shape():
    counts = ops.magnitude_histogram(torch.ones(3, device="meta"))
    assert counts.shape == (ops.MAGNITUDE_BINS,)
    assert counts.is_meta


def test_opcheck():
    torch.library.opcheck(
        torch.ops.fitcompress.magnitude_histogram.default, (example((3, 4)),)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value):
    with pytest.raises(ValueError, match="1 values that are not finite"):
        ops.magnitude_histogram(torch.tensor([1.0, value]))


def test_another_type():
    with pytest.raises(ValueError, match="bfloat16 or float16, got float64"):
        ops.magnitude_histogram(torch.ones(3).double())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_equals_cpu(shape, dtype):
    weight = example(shape, dtype)
    counts = ops.magnitude_histogram(weight.cuda()).cpu()
    assert torch.equal(counts, ops.magnitude_histogram(weight))
