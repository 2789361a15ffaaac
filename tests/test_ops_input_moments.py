"""input_moments_: second moments of a layer's inputs, products with its outputs."""

import pytest
import torch
from torch.nn import functional as F

from fitcompress import ops, reference
from fitcompress.threads import threads

ONE, ZERO = (1, 1, 1), (0, 0, 0)

# samples, groups, channels of a group, outputs of a group, size; kernel, stride,
# dilation, start, step. The kernel's tiles are 256 positions, its blocks 288 features;
# up to 32 inputs and outputs are few.
CASES = {
    "linear": ((37, 1, 70, 9, ONE), (ONE, ONE, ONE, ZERO, ONE)),
    "linear of one": ((1, 1, 1, 1, ONE), (ONE, ONE, ONE, ZERO, ONE)),
    "wide linear": ((300, 1, 640, 300, ONE), (ONE, ONE, ONE, ZERO, ONE)),
    "many rows": ((5000, 1, 20, 3, ONE), (ONE, ONE, ONE, ZERO, ONE)),
    "1d": ((3, 1, 5, 4, (1, 1, 40)), ((1, 1, 3), ONE, ONE, ZERO, ONE)),
    "2d": ((2, 1, 7, 6, (1, 13, 11)), ((1, 3, 3), ONE, ONE, ZERO, ONE)),
    "2d, a run of 48": ((1, 1, 16, 17, (1, 20, 50)), ((1, 3, 3), ONE, ONE, ZERO, ONE)),
    "3d": ((2, 1, 3, 5, (5, 6, 7)), ((2, 3, 4), ONE, ONE, ZERO, ONE)),
    "stride": ((2, 1, 4, 6, (1, 13, 12)), ((1, 3, 2), (1, 2, 3), ONE, ZERO, ONE)),
    "stride of two": (
        (3, 1, 5, 6, (1, 9, 61)),
        ((1, 3, 3), (1, 2, 2), ONE, ZERO, ONE),
    ),
    "every second of few": (
        (3, 1, 2, 2, (1, 9, 61)),
        ((1, 3, 2), ONE, ONE, ZERO, (1, 1, 2)),
    ),
    "dilation": ((2, 1, 4, 6, (1, 13, 12)), ((1, 3, 2), ONE, (1, 2, 5), ZERO, ONE)),
    "few": ((5, 2, 32, 32, (1, 7, 9)), (ONE, ONE, ONE, ZERO, ONE)),
    "few inputs": ((5, 2, 32, 33, (1, 7, 9)), (ONE, ONE, ONE, ZERO, ONE)),
    "few outputs": ((5, 2, 33, 32, (1, 7, 9)), (ONE, ONE, ONE, ZERO, ONE)),
    "groups": ((2, 3, 4, 5, (1, 9, 9)), ((1, 3, 3), ONE, ONE, ZERO, ONE)),
    "depthwise": ((4, 40, 1, 1, (1, 16, 16)), ((1, 3, 3), ONE, ONE, ZERO, ONE)),
    "subsampled": (
        (3, 1, 4, 6, (1, 14, 15)),
        ((1, 3, 3), ONE, ONE, (0, 1, 2), (1, 3, 4)),
    ),
    "all": (
        (2, 2, 3, 5, (6, 13, 15)),
        ((2, 3, 2), (1, 2, 1), (2, 1, 3), (1, 0, 2), (2, 1, 3)),
    ),
    "pointwise": ((3, 1, 33, 20, (1, 9, 9)), (ONE, ONE, ONE, ZERO, ONE)),
    "three blocks": ((6, 1, 65, 16, (1, 8, 8)), ((1, 3, 3), ONE, ONE, ZERO, ONE)),
    "no samples": ((0, 1, 4, 3, (1, 5, 5)), ((1, 3, 3), ONE, ONE, ZERO, ONE)),
    "no places": ((2, 1, 4, 3, (1, 5, 5)), ((1, 3, 3), ONE, ONE, (0, 3, 0), ONE)),
    "no outputs": ((2, 1, 4, 0, (1, 5, 5)), ((1, 3, 3), ONE, ONE, ZERO, ONE)),
}
NO_INPUTS = (2, 1, 0, 3, (1, 5, 5)), ((1, 3, 3), ONE, ONE, ZERO, ONE)
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def example(case, layout="contiguous"):
    """Return second, cross, input, output, and where to look."""
    (samples, groups, channels, outputs, size), place = case
    kernel, stride, dilation, _, _ = place
    generator = torch.Generator().manual_seed(0)
    width = channels * kernel[0] * kernel[1] * kernel[2] + 1
    places = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)
    ]
    half = torch.rand(groups, width, width, generator=generator, dtype=torch.float64)
    second = half + half.mT
    cross = torch.rand(groups, outputs, width, generator=generator, dtype=torch.float64)
    input = torch.randn(samples, groups * channels, *size, generator=generator) + 0.5
    output = torch.randn(samples, groups * outputs, *places, generator=generator)
    if layout == "channels last":
        input = input.contiguous(memory_format=torch.channels_last_3d)
        output = output.contiguous(memory_format=torch.channels_last_3d)
    elif layout == "reversed":
        input = input.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
        output = output.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    elif layout == "sliced":
        input = input.repeat(1, 1, 1, 1, 3)[..., : size[2]]
        output = output.repeat_interleave(2, dim=-1)[..., ::2]
    return second, cross, input, output, *place


