"""pack_mask and unpack_mask: one bit a weight."""

import numpy as np
import pytest
import torch

from fitcompress import ops


@pytest.mark.parametrize("shape", [(0,), (1,), (8,), (3, 3), (2, 3, 5), (1000,)])
def test_round_trip_and_order_of_bits(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = ops.pack_mask(mask)
    expected = np.packbits(mask.numpy().reshape(-1), bitorder="little")
    assert np.array_equal(packed.numpy(), expected)
    assert torch.equal(ops.unpack_mask(packed, shape), mask)


def test_any_type_and_layout():
    mask = torch.tensor([[0.5, 0.0, -1.0], [0.0, 0.0, 2.0]])
    assert ops.pack_mask(mask).tolist() == [0b100101]
    assert ops.pack_mask(mask.t()).tolist() == [0b110001]


def test_bad_arguments():
    with pytest.raises(
        ValueError, match=r"shape \[3, 3\] takes uint8 \[2\], got .*\[1\]"
    ):
        ops.unpack_mask(torch.zeros(1, dtype=torch.uint8), (3, 3))
