"""square_accumulate_ and ghost_norms_: squares of per-sample weight gradients."""

import pytest
import torch

from fitcompress import ops, reference
from fitcompress.threads import threads
from gradient_squares import (
    CASES,
    assert_near,
    exact,
    example,
    layouts,
    moment_of,
    norms_of,
)


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