def dense(second, cross, input, output, kernel, stride, dilation, start, step):
    """Convolve with unit vectors in float64: each gives one column of the patches."""
    groups = second.shape[0]
    channels = input.shape[1] // groups
    count = kernel[0] * kernel[1] * kernel[2]
    if input.shape[0] == 0:
        return second.clone(), cross.clone()
    units = torch.eye(count, dtype=torch.float64).view(count, 1, *kernel)
    n = input.shape[0]
    every = (..., *[slice(a, None, b) for a, b in zip(start, step, strict=True)])
    found = F.conv3d(
        input.double().reshape(-1, 1, *input.shape[2:]),
        units,
        stride=stride,
        dilation=dilation,
    )[every]
    found = found.reshape(n, groups, channels * count, -1).permute(1, 0, 3, 2)
    rows = torch.cat([found, found.new_ones(*found.shape[:3], 1)], dim=3).flatten(1, 2)
    y = output.double()[every].reshape(n, groups, cross.shape[1], found.shape[2])
    y = y.permute(1, 2, 0, 3).flatten(2)
    return second + rows.mT @ rows, cross + y @ rows


def assert_near(result, expected):
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(result, expected, rtol=2e-6, atol=1e-6 * scale)


@cases
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels last", "reversed", "sliced"]
)
@pytest.mark.parametrize("module", [ops, reference])
def test_equals_dense_products(case, layout, module):
    second, cross, input, output, *place = example(case, layout)
    expected = dense(second, cross, input, output, *place)
    module.input_moments_(second, cross, input, output, *place)
    assert_near(second, expected[0])
    assert_near(cross, expected[1])
    assert torch.equal(second, second.mT)


def test_a_linear_of_two_rows_by_hand():
    second = torch.zeros(1, 3, 3, dtype=torch.float64)
    cross = torch.zeros(1, 1, 3, dtype=torch.float64)
    # a = (1, 2, 1) and (3, −1, 1); y = 5 and 2
    input = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).view(2, 2, 1, 1, 1)
    output = torch.tensor([5.0, 2.0]).view(2, 1, 1, 1, 1)
    for module in (ops, reference):
        second.zero_(), cross.zero_()
        module.input_moments_(second, cross, input, output, ONE, ONE, ONE, ZERO, ONE)
        assert second.tolist() == [[[10, -1, 4], [-1, 5, 1], [4, 1, 2]]]
        assert cross.tolist() == [[[11, 8, 7]]]


def test_a_convolution_without_channels_sums_the_outputs():
    second, cross, input, output, *place = example(NO_INPUTS)
    expected = cross + output.double().sum((0, 2, 3, 4)).view(1, 3, 1)
    before = second.clone()
    ops.input_moments_(second, cross, input, output, *place)
    assert (second - before).item() == pytest.approx(2 * 3 * 3)  # samples, places
    torch.testing.assert_close(cross, expected, rtol=1e-6, atol=1e-6)


def test_a_channel_of_ones_counts_in_double():
    # 2^24 + 256 ones; a sum in float32 would stop at 2^24
    input = torch.ones(1, 1, 1, 1, 1).expand(2**24 + 256, 1, 1, 1, 1)
    second = torch.zeros(1, 2, 2, dtype=torch.float64)
    ops.input_moments_(second, None, input, None, ONE, ONE, ONE, ZERO, ONE)
    assert second.tolist() == [[[2**24 + 256] * 2] * 2]


def test_many_positions_with_a_small_kernel():
    case = (8, 1, 3, 2, (1, 162, 202)), ((1, 3, 3), ONE, ONE, ZERO, ONE)
    second, cross, input, output, *place = example(case)
    expected = dense(second, cross, input, output, *place)
    ops.input_moments_(second, cross, input, output, *place)
    assert_near(second, expected[0])
    assert_near(cross, expected[1])


