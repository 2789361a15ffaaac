"""winograd_norms_: squared norms of per-sample gradients of 3×3 convolutions."""

import pytest
import torch

from fitcompress import ops, reference
from fitcompress.threads import threads

KERNEL = (1, 3, 3)


def example(samples, channels, outputs, height, width, images=1, seed=0):
    """Output gradients and inputs."""
    generator = torch.Generator().manual_seed(seed)
    count = samples * images
    grads = torch.randn(count, outputs, 1, height, width, generator=generator)
    input = torch.randn(count, channels, 1, height + 2, width + 2, generator=generator)
    return grads, input, images


CASES = {
    "one": example(1, 1, 1, 1, 1),
    "one place": example(3, 17, 16, 1, 1),
    "one tile": example(2, 16, 16, 4, 4),
    "less than a tile": example(2, 3, 17, 3, 2),
    "a little more": example(2, 17, 3, 5, 6),
    "tails": example(2, 33, 16, 9, 11),
    "few samples": example(1, 33, 130, 7, 10),
    "several blocks": example(2, 130, 64, 8, 8),
    "many outputs": example(1, 5, 600, 5, 4),
    "one output": example(2, 64, 1, 8, 9),
    "segments": example(2, 33, 40, 41, 38),
    "a row": example(1, 3, 5, 1, 301),
    "a column": example(1, 5, 3, 302, 1),
    "images": example(3, 16, 17, 5, 6, images=4),
    "images in segments": example(2, 20, 33, 18, 47, images=2),
    "no sample": example(0, 4, 3, 5, 5),
    "no place": example(2, 4, 3, 0, 5),
    "no output": example(2, 4, 0, 5, 5),
    "no input": example(2, 0, 3, 5, 5),
}


