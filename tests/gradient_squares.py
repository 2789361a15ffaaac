"""Inputs of square_accumulate_ and ghost_norms_, and what is exact."""

import torch

from fitcompress import reference

ONES = (1, 1, 1)


def example(
    samples, channels, outputs, places, kernel=ONES, stride=ONES, dilation=ONES,
    groups=1, images=1, dtype=torch.float32, seed=0,
):  # fmt: skip
    """Output gradients, inputs and the rest of the arguments."""
    generator = torch.Generator().manual_seed(seed)
    space = [
        (p - 1) * s + d * (k - 1) + 1 if p else k
        for p, k, s, d in zip(places, kernel, stride, dilation, strict=True)
    ]
    grads = torch.randn(samples * images, outputs, *places, generator=generator)
    input = torch.randn(samples * images, channels, *space, generator=generator)
    options = {
        "kernel": kernel,
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "images": images,
    }
    return grads.to(dtype), input.to(dtype), options


CASES = {
    "one": example(1, 1, 1, (1, 1, 1)),
    "linear": example(3, 7, 5, (1, 1, 1)),
    "tokens": example(2, 130, 33, (1, 1, 17)),
    "many tokens": example(2, 70, 40, (1, 1, 600)),
    "wide": example(2, 300, 200, (1, 1, 20)),
    "conv1d": example(3, 5, 6, (1, 1, 30), (1, 1, 3)),
    "conv2d": example(2, 16, 16, (1, 9, 11), (1, 3, 3)),
    "stem": example(2, 3, 20, (1, 10, 12), (1, 7, 7), (1, 2, 2)),
    "strided": example(3, 20, 10, (1, 6, 5), (1, 3, 3), (1, 2, 2)),
    "pointwise": example(2, 18, 40, (1, 7, 7), ONES, (1, 2, 2)),
    "dilated": example(2, 9, 8, (1, 6, 6), (1, 3, 3), ONES, (1, 2, 3)),
    "strided and dilated": example(2, 4, 8, (1, 6, 6), (1, 3, 2), (1, 3, 2), (1, 2, 3)),
    "grouped": example(2, 12, 8, (1, 6, 7), (1, 3, 3), groups=4),
    "depthwise": example(2, 20, 20, (1, 9, 8), (1, 3, 3), groups=20),
    "depthwise strided": example(2, 17, 34, (1, 9, 8), (1, 5, 5), (1, 2, 2), groups=17),
    "conv3d": example(2, 4, 5, (3, 4, 5), (2, 3, 2), (1, 2, 1), (2, 1, 1)),
    "images": example(3, 6, 7, (1, 5, 5), (1, 3, 3), images=4),
    "images of tokens": example(2, 40, 20, (1, 1, 9), images=3),
    "large image": example(1, 16, 24, (1, 40, 40), (1, 3, 3)),
    "wide kernel": example(1, 17, 9, (1, 20, 20), (1, 5, 7)),
    # Tails of vectors and tiles:
    "15 to 7": example(2, 15, 7, (1, 5, 5), (1, 3, 3)),
    "16 to 8": example(2, 16, 8, (1, 4, 4), (1, 3, 3)),
    "17 to 9": example(2, 17, 9, (1, 6, 3), (1, 3, 3)),
    "33 to 12": example(2, 33, 12, (1, 5, 7), (1, 2, 2)),
    "31 tokens to 3": example(2, 31, 3, (1, 1, 5)),
    # More than one block of rows, of lanes, of places, of samples, and all of them:
    "many outputs": example(2, 16, 150, (1, 4, 5), (1, 3, 3)),
    "many channels": example(2, 90, 10, (1, 4, 5), (1, 3, 3)),
    "large stem": example(2, 3, 9, (1, 40, 37), (1, 7, 7), (1, 2, 2)),
    "long": example(2, 20, 12, (1, 1, 2500), (1, 1, 3)),
    "large depthwise": example(2, 18, 18, (1, 40, 41), (1, 3, 3), groups=18),
    "many samples": example(75, 16, 8, (1, 8, 8), (1, 3, 3)),
    "many samples of a stem": example(75, 3, 8, (1, 9, 9), (1, 3, 3)),
    "many samples depthwise": example(75, 17, 17, (1, 6, 6), (1, 3, 3), groups=17),
    "many small samples": example(75, 20, 9, (1, 1, 1)),
    "blocks": example(40, 70, 70, (1, 5, 5), (1, 3, 3), (1, 2, 2)),
    # Ways to unfold and to take groups side by side:
    "row of 9": example(2, 2, 5, (1, 5, 6), (1, 2, 9)),
    "row of 20": example(2, 2, 5, (1, 5, 6), (1, 2, 20)),
    "dilated row": example(2, 3, 5, (1, 5, 6), (1, 2, 3), ONES, (1, 1, 3)),
    "one channel": example(2, 1, 8, (1, 6, 6), (1, 3, 3)),
    "small groups": example(2, 36, 54, (1, 5, 6), (1, 3, 3), groups=18),
    "depthwise 7x7": example(2, 16, 16, (1, 6, 5), (1, 7, 7), groups=16),
    "depthwise pair": example(2, 16, 16, (1, 1, 5), (1, 1, 2), groups=16),
    "groups of tokens": example(2, 40, 80, (1, 1, 9), groups=20),
    "images of a stem": example(3, 3, 7, (1, 6, 6), (1, 3, 3), images=3),
    "images depthwise": example(2, 18, 18, (1, 6, 6), (1, 3, 3), groups=18, images=3),
    "large images": example(2, 16, 9, (1, 33, 33), (1, 3, 3), images=2),
    "many images": example(2, 40, 20, (1, 1, 9), images=200),
    "no sample": example(0, 4, 3, (1, 2, 2)),
    "no place": example(2, 4, 3, (1, 0, 2)),
    "no output": example(2, 4, 0, (1, 2, 2)),
    "no input": example(2, 0, 3, (1, 2, 2)),
}  # fmt: skip


def moment_of(case, dtype=torch.float64):
    grads, input, options = case
    width = input.shape[1] // options["groups"] * torch.tensor(options["kernel"]).prod()
    generator = torch.Generator().manual_seed(1)
    return torch.rand(grads.shape[1], int(width), generator=generator, dtype=dtype)


def norms_of(case):
    grads, _, options = case
    return torch.linspace(0, 1, len(grads) // options["images"], dtype=torch.float64)


def exact(case, scale=1.0):
    """The moment and the norms of the twin, in double precision."""
    grads, input, options = case
    moment, norms = moment_of(case), norms_of(case)
    reference.square_accumulate_(moment, norms, grads, input, **options, scale=scale)
    return moment, norms


def assert_near(moment, wanted):
    """Equal but for float32 products: an error of G is one of 2 G times it in G²."""
    mean = float(wanted.mean()) if wanted.numel() else 0.0
    torch.testing.assert_close(moment, wanted, rtol=2e-5, atol=5e-6 * mean)


def layouts(tensor):
    """The same values with other strides."""
    yield tensor.to(memory_format=torch.channels_last_3d)
    yield tensor.transpose(1, 4).contiguous().transpose(1, 4)
    yield tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.stack([tensor, tensor], -1)[..., 0]
    yield tensor.flip(4).flip(4)