def test_an_offset_does_not_spoil_the_sums():
    second, _, input, _, *place = example(CASES["2d"])
    expected = second.clone()
    ops.input_moments_(second, None, input, None, *place)
    ops.input_moments_(expected, None, torch.cat([input, input])[2:], None, *place)
    assert torch.equal(second, expected)


@cases
def test_without_outputs(case):
    second, cross, input, output, *place = example(case)
    alone = second.clone()
    ops.input_moments_(second, cross, input, output, *place)
    ops.input_moments_(alone, None, input, None, *place)
    assert_near(alone, second)


def test_calls_add_up():
    second, cross, input, output, *place = example(CASES["groups"])
    expected = dense(
        *dense(second, cross, input, output, *place), input, output, *place
    )
    for _ in range(2):
        ops.input_moments_(second, cross, input, output, *place)
    assert_near(second, expected[0])
    assert_near(cross, expected[1])


@pytest.mark.parametrize(
    "case",
    [
        CASES["wide linear"],
        CASES["depthwise"],
        CASES["three blocks"],
        ((4, 1, 3, 2, (1, 66, 66)), ((1, 3, 3), ONE, ONE, ZERO, ONE)),  # eight chunks
        ((4, 1, 3, 40, (1, 66, 66)), ((1, 3, 3), ONE, ONE, ZERO, ONE)),
    ],
    ids=["wide linear", "depthwise", "three blocks", "small chunks", "chunks"],
)
def test_same_bits_for_any_number_of_threads(case):
    results = []
    for count in (1, 2, 4):
        second, cross, input, output, *place = example(case)
        with threads(count):
            ops.input_moments_(second, cross, input, output, *place)
        results.append((second, cross))
    for second, cross in results[1:]:
        assert torch.equal(second, results[0][0])
        assert torch.equal(cross, results[0][1])


def test_non_contiguous_results():
    second, cross, input, output, *place = example(CASES["2d"])
    expected = second.clone(), cross.clone()
    ops.input_moments_(*expected, input, output, *place)
    strided = second.mT, cross.mT.contiguous().mT
    ops.input_moments_(*strided, input, output, *place)
    assert torch.equal(strided[0], expected[0])
    assert torch.equal(strided[1], expected[1])


def test_values_that_are_not_finite_stay_in_their_rows():
    second, cross, input, output, *place = example(CASES["linear"])
    input[3, 5], input[4, 6] = torch.nan, torch.inf
    ops.input_moments_(second, cross, input, output, *place)
    bad = ~second.isfinite()[0]
    assert bad[5].all()
    assert bad[:, 6].all()
    bad[5:7], bad[:, 5:7] = False, False
    assert not bad.any()
    assert (~cross.isfinite()).sum() == 2 * 9


def test_arguments_that_require_a_gradient_are_detached():
    second, cross, input, output, *place = example(CASES["2d"])
    input.requires_grad_()
    ops.input_moments_(second, cross, input, output.requires_grad_(), *place)
    assert not second.requires_grad
    assert not cross.requires_grad


@pytest.mark.parametrize("with_output", [True, False])
def test_opcheck(with_output):
    second, cross, input, output, *place = example(CASES["all"])
    place = [list(part) for part in place]
    if not with_output:
        cross = output = None
    torch.library.opcheck(
        torch.ops.fitcompress.input_moments_.default,
        (second, cross, input, output, *place),
    )


def test_the_twin_cuts_large_inputs_into_tiles():
    # the shape, the limit, and the number of boxes
    for shape, limit, count in [
        ((5, 1, 3, 4), 24, 3),
        ((5, 1, 3, 4), 12, 5),
        ((5, 1, 3, 4), 8, 10),
        ((5, 1, 3, 4), 3, 30),
        ((5, 1, 3, 4), 0, 60),
        ((0, 1, 3, 4), 5, 0),
        ((5, 1, 0, 4), 5, 0),
    ]:
        seen = torch.zeros(shape, dtype=torch.int64)
        tiles = list(reference.compensate._tiles(shape, limit))
        for tile in tiles:
            assert seen[tile].numel() <= max(1, limit)
            seen[tile] += 1
        assert len(tiles) == count
        assert (seen == 1).all()


