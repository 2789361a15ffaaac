"""square_accumulate_ and ghost_norms_: squares of per-sample weight gradients."""

import pytest
import torch

from fitcompress import ops, reference
from fitcompress.threads import threads

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


@pytest.mark.parametrize("name", CASES)
def test_square_accumulate_equals_the_twin(name):
    grads, input, options = CASES[name]
    moment, norms = moment_of(CASES[name]), norms_of(CASES[name])
    ops.square_accumulate_(moment, norms, grads, input, **options, scale=0.25)
    wanted, wanted_norms = exact(CASES[name], 0.25)
    assert_near(moment, wanted)
    torch.testing.assert_close(norms, wanted_norms, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_ghost_norms_equal_the_twin(name):
    grads, input, options = CASES[name]
    norms, twin = norms_of(CASES[name]), norms_of(CASES[name])
    ops.ghost_norms_(norms, grads, input, **options, scale=0.25)
    reference.ghost_norms_(twin, grads, input, **options, scale=0.25)
    torch.testing.assert_close(norms, exact(CASES[name], 0.25)[1], rtol=5e-6, atol=0)
    torch.testing.assert_close(norms, twin, rtol=5e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_moment_and_norms_alone_equal_both_together(name):
    grads, input, options = CASES[name]
    both, norms = moment_of(CASES[name]), norms_of(CASES[name])
    ops.square_accumulate_(both, norms, grads, input, **options)
    moment, alone = moment_of(CASES[name]), norms_of(CASES[name])
    ops.square_accumulate_(moment, None, grads, input, **options)
    ops.square_accumulate_(None, alone, grads, input, **options)
    ops.square_accumulate_(None, None, grads, input, **options)
    torch.testing.assert_close(moment, both, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alone, norms, rtol=1e-6, atol=0)


def test_by_hand():
    # Gradients of the two samples: (2, 4) and (−9, 3); squares (4, 16) and (81, 9).
    moment, norms = torch.ones(1, 2), torch.zeros(2, dtype=torch.float64)
    grads = torch.tensor([2.0, 3.0]).view(2, 1, 1, 1, 1)
    input = torch.tensor([[1.0, 2.0], [-3.0, 1.0]]).view(2, 2, 1, 1, 1)
    ops.square_accumulate_(moment, norms, grads, input)
    assert moment.tolist() == [[86.0, 26.0]]
    assert norms.tolist() == [20.0, 90.0]
    norms.zero_()
    ops.ghost_norms_(norms, grads, input)
    assert norms.tolist() == [20.0, 90.0]


def test_positions_are_summed_before_squaring():
    moment, norms = torch.zeros(1, 1), torch.zeros(1, dtype=torch.float64)
    ones = torch.ones(1, 1, 1, 1, 4)
    ops.square_accumulate_(moment, norms, ones, ones)
    assert moment.item() == norms.item() == 16.0
    norms.zero_()
    ops.ghost_norms_(norms, ones, ones)
    assert norms.item() == 16.0


def test_images_of_a_sample_are_summed_before_squaring():
    moment, norms = torch.zeros(1, 1), torch.zeros(2, dtype=torch.float64)
    ones = torch.ones(6, 1, 1, 1, 1)
    ops.square_accumulate_(moment, norms, ones, ones, images=3)
    assert moment.item() == 18.0
    assert norms.tolist() == [9.0, 9.0]


def test_many_samples_lose_no_small_ones():
    # In float32 the later ones would vanish beside the first: 2^25 + 1 = 2^25.
    grads = torch.ones(4096, 1, 1, 1, 1)
    grads[0] = 2.0**12.5
    moment = torch.zeros(1, 1, dtype=torch.float64)
    ops.square_accumulate_(moment, None, grads, torch.ones_like(grads))
    assert moment.item() == pytest.approx(2**25 + 4095, abs=40)


def test_float32_moment():
    case = CASES["conv2d"]
    moment = moment_of(case, torch.float32)
    expected = moment.clone()
    grads, input, options = case
    ops.square_accumulate_(moment, None, grads, input, **options)
    reference.square_accumulate_(expected, None, grads, input, **options)
    assert_near(moment, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tokens", "conv2d", "depthwise"])
def test_half_precision_is_widened(name, dtype):
    grads, input, options = CASES[name]
    grads, input = grads.to(dtype), input.to(dtype)
    case = (grads.float(), input.float(), options)
    moment, norms, ghosts = moment_of(case), norms_of(case), norms_of(case)
    ops.square_accumulate_(moment, norms, grads, input, **options)
    ops.ghost_norms_(ghosts, grads, input, **options)
    wanted, wanted_norms = exact(case)
    assert_near(moment, wanted)
    torch.testing.assert_close(norms, wanted_norms, rtol=5e-6, atol=0)
    torch.testing.assert_close(ghosts, wanted_norms, rtol=5e-6, atol=0)


def layouts(tensor):
    """The same values with other strides."""
    yield tensor.to(memory_format=torch.channels_last_3d)
    yield tensor.transpose(1, 4).contiguous().transpose(1, 4)
    yield tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.stack([tensor, tensor], -1)[..., 0]
    yield tensor.flip(4).flip(4)


@pytest.mark.parametrize(
    "name", ["tokens", "conv2d", "strided", "depthwise", "grouped", "conv3d"]
)
def test_any_strides(name):
    grads, input, options = CASES[name]
    wanted, wanted_norms = exact(CASES[name])
    for e in layouts(grads):
        for x in layouts(input):
            moment, norms = moment_of(CASES[name]), norms_of(CASES[name])
            ghosts = norms.clone()
            ops.square_accumulate_(moment, norms, e, x, **options)
            ops.ghost_norms_(ghosts, e, x, **options)
            assert_near(moment, wanted)
            torch.testing.assert_close(norms, wanted_norms, rtol=5e-6, atol=0)
            torch.testing.assert_close(ghosts, wanted_norms, rtol=5e-6, atol=0)


def test_expanded_gradients():
    # Of a mean over places: one number, stride 0.
    _, input, options = CASES["conv2d"]
    grads = torch.randn(2, 16, 1, 1, 1).expand(2, 16, 1, 9, 11)
    case = (grads.contiguous(), input, options)
    moment, norms, ghosts = moment_of(case), norms_of(case), norms_of(case)
    ops.square_accumulate_(moment, norms, grads, input, **options)
    ops.ghost_norms_(ghosts, grads, input, **options)
    wanted, wanted_norms = exact(case)
    assert_near(moment, wanted)
    torch.testing.assert_close(norms, wanted_norms, rtol=5e-6, atol=0)
    torch.testing.assert_close(ghosts, wanted_norms, rtol=5e-6, atol=0)


def test_strided_sums():
    grads, input, options = CASES["conv2d"]
    moment, norms = moment_of(CASES["conv2d"]), norms_of(CASES["conv2d"])
    strided = moment.t().contiguous().t()
    apart = torch.stack([norms, norms], 1)[:, 0]
    ops.square_accumulate_(moment, norms, grads, input, **options)
    ops.square_accumulate_(strided, apart, grads, input, **options)
    assert torch.equal(strided, moment)
    assert torch.equal(apart, norms)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_any_number_of_threads(name):
    grads, input, options = CASES[name]
    results = []
    for count in (1, 2, 3):
        moment, norms = moment_of(CASES[name]), norms_of(CASES[name])
        ghosts = norms.clone()
        with threads(count):
            ops.square_accumulate_(moment, norms, grads, input, **options)
            ops.ghost_norms_(ghosts, grads, input, **options)
        results.append((moment, norms, ghosts))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels", [5, 17])
def test_what_is_not_finite_shows(channels, bad):
    grads, input, options = example(3, channels, 6, (1, 4, 4), (1, 3, 3))
    grads[1, 2, 0, 1, 1] = bad
    moment = torch.zeros(6, channels * 9)
    norms = torch.zeros(3, dtype=torch.float64)
    ops.square_accumulate_(moment, norms, grads, input, **options)
    assert not torch.isfinite(moment[2]).any()
    assert torch.isfinite(moment[[0, 1, 3, 4, 5]]).all()
    assert torch.isfinite(norms).tolist() == [True, False, True]
    norms.zero_()
    ops.ghost_norms_(norms, grads, input, **options)
    assert torch.isfinite(norms).tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (17, 1), (34, 2), (17, 17)])
def test_an_input_that_is_not_finite_shows(channels, groups, bad):
    outputs = 10 * groups if groups < 17 else 17
    grads, input, options = example(
        3, channels, outputs, (1, 4, 4), (1, 3, 3), groups=groups
    )
    input[1, channels - 1, 0, 2, 2] = bad
    moment = torch.zeros(outputs, channels // groups * 9)
    norms = torch.zeros(3, dtype=torch.float64)
    ops.square_accumulate_(moment, norms, grads, input, **options)
    finite = torch.isfinite(moment).view(groups, -1, channels // groups, 9)
    assert not finite[-1, :, -1].any()
    finite[-1, :, -1] = True
    assert finite.all()
    assert torch.isfinite(norms).tolist() == [True, False, True]


def test_arguments_that_require_a_gradient_are_detached():
    grads, input, options = CASES["conv2d"]
    moment, norms = moment_of(CASES["conv2d"]), norms_of(CASES["conv2d"])
    ops.square_accumulate_(
        moment, norms, grads.clone().requires_grad_(), input.clone().requires_grad_(),
        **options,
    )  # fmt: skip
    assert not moment.requires_grad
    assert not norms.requires_grad


def test_opcheck():
    grads, input, options = CASES["conv1d"]
    arguments = (
        grads,
        input,
        *(list(options[k]) for k in ("kernel", "stride")),
        [1] * 3,
    )
    moment, norms = moment_of(CASES["conv1d"]), norms_of(CASES["conv1d"])
    torch.library.opcheck(
        torch.ops.fitcompress.square_accumulate_.default, (moment, norms, *arguments)
    )
    torch.library.opcheck(
        torch.ops.fitcompress.square_accumulate_.default, (None, norms, *arguments)
    )
    torch.library.opcheck(
        torch.ops.fitcompress.ghost_norms_.default, (norms, *arguments)
    )


BAD = [
    ({"moment": torch.zeros(6, 6)}, r"moment must have shape \[6, 15\], got \[6, 6\]"),
    ({"moment": torch.zeros(6, 15).long()}, "float32 or float64, got int64"),
    ({"norms": torch.zeros(3)}, "norms must be float64, got float32"),
    ({"norms": torch.zeros(4).double()}, r"norms must have shape \[3\], got \[4\]"),
    ({"output_grad": torch.zeros(3, 6, 4)}, r"width\], got \[3, 6, 4\]"),
    ({"input": torch.zeros(3, 5)}, r"width\], got \[3, 5\]"),
    ({"input": torch.zeros(2, 5, 1, 1, 32)}, "same number of images.* got 2 and 3"),
    (
        {"input": torch.zeros(3, 5, 1, 1, 31)},
        "30 places must fit .* got size 31 .*width",
    ),
    ({"input": torch.zeros(3, 5, 1, 1, 32).half()}, "must be float32, got float16"),
    ({"groups": 2}, "multiples of the groups, 2, got 5 and 6"),
    ({"groups": 0}, "at least 1, got 0 and 1"),
    ({"images": 2}, "a multiple of 2, got 3 and 3"),
    ({"kernel": (1, 3)}, r"kernel must be three numbers of at least 1, got \[1, 3\]"),
    ({"stride": (1, 1, 0)}, "stride must be three numbers"),
    ({"dilation": (1, 1, 2**62)}, "must fit into the padded input"),
    (
        {
            "output_grad": torch.zeros(3, 6, 1, 1, 30).double(),
            "input": torch.zeros(3, 5, 1, 1, 32).double(),
        },
        "float32, bfloat16 or float16, got float64",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change, message):
    grads, input, options = CASES["conv1d"]
    arguments = {
        "moment": moment_of(CASES["conv1d"]),
        "norms": norms_of(CASES["conv1d"]),
        "output_grad": grads,
        "input": input,
        **options,
        **change,
    }
    with pytest.raises(ValueError, match=f"square_accumulate_.*{message}"):
        ops.square_accumulate_(**arguments)
    del arguments["moment"]
    if "moment" not in change:
        with pytest.raises(ValueError, match=f"ghost_norms_.*{message}"):
            ops.ghost_norms_(**arguments)


# What the CUDA kernels cut differently: tiles of 64 or 128, 16 bytes of channels, steps
# of 16 or 32 positions, slices of the samples, 16 samples summed in float32.
CUDA_CASES = CASES | {
    "large tiles": example(33, 250, 250, (1, 1, 20)),
    "large tiles of patches": example(130, 14, 128, (1, 3, 3), (1, 3, 3)),
    "edges of tiles": example(2, 129, 65, (1, 1, 33)),
    "full tiles": example(2, 128, 64, (1, 1, 32)),
    "8 positions": example(4, 70, 30, (1, 1, 8)),
    "9 positions": example(4, 70, 30, (1, 1, 9)),
    "many positions": example(1, 24, 16, (1, 1, 700)),
    "many samples": example(700, 17, 20, (1, 1, 1)),
    "one position of a kernel": example(37, 6, 18, (1, 1, 1), (1, 3, 2), groups=2),
    "slices of samples": example(1100, 17, 20, (1, 1, 3)),
    "many samples of few weights": example(600, 4, 4, (1, 1, 2)),
    "groups of patches": example(3, 80, 48, (1, 5, 5), (1, 3, 3), groups=2),
    "images of patches": example(2, 20, 18, (1, 3, 3), (1, 2, 2), images=7),
}  # fmt: skip


def on_cuda(case, moment_dtype=torch.float64):
    """The moment, the norms and the ghost norms of the CUDA kernels."""
    grads, input, options = case
    moment, norms = moment_of(case, moment_dtype).cuda(), norms_of(case).cuda()
    ghosts = norms.clone()
    ops.square_accumulate_(moment, norms, grads.cuda(), input.cuda(), **options)
    ops.ghost_norms_(ghosts, grads.cuda(), input.cuda(), **options)
    return moment.cpu(), norms.cpu(), ghosts.cpu()


def assert_cuda_near(found, case):
    """Equal to the twin but for sums in float32, which tensor cores cut off."""
    moment, norms, ghosts = found
    wanted, wanted_norms = exact(case)
    wanted += moment_of(case, moment.dtype) - moment_of(case)
    mean = float(wanted.mean()) if wanted.numel() else 0.0
    torch.testing.assert_close(moment.double(), wanted, rtol=1e-4, atol=2e-5 * mean)
    torch.testing.assert_close(norms, wanted_norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(ghosts, wanted_norms, rtol=1e-5, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CUDA_CASES)
def test_cuda_equals_the_twin(name, moment_dtype, dtype):
    grads, input, options = CUDA_CASES[name]
    case = (grads.to(dtype), input.to(dtype), options)
    assert_cuda_near(on_cuda(case, moment_dtype), case)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["full tiles", "conv2d", "depthwise", "grouped"])
def test_cuda_any_strides(name, dtype):
    grads, input, options = CUDA_CASES[name]
    for e in layouts(grads.to(dtype).cuda()):
        for x in layouts(input.to(dtype).cuda()):
            assert_cuda_near(on_cuda((e, x, options)), (e.cpu(), x.cpu(), options))


@pytest.mark.cuda
@pytest.mark.parametrize("name", CUDA_CASES)
def test_cuda_same_bits_in_every_call(name):
    grads, input, options = CUDA_CASES[name]
    case = (grads.bfloat16(), input.bfloat16(), options)
    for one, other in zip(on_cuda(case), on_cuda(case), strict=True):
        assert torch.equal(one, other)


@pytest.mark.cuda
def test_cuda_moment_and_norms_alone_equal_both_together():
    case = CUDA_CASES["slices of samples"]
    grads, input, options = case[0].cuda(), case[1].cuda(), case[2]
    both, norms, _ = on_cuda(case)
    moment, alone = moment_of(case).cuda(), norms_of(case).cuda()
    ops.square_accumulate_(moment, None, grads, input, **options)
    ops.square_accumulate_(None, alone, grads, input, **options)
    ops.square_accumulate_(None, None, grads, input, **options)
    assert torch.equal(moment.cpu(), both)
    torch.testing.assert_close(alone.cpu(), norms, rtol=1e-6, atol=0)


@pytest.mark.cuda
def test_cuda_what_is_not_finite_shows():
    grads, input, options = example(3, 64, 64, (1, 1, 20))
    grads[1, 2, 0, 0, 1] = float("nan")
    moment, norms, ghosts = on_cuda((grads, input, options))
    assert not torch.isfinite(moment[2]).any()
    assert torch.isfinite(moment[3:]).all()
    assert torch.isfinite(norms).tolist() == [True, False, True]
    assert torch.isfinite(ghosts).tolist() == [True, False, True]
