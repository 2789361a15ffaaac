"""distortion_table: what every grid costs at every sparsity."""

import math

import pytest
import torch

from fitcompress import ops, reference
from fitcompress.threads import threads

BITS = [2, 4, 8]
STEPS = [0.25, 0.01, 1.0]
SPARSITIES = [0.0, 0.1, 0.5, 0.5, 0.99]
EXACT = {"nnz", "threshold", "position", "offset", "clip", "range"}


def example(rows, columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return weight, torch.rand(rows, columns, generator=generator)


def assert_tables_equal(actual, expected):
    """Sums may differ by their order, and errors by what cancels in them."""
    norm = expected.norm.max().item() if expected.norm.numel() else 0.0
    for name, ours, theirs in zip(actual._fields, actual, expected, strict=True):
        slack = 0.0 if name in EXACT else 1e-9
        floor = 1e-7 if name == "entropy_bits" else 1e-14 * norm
        torch.testing.assert_close(
            ours,
            theirs,
            rtol=slack,
            atol=floor if slack else 0.0,
            msg=lambda text, n=name: f"{n}: {text}",
        )


def assert_equals_the_twin(*arguments, **options):
    assert_tables_equal(
        ops.distortion_table(*arguments, **options),
        reference.distortion_table(*arguments, **options),
    )


def options_of(kind, fisher, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "none": {},
        "trace": {"fisher": 3.0},
        "diagonal": {"fisher": fisher},
        "smoothed": {"fisher": fisher, "smoothing": 0.5},
        "unsmoothed": {"fisher": fisher, "smoothing": 0.0},
        "given": {"importance": torch.rand(fisher.shape, generator=generator)},
        "all": {
            "fisher": fisher,
            "importance": torch.rand(fisher.shape, generator=generator),
            "smoothing": 1.0,
        },
    }[kind]


KINDS = ["none", "trace", "diagonal", "smoothed", "unsmoothed", "given", "all"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 5), (20, 333)])
def test_equals_the_twin(shape, dtype, kind):
    weight, fisher = example(*shape, dtype)
    assert_equals_the_twin(
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
    for seed, shape in enumerate([(1, 1), (6, 9), (5, 130), (3, 700)]):
        weight, fisher = example(*shape, seed=seed)
        assert_equals_the_twin(
            weight,
            bits=[2, 3, 8],
            steps=[0.3],
            sparsities=[0.0, 0.4],
            granularity=granularity,
            clips=clips,
            **options_of(kind, fisher),
        )


@pytest.mark.parametrize("dead_zone", [0.5, 0.6, 1.0, 2.75])
def test_dead_zone(dead_zone):
    weight, fisher = example(9, 80)
    weight[0, :10] = torch.arange(10.0) / 4  # values on the edges
    assert_equals_the_twin(
        weight, fisher, [4], [0.25, 1.0], [0.0, 0.5], dead_zone=dead_zone
    )


def test_a_dead_zone_by_hand():
    weight = torch.tensor([[0.5, 0.6, 0.75, 1.4, -0.7, -0.8]])
    table = ops.distortion_table(weight, steps=[1.0], dead_zone=0.75)
    assert table.nnz.item() == 3  # 0.75, 1.4 and −0.8 become 1, 1 and −1
    assert table.norm.item() == 3.0


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("granularity", ["channel", "tensor", 2])
def test_an_empty_weight_costs_nothing(shape, granularity):
    options = {"granularity": granularity, "clips": (0.75, 1.0)}
    weight = torch.zeros(shape)
    arguments = (weight, weight, [4], [0.1], [0.0, 0.5])
    table = ops.distortion_table(*arguments, **options)
    for cells in table[:6]:
        assert cells.tolist() == [[0, 0], [0, 0]]
    assert_equals_the_twin(*arguments, **options)


def test_no_grids_and_no_sparsities():
    weight = torch.ones(2, 3)
    table = ops.distortion_table(weight, sparsities=[0.5])
    assert table.nnz.shape == (0, 1)
    assert table.position.tolist() == [3]
    table = ops.distortion_table(weight, None, [4], [], [])
    assert table.nnz.shape == (1, 0)
    assert table.range.tolist() == [1.0, 1.0]


def test_by_hand():
    # 3 bits: Δ = 3 / 3 = 1, codes 3, 1, −2, 0 (−0.5 to even); step 2: codes 2, 1, −1, 0
    weight = torch.tensor([[3.0, 1.25, -2.0, -0.5]])
    fisher = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    importance = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    table = ops.distortion_table(
        weight, fisher, [3], [2.0], [0.0, 0.5], importance=importance
    )
    # ½ (0 + 2·0.25² + 0 + 8·0.5²), ½ (1·1² + 2·0.75² + 0 + 8·0.5²); half dropped, that
    # is −2 and −0.5: 4·2² more inside the brackets
    assert table.distortion.tolist() == [[1.0625, 9.0625], [2.0625, 10.0625]]
    assert table.nnz.tolist() == [[3, 2], [3, 2]]
    # 4 different codes: 2 bits each; 2 zeros and 2 others: 1.5 bits each
    assert table.entropy_bits.tolist() == [[8.0, 6.0], [8.0, 6.0]]
    # bits and steps are families of their own
    assert table.grid_length.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    # −2 leaves: 4·2²
    assert table.prune_length.tolist() == [[16.0, 0.0], [16.0, 0.0]]
    assert table.norm.tolist() == [[27.0, 11.0], [40.0, 24.0]]
    assert table.threshold.tolist() == [1.0, 3.0]
    assert table.position.tolist() == [3, 1]
    assert table.range.tolist() == [3.0]
    # steps 1 and 2: θ̂ are (3, 1, −2, 0) and (4, 2, −2, 0), Σ F (difference)² = 1 + 2
    table = ops.distortion_table(weight, fisher, [], [1.0, 2.0])
    assert table.grid_length.tolist() == [[3.0], [0.0]]


def test_a_clip_by_hand():
    # 2 bits: codes −1, 0, 1. Range 4: 4 → 4, the ones → 0, error 3. Range 2: 4 → 2, the
    # ones on the tie → 0, error 4 + 3. Range 1.5: 4 → 1.5, 1 → 1.5: 6.25 + 0.75
    weight = torch.tensor([[4.0, 1.0, 1.0, -1.0]])
    table = ops.distortion_table(weight, bits=[2], clips=(0.375, 0.5, 1.0))
    assert table.clip.tolist() == [[1.0]]
    assert table.distortion.item() == 1.5
    # where the large weight hardly matters, the range is that of the others
    fisher = torch.tensor([[0.125, 1.0, 1.0, 1.0]])
    table = ops.distortion_table(weight, fisher, [2], clips=(1.0, 0.5, 0.375))
    assert table.clip.tolist() == [[0.375]]
    assert table.distortion.item() == (0.125 * 6.25 + 3 * 0.25) / 2


def test_the_first_of_equal_clips():
    weight = torch.zeros(2, 3)
    table = ops.distortion_table(weight, bits=[2, 5], clips=(0.5, 1.0))
    assert table.clip.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("trace", [0.0, 1e-30, 7.0])
def test_a_trace_does_not_choose_clips(trace):
    weight, _ = example(5, 40)
    options = {"granularity": 8, "clips": ops.CLIPS}
    assert_equals_the_twin(weight, trace, [2, 3], [0.5], [0.0, 0.5], **options)
    table = ops.distortion_table(weight, trace, [2, 3], **options)
    plain = ops.distortion_table(weight, None, [2, 3], **options)
    assert torch.equal(table.clip, plain.clip)
    assert (table.clip < 1).any()


@pytest.mark.parametrize("granularity", [7, 10**9, 2**63 - 1])
def test_a_group_wider_than_the_row_is_the_row(granularity):
    weight, fisher = example(4, 6)
    rows = ops.distortion_table(weight, fisher, [2, 4], clips=ops.CLIPS)
    options = {"granularity": granularity, "clips": ops.CLIPS}
    groups = ops.distortion_table(weight, fisher, [2, 4], **options)
    for ours, other in zip(groups, rows, strict=True):
        assert torch.equal(ours, other)
    empty = ops.distortion_table(weight[:, :0], None, [4], granularity=granularity)
    assert empty.distortion.item() == 0


def test_rows_of_zeros():
    weight, fisher = example(4, 6)
    weight[1] = 0
    assert_equals_the_twin(weight, fisher, [2, 4], [0.5], [0.0, 0.5])
    assert_equals_the_twin(weight, fisher, [2, 4], [0.5], [0.5], clips=(1.0, 0.5))
    zero = torch.zeros(3, 3)
    table = ops.distortion_table(zero, zero, [2, 4], [0.5], [0.0, 0.5])
    assert not any(cells.any() for cells in table[:6])


def test_ties_of_rounding_go_to_even():
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    table = ops.distortion_table(weight, steps=[1.0])
    assert table.nnz.item() == 4
    assert table.norm.item() == 4 * 2.0**2


def test_weights_on_a_grid_cost_nothing_there():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (16, 300), generator=generator)
    codes[:, 0] = 7
    table = ops.distortion_table(0.3 * codes / 7, bits=[4, 8], steps=[0.01])
    assert table.distortion[0].item() <= 1e-12 * table.norm.max().item()
    assert table.nnz[0].item() == codes.count_nonzero()