def norms_of(case):
    grads, _, images = case
    return torch.linspace(0, 1, len(grads) // images, dtype=torch.float64)


def twin(case, scale=1.0):
    grads, input, images = case
    norms = norms_of(case)
    options = {"kernel": KERNEL, "images": images, "scale": scale}
    reference.winograd_norms_(norms, grads, input, **options)
    return norms


def run(case, scale=1.0):
    grads, input, images = case
    norms = norms_of(case)
    ops.winograd_norms_(norms, grads, input, images=images, scale=scale)
    return norms


def assert_near(norms, wanted):
    torch.testing.assert_close(norms, wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_twin(name):
    assert_near(run(CASES[name], 0.25), twin(CASES[name], 0.25))


def test_by_hand():
    # One place: the gradient is that of the output times the nine inputs.
    norms = torch.ones(1, dtype=torch.float64)
    grads = torch.full((1, 1, 1, 1, 1), 2.0)
    input = torch.arange(9.0).view(1, 1, 1, 3, 3)
    ops.winograd_norms_(norms, grads, input, scale=0.5)
    assert norms.tolist() == [1 + 0.5 * 4 * 204]


def test_exact_for_small_integers():
    generator = torch.Generator().manual_seed(0)
    grads = torch.randint(-1, 2, (2, 5, 1, 6, 7), generator=generator).float()
    input = torch.randint(-1, 2, (2, 18, 1, 8, 9), generator=generator).float()
    case = (grads, input, 1)
    torch.testing.assert_close(run(case), twin(case), rtol=1e-14, atol=0)


def test_inputs_after_a_rectifier_and_gradients_that_cancel():
    # What networks have: G is small against the sum of the magnitudes of its terms.
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 32, 1, 34, 34, generator=generator)
    input = torch.nn.functional.avg_pool3d(input, (1, 3, 3), 1, (0, 1, 1)) + 1
    input = torch.nn.functional.pad(input.relu()[..., 1:-1, 1:-1], (1, 1, 1, 1))
    grads = torch.randn(2, 32, 1, 32, 32, generator=generator)
    grads -= grads.mean((3, 4), keepdim=True)
    case = (grads, input, 1)
    torch.testing.assert_close(run(case), twin(case), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tails", "segments", "images", "no place"])
def test_half_precision(name, dtype):
    grads, input, images = CASES[name]
    case = (grads.to(dtype), input.to(dtype), images)
    assert_near(run(case), twin(case))


def layouts(tensor):
    """The same values with other strides."""
    yield tensor.to(memory_format=torch.channels_last_3d)
    yield tensor.transpose(1, 4).contiguous().transpose(1, 4)
    yield tensor.transpose(3, 4).contiguous().transpose(3, 4)
    yield tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.stack([tensor, tensor], -1)[..., 0]


@pytest.mark.parametrize("name", ["tails", "segments", "images"])
def test_any_strides(name):
    grads, input, images = CASES[name]
    wanted = twin(CASES[name])
    for e in layouts(grads):
        for x in layouts(input):
            assert_near(run((e, x, images)), wanted)


def test_expanded_gradients():
    # Of a mean over places: one number, stride 0.
    grads = torch.randn(2, 16, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    case = (grads.expand(2, 16, 1, 9, 11), CASES["tails"][1], 1)
    assert_near(run(case), twin(case))


def test_input_larger_than_needed():
    # What no window sees does not count, be it not finite.
    grads, input, _ = CASES["tails"]
    larger = torch.nn.functional.pad(input, (0, 2, 0, 3), value=float("nan"))
    assert torch.equal(run((grads, larger, 1)), run(CASES["tails"]))


def test_strided_norms():
    grads, input, _ = CASES["tails"]
    norms = norms_of(CASES["tails"])
    apart = torch.stack([norms, norms], 1)[:, 0]
    ops.winograd_norms_(apart, grads, input)
    assert torch.equal(apart, run(CASES["tails"]))


@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_any_number_of_threads(name):
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(CASES[name]))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_shows(bad, which):
    case = example(3, 5, 6, 9, 10)
    case[which][1, 2, 0, 8, 9] = bad
    assert torch.isfinite(run(case)).tolist() == [True, False, True]


def test_arguments_that_require_a_gradient_are_detached():
    grads, input, _ = CASES["tails"]
    norms = norms_of(CASES["tails"])
    ops.winograd_norms_(
        norms, grads.clone().requires_grad_(), input.clone().requires_grad_()
    )
    assert not norms.requires_grad


def test_opcheck():
    grads, input, images = CASES["images"]
    ones = [1, 1, 1]
    torch.library.opcheck(
        torch.ops.fitcompress.winograd_norms_.default,
        (norms_of(CASES["images"]), grads, input, [1, 3, 3], ones, ones, 1, images),
    )


BAD = [
    ({"norms": torch.zeros(2)}, "norms must be float64, got float32"),
    ({"norms": torch.zeros(4).double()}, r"norms must have shape \[2\], got \[4\]"),
    ({"output_grad": torch.zeros(2, 6, 4)}, r"width\], got \[2, 6, 4\]"),
    ({"input": torch.zeros(1, 33, 1, 11, 13)}, "same number of images"),
    ({"input": torch.zeros(2, 33, 1, 11, 12)}, "11 places must fit .* got size 12"),
    ({"input": torch.zeros(2, 33, 1, 11, 13).half()}, "must be float32, got float16"),
    ({"kernel": (1, 3)}, r"kernel must be three numbers of at least 1, got \[1, 3\]"),
    ({"kernel": (1, 1, 3)}, r"kernel must be \[1, 3, 3\],.* got \[1, 1, 3\]"),
    ({"stride": (1, 1, 2), "output_grad": torch.zeros(2, 16, 1, 9, 6)}, "stride"),
    ({"dilation": (2, 1, 1)}, r"dilation \[1, 1, 1\], got .* and \[2, 1, 1\]"),
    (
        {
            "groups": 2,
            "input": torch.zeros(2, 32, 1, 11, 13),
        },
        "groups must be 1, got 2",
    ),
    (
        {
            "output_grad": torch.zeros(2, 16, 2, 9, 11),
            "input": torch.zeros(2, 33, 2, 11, 13),
        },
        "output_grad must have depth 1, got 2",
    ),
    ({"images": 3}, "a multiple of 3, got 2 and 2"),
    ({"input": torch.zeros(2, 33, 1, 11, 13, device="meta")}, "input must be on the"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change, message):
    grads, input, _ = CASES["tails"]
    norms = norms_of(CASES["tails"])
    arguments = {"norms": norms, "output_grad": grads, "input": input, **change}
    with pytest.raises(ValueError, match=f"winograd_norms_.*{message}"):
        ops.winograd_norms_(**arguments)
