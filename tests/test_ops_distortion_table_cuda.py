"""distortion_table on a device: the tables of the CPU."""

import math

import pytest
import torch

from fitcompress import ops

pytestmark = pytest.mark.cuda

BITS = [2, 3, 4, 8]
STEPS = [0.25, 0.01, 1.0]
SPARSITIES = [0.0, 0.1, 0.5, 0.5, 0.99]
EXACT = {"nnz", "threshold", "position", "offset", "clip", "range"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def example(rows, columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return weight, torch.rand(rows, columns, generator=generator)


def on_device(weight, fisher=None, *arguments, importance=None, **options):
    return ops.distortion_table(
        weight.cuda(),
        fisher.cuda() if isinstance(fisher, torch.Tensor) else fisher,
        *arguments,
        importance=None if importance is None else importance.cuda(),
        **options,
    )


def assert_equals_the_cpu(*arguments, **options):
    actual = on_device(*arguments, **options)
    expected = ops.distortion_table(*arguments, **options)
    norm = expected.norm.max().item() if expected.norm.numel() else 0.0
    for name, ours, theirs in zip(actual._fields, actual, expected, strict=True):
        exact = name in EXACT
        floor = 1e-7 if name == "entropy_bits" else 1e-14 * norm
        torch.testing.assert_close(
            ours.cpu(),
            theirs,
            rtol=0.0 if exact else 1e-6,
            atol=0.0 if exact else floor,
            msg=lambda text, n=name: f"{n}: {text}",
        )


def options_of(kind, fisher):
    given = torch.rand(fisher.shape, generator=torch.Generator().manual_seed(1))
    return {
        "none": {},
        "trace": {"fisher": 3.0},
        "diagonal": {"fisher": fisher},
        "smoothed": {"fisher": fisher, "smoothing": 0.5},
        "unsmoothed": {"fisher": fisher, "smoothing": 0.0},
        "given": {"importance": given},
        "all": {"fisher": fisher, "importance": given, "smoothing": 1.0},
    }[kind]


KINDS = ["none", "trace", "diagonal", "smoothed", "unsmoothed", "given", "all"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (20, 333), (70, 1000)])
def test_importance_and_fisher(shape, dtype, kind):
    weight, fisher = example(*shape, dtype)
    assert_equals_the_cpu(
        weight,
        bits=BITS,
        steps=STEPS,
        sparsities=SPARSITIES,
        **options_of(kind, fisher),
    )


@pytest.mark.parametrize("kind", ["none", "smoothed"])
@pytest.mark.parametrize("clips", [(1.0,), (0.5,), (1.0, 0.3), ops.CLIPS])
@pytest.mark.parametrize("granularity", ["channel", "tensor", 1, 3, 64, 1000])
def test_scales(granularity, clips, kind):
    weight, fisher = example(12, 450)
    weight[3] = 0.0
    assert_equals_the_cpu(
        weight,
        bits=BITS,
        steps=STEPS,
        sparsities=SPARSITIES,
        granularity=granularity,
        clips=clips,
        **options_of(kind, fisher),
    )


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_clips_of_large_scale_units(granularity):
    """Their errors are summed by several warps."""
    weight, fisher = example(3, 9000)
    assert_equals_the_cpu(
        weight,
        fisher,
        [3, 4],
        sparsities=[0.0, 0.7],
        clips=ops.CLIPS,
        granularity=granularity,
    )


@pytest.mark.parametrize("dead_zone", [0.5, 0.6, 1.0, 2.75, 1e30])
def test_dead_zone(dead_zone):
    weight, fisher = example(20, 100)
    assert_equals_the_cpu(
        weight, fisher, steps=STEPS, sparsities=SPARSITIES, dead_zone=dead_zone
    )


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("granularity", ["channel", "tensor", 2])
def test_empty_weights(shape, granularity):
    assert_equals_the_cpu(
        torch.zeros(shape),
        bits=[4],
        steps=[1.0],
        sparsities=[0.0, 0.5],
        granularity=granularity,
    )


def test_no_grids_and_no_sparsities():
    weight, _ = example(4, 5)
    assert_equals_the_cpu(weight, sparsities=[0.0, 0.5])
    assert_equals_the_cpu(weight, bits=[4], steps=[0.1], sparsities=[])


@pytest.mark.parametrize("bits", [[16], [12, 16], [2, 8, 16, 3]])
def test_fine_grids(bits):
    weight, fisher = example(30, 300)
    assert_equals_the_cpu(weight, fisher, bits, sparsities=SPARSITIES)
    assert_equals_the_cpu(weight, fisher, bits, sparsities=SPARSITIES, clips=(1.0, 0.8))


def test_a_ladder_of_steps():
    weight, fisher = example(64, 576)
    steps = [2 ** (-i / 8) / 4 for i in range(49)]
    assert_equals_the_cpu(weight, fisher, steps=steps, sparsities=SPARSITIES)


def test_more_sparsities_than_are_searched_at_once():
    weight, _ = example(30, 50)
    sparsities = [i / 200 for i in range(200)]
    assert_equals_the_cpu(weight, bits=[4], steps=[0.1], sparsities=sparsities)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties(dtype):
    weight, _ = example(30, 400, dtype)
    zeros = weight.float().abs() < 1.2
    for tied in (
        torch.ones_like(weight),
        torch.where(zeros, 0.0, weight.float()).to(dtype),
        weight.sign(),
    ):
        assert_equals_the_cpu(tied, bits=BITS, steps=[0.5], sparsities=SPARSITIES)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-10, 1e10, 1e30])
def test_scale_of_the_weights(scale):
    weight, fisher = example(20, 50)
    steps = [0.5 * scale, 0.03 * scale] if scale > 1e-40 else []
    assert_equals_the_cpu(scale * weight, fisher, BITS, steps, sparsities=SPARSITIES)


def test_fisher_over_twenty_decades():
    """Classes of tiny terms are summed as exactly as large ones."""
    weight, uniform = example(40, 500)
    fisher = 10 ** (-20 * uniform)
    assert_equals_the_cpu(
        weight, fisher, BITS, STEPS, sparsities=SPARSITIES, smoothing=0.0
    )


def test_same_bits_in_every_run():
    weight, fisher = example(300, 700)
    arguments = (weight, fisher, BITS, STEPS, SPARSITIES)
    first = on_device(*arguments, smoothing=0.1)
    for _ in range(3):
        for one, other in zip(first, on_device(*arguments, smoothing=0.1), strict=True):
            assert torch.equal(one, other)


def at(value, row, column):
    tensor = torch.ones(2, 3)
    tensor[row, column] = value
    return tensor


@pytest.mark.parametrize(
    "change",
    [
        {"weight": at(math.nan, 1, 2)},
        {"weight": at(-math.inf, 0, 1)},
        {"importance": at(-1.0, 1, 0)},
        {"importance": at(math.nan, 1, 0)},
        {"fisher": at(-2.0, 0, 2)},
        {"fisher": at(math.inf, 0, 2)},
        {"fisher": at(-1.0, 0, 0), "weight": at(math.inf, 0, 1)},
        {"steps": [1e-9]},
    ],
)
def test_errors_have_the_text_of_the_cpu(change):
    arguments = {"weight": torch.ones(2, 3), "bits": [4], "steps": [0.5], **change}
    with pytest.raises(ValueError, match="distortion_table: ") as expected:
        ops.distortion_table(**arguments)
    with pytest.raises(ValueError, match="distortion_table: ") as actual:
        on_device(**arguments)
    assert str(actual.value) == str(expected.value)