@pytest.mark.parametrize("bits", [[16], [12, 16], [2, 8, 16, 3]])
def test_fine_grids(bits):
    weight, fisher = example(30, 300)
    assert_equals_the_twin(
        weight, fisher, bits, [2e-5], [i / 20 for i in range(20)], smoothing=1.0
    )
    assert_equals_the_twin(weight, None, bits, [1e-3], [0.0, 0.5], clips=(1.0, 0.9))


def test_codes_up_to_the_limit():
    weight, _ = example(4, 50)
    weight[1, 1] = 2.0**20
    assert_equals_the_twin(weight, None, [], [1.0, 1.5], [0.0, 0.5])


@pytest.mark.parametrize("shape", [(64, 576), (400, 700)])
def test_a_ladder_of_steps(shape):
    weight, fisher = example(*shape)
    weight[3, 3] = 40.0  # an outlier: many cells, most of them empty
    steps = [2 ** (i / 8) / 16 for i in range(49)]
    assert_equals_the_twin(weight, fisher, [2, 6], steps, [0.0, 0.3, 0.8])


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-10, 1e10, 1e30])
def test_scale_of_the_weights(scale):
    weight, fisher = example(8, 100)
    weight = scale * weight
    steps = [scale] if scale > 1e-40 else []
    for smoothing in (math.inf, 1.0) if scale < 1e15 else (math.inf,):
        assert_equals_the_twin(
            weight, fisher, [2, 4, 8], steps, [0.0, 0.2, 0.7], smoothing=smoothing
        )


