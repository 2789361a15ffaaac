"""ghost_norms_: what only its way of computing can get wrong.

The rest is tested beside square_accumulate_, in test_ops_square_accumulate.py.
"""

import pytest
import torch

from fitcompress import ops, reference
from fitcompress.threads import threads


def example(samples, channels, outputs, places, kernel, stride, dilation, images=1):
    """Output gradients, inputs that are positive on average, and the rest."""
    generator = torch.Generator().manual_seed(0)
    space = [
        (p - 1) * s + d * (k - 1) + 1
        for p, k, s, d in zip(places, kernel, stride, dilation, strict=True)
    ]
    grads = torch.randn(samples * images, outputs, *places, generator=generator)
    input = torch.randn(samples * images, channels, *space, generator=generator) + 1
    options = {
        "kernel": kernel,
        "stride": stride,
        "dilation": dilation,
        "images": images,
    }
    return grads, input, options


ONE = (1, 1, 1)

CASES = {
    "places": example(2, 5, 6, (1, 1, 20), ONE, ONE, ONE),
    "plane": example(2, 20, 10, (1, 7, 7), (1, 3, 3), ONE, ONE),
    "phases": example(2, 20, 10, (1, 6, 9), (1, 3, 3), (1, 2, 2), ONE),
    "phases of a dilated kernel": example(
        2, 7, 10, (1, 6, 9), (1, 3, 4), (1, 3, 2), (1, 2, 3)
    ),
    "solid": example(2, 6, 5, (4, 5, 3), (3, 2, 3), (2, 1, 1), ONE),
    "images": example(2, 9, 5, (1, 5, 4), (1, 3, 3), ONE, ONE, images=3),
    # Cut into blocks of positions:
    "one sample": example(1, 40, 10, (1, 1, 700), ONE, ONE, ONE),
    "blocks": example(1, 4, 6, (1, 37, 41), (1, 3, 3), ONE, ONE),
    "blocks of phases": example(1, 4, 6, (1, 40, 31), (1, 3, 3), (1, 2, 2), ONE),
    "blocks of images": example(1, 4, 6, (1, 20, 20), (1, 3, 3), ONE, ONE, images=4),
    # Shifts too large for a block, in one dimension and two:
    "deep blocks": example(1, 3, 4, (3, 25, 25), (3, 2, 2), ONE, ONE),
    "dilated blocks": example(1, 3, 4, (1, 12, 120), (1, 3, 2), ONE, (1, 9, 1)),
}  # fmt: skip


def norms_of(grads, input, options):
    norms = torch.zeros(len(grads) // options["images"], dtype=torch.float64)
    ops.ghost_norms_(norms, grads, input, **options)
    return norms


def exact(grads, input, options):
    norms = torch.zeros(len(grads) // options["images"], dtype=torch.float64)
    reference.ghost_norms_(norms, grads, input, **options)
    return norms


def layouts(tensor):
    yield tensor
    yield tensor.to(memory_format=torch.channels_last_3d)
    yield torch.stack([tensor, tensor], -1)[..., 0]


@pytest.mark.parametrize("name", CASES)
def test_norms_are_as_good_as_float32(name):
    norms, wanted = norms_of(*CASES[name]), exact(*CASES[name])
    torch.testing.assert_close(norms, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_places_of_zeros_are_left_out(name):
    grads, input, options = CASES[name]
    input = input.clone()
    input[..., 0] = 0.0
    input[..., -1, 1:] = -0.0
    input[:1, :, 0, 0, :] = 0.0
    input[-1:, :, :, :, 2] = 0.0
    wanted = exact(grads, input, options)
    for x in layouts(input):
        norms = norms_of(grads, x, options)
        torch.testing.assert_close(norms, wanted, rtol=1e-6, atol=0)
    none = norms_of(grads, torch.zeros_like(input), options)
    assert none.tolist() == [0.0] * len(none)


@pytest.mark.parametrize("name", ["one sample", "blocks", "images", "phases"])
def test_same_bits_for_any_number_of_threads(name):
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(norms_of(*CASES[name]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [n for n in CASES if len(CASES[n][0]) > 1])
def test_only_the_sample_that_is_not_finite_shows_it(name, padded, bad):
    grads, input, options = (
        torch.cat([value] * 3) if isinstance(value, torch.Tensor) else value
        for value in CASES[name]
    )
    if padded:
        input[..., 0] = 0.0
    count = len(grads)
    samples = count // options["images"]
    # In the first sample, so that others find what it has left behind.
    for tensor in (grads, input):
        for index in ((0,) * 5, (0, *(size - 1 for size in tensor.shape[1:]))):
            if padded and tensor is input and index[4] == 0:
                continue
            before = tensor[index].item()
            tensor[index] = bad
            for layout in (lambda t: t, lambda t: t.mT.contiguous().mT):
                norms = norms_of(layout(grads), layout(input), options)
                assert torch.isfinite(norms).tolist() == [False] + [True] * (
                    samples - 1
                )
            tensor[index] = before


def test_what_is_not_finite_shows_beside_zeros():
    grads, input, options = CASES["plane"]
    grads = grads.clone()
    grads[0, 0, 0, 3, 3] = float("nan")
    assert torch.isfinite(norms_of(grads, 0 * input, options)).tolist() == [False, True]


def test_places_that_nothing_reads_do_not_matter():
    # A dilated kernel passes over the place between its offsets; strides skip some.
    grads, input, options = example(2, 3, 4, (1, 1, 1), (1, 2, 2), ONE, (1, 2, 2))
    wanted = norms_of(grads, input, options)
    input[:, :, :, 1] = float("nan")
    input[:, :, :, :, 1] = float("nan")
    assert torch.equal(norms_of(grads, input, options), wanted)
    grads, input, options = example(2, 3, 4, (1, 4, 4), (1, 2, 2), (1, 3, 3), ONE)
    wanted = norms_of(grads, input, options)
    input[:, :, :, 2::3] = float("nan")
    assert torch.equal(norms_of(grads, input, options), wanted)