DOUBLE = torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4, 4, dtype=DOUBLE)}, r"second must be \[groups, inputs"),
        (
            {0: torch.zeros(1, 5, 5, dtype=DOUBLE)},
            r"second .* \[1, 64, 64\], got \[1, 5",
        ),
        ({0: torch.zeros(0, 64, 64, dtype=DOUBLE)}, "at least one group"),
        ({0: torch.zeros(2, 64, 64, dtype=DOUBLE)}, "multiple of the groups, 2, got 7"),
        ({0: torch.zeros(1, 64, 64)}, "second must be float64, got float32"),
        ({1: torch.zeros(1, 6, 64)}, "cross must be float64, got float32"),
        ({1: torch.zeros(6, 64, dtype=DOUBLE)}, r"cross must be \[groups, outputs"),
        (
            {1: torch.zeros(1, 6, 63, dtype=DOUBLE)},
            r"cross must have shape \[1, 6, 64\]",
        ),
        ({1: torch.zeros(1, 5, 64, dtype=DOUBLE)}, r"output must have shape \[2, 5, 1"),
        ({1: None}, "cross and output must be given together, got only output"),
        ({3: None}, "cross and output must be given together, got only cross"),
        ({2: torch.zeros(2, 7, 13, 11)}, r"input must be \[samples, channels, depth"),
        ({2: torch.zeros(2, 7, 1, 13, 11, dtype=DOUBLE)}, "input must be float32, got"),
        (
            {2: torch.zeros(2, 7, 1, 13, 2)},
            "fit into the input, got size 2 in .* width",
        ),
        (
            {2: torch.zeros(2, 7, 0, 13, 11)},
            "fit into the input, got size 0 in .* depth",
        ),
        (
            {3: torch.zeros(2, 6, 1, 11, 8)},
            r"output must have shape \[2, 6, 1, 11, 9\]",
        ),
        (
            {3: torch.zeros(3, 6, 1, 11, 9)},
            r"output must have shape \[2, 6, 1, 11, 9\]",
        ),
        (
            {3: torch.zeros(2, 6, 1, 11, 9).half()},
            "output must be float32, got float16",
        ),
        ({4: (3, 3)}, r"kernel must be three numbers of at least 1, got \[3, 3\]"),
        ({4: (1, 0, 3)}, "kernel must be three numbers of at least 1"),
        ({5: (1, 0, 1)}, "stride must be three numbers of at least 1"),
        ({6: (1, 1, 0)}, "dilation must be three numbers of at least 1"),
        ({6: (1, 1, 2**62)}, "fit into the input, got size 11"),
        ({7: (0, -1, 0)}, "start must be three numbers of at least 0"),
        ({8: (1, 1, 0)}, "step must be three numbers of at least 1"),
    ],
)
def test_bad_arguments(change, message):
    arguments = list(example(CASES["2d"]))
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=f"input_moments_: .*{message}"):
        ops.input_moments_(*arguments)


def test_tensors_on_different_devices():
    arguments = list(example(CASES["2d"]))
    arguments[2] = arguments[2].to("meta")
    with pytest.raises(ValueError, match="input must be on the device of second, cpu"):
        ops.input_moments_(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {0: torch.zeros(1, 5, 5, dtype=DOUBLE)},
            r"second must have shape \[1, 64, 64\]",
        ),
        ({2: torch.zeros(2, 7, 1, 13, 11, dtype=DOUBLE)}, "input must be float32"),
        (
            {3: torch.zeros(3, 6, 1, 11, 9)},
            "output must have 2 samples like input, got 3",
        ),
    ],
)
def test_bad_arguments_on_other_devices(change, message):
    arguments = list(example(CASES["2d"]))
    for place, value in change.items():
        arguments[place] = value
    arguments[:4] = [argument.to("meta") for argument in arguments[:4]]
    with pytest.raises(ValueError, match=message):
        ops.input_moments_(*arguments)


def test_other_devices_run_the_twin(monkeypatch):
    called = []
    monkeypatch.setattr(reference, "input_moments_", lambda *all: called.append(all))
    arguments = list(example(CASES["2d"]))
    arguments[:4] = [argument.to("meta") for argument in arguments[:4]]
    ops.input_moments_(*arguments)
    assert len(called) == 1


@pytest.mark.cuda
@cases
def test_cuda_equals_cpu(case):
    second, cross, input, output, *place = example(case)
    on_device = [tensor.cuda() for tensor in (second, cross, input, output)]
    ops.input_moments_(second, cross, input, output, *place)
    ops.input_moments_(*on_device, *place)
    assert_near(on_device[0].cpu(), second)
    assert_near(on_device[1].cpu(), cross)
    assert torch.equal(on_device[0], on_device[0].mT)