@pytest.mark.parametrize("seed", range(20))
def test_random_cases_equal_the_twin(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*values):
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    rows, columns = draw(1, 3, 17, 64), draw(1, 9, 129, 1000)
    dtype = draw(torch.float32, torch.bfloat16, torch.float16)
    weight, fisher = example(rows, columns, dtype, seed)
    if draw(True, False):
        weight = (weight * 4).round() / 4
    count = draw(1, 4, 17, 40)
    sparsities = torch.rand(count, generator=generator, dtype=torch.float64)
    assert_equals_the_twin(
        weight,
        bits=draw([], [2], [8, 4, 3, 2], [5, 11]),
        steps=draw([], [0.5], [0.03, 0.25, 0.1]),
        sparsities=sparsities.sort().values.tolist(),
        granularity=draw("channel", "tensor", 5, 32),
        clips=draw((1.0,), (0.8, 1.0), ops.CLIPS[::3]),
        dead_zone=draw(0.5, 0.7),
        **options_of(draw(*KINDS), fisher, seed),
    )


def test_non_contiguous_tensors():
    weight, fisher = example(6, 8)
    grids = (BITS, STEPS, SPARSITIES)
    expected = ops.distortion_table(weight, fisher, *grids, importance=fisher)
    weight, fisher = (x.t().contiguous().t() for x in (weight, fisher))
    actual = ops.distortion_table(weight, fisher, *grids, importance=fisher)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("clips", [(1.0,), (1.0, 0.5)])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_same_bits_for_any_number_of_threads(granularity, clips):
    weight, fisher = example(300, 777)
    tables = []
    for count in (1, 2):
        with threads(count):
            tables.append(
                ops.distortion_table(
                    weight,
                    fisher,
                    BITS,
                    STEPS,
                    SPARSITIES,
                    smoothing=1.0,
                    granularity=granularity,
                    clips=clips,
                )
            )
    for one, two in zip(*tables, strict=True):
        assert torch.equal(one, two)


def test_tensors_that_require_a_gradient_are_detached():
    weight, fisher = example(3, 4)
    table = ops.distortion_table(
        weight.requires_grad_(), fisher.requires_grad_(), [4], smoothing=1.0
    )
    assert not table.distortion.requires_grad
