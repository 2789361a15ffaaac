"""distortion_table: what every grid costs at every sparsity."""

import math

import pytest
import torch

from fitcompress import ops, reference
from fitcompress.threads import threads

BITS = [2, 4, 8]
STEPS = [0.25, 0.01]
SPARSITIES = [0.0, 0.1, 0.5, 0.5, 0.99]


def example(rows, cols, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator).to(dtype)
    fisher = torch.rand(rows, cols, generator=generator)
    return weight, fisher, fisher * weight.float().square()


def assert_tables_close(actual, expected):
    for name, ours, theirs in zip(actual._fields, actual, expected, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-6, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 5), (20, 333)])
def test_equals_the_twin(shape, dtype):
    arguments = (*example(*shape, dtype), BITS, STEPS, SPARSITIES)
    assert_tables_close(
        ops.distortion_table(*arguments), reference.distortion_table(*arguments)
    )


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_weight_costs_nothing(shape):
    weight = torch.zeros(shape)
    table = ops.distortion_table(weight, None, weight, [4], [0.1], [0.0, 0.5])
    for cells in table:
        assert cells.tolist() == [[0, 0], [0, 0]]


def test_no_grids_and_no_sparsities():
    weight = torch.ones(2, 3)
    assert ops.distortion_table(weight, None, weight, [], [], [0.5]).nnz.shape == (0, 1)
    assert ops.distortion_table(weight, None, weight, [4], [], []).nnz.shape == (1, 0)


def test_by_hand():
    # 3 bits: Δ = 3 / 3 = 1, codes 3, 1, −2, 0 (−0.5 to even); step 2: codes 2, 1, −1, 0
    weight = torch.tensor([[3.0, 1.25, -2.0, -0.5]])
    fisher = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    importance = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    table = ops.distortion_table(weight, fisher, importance, [3], [2.0], [0.0, 0.5])
    # ½ (0 + 2·0.25² + 0 + 8·0.5²), ½ (1·1² + 2·0.75² + 0 + 8·0.5²); half dropped, that
    # is −2 and −0.5: 4·2² more inside the brackets
    assert table.distortion.tolist() == [[1.0625, 9.0625], [2.0625, 10.0625]]
    assert table.nnz.tolist() == [[3, 2], [3, 2]]
    # 4 different codes: 2 bits each; 2 zeros and 2 others: 1.5 bits each
    assert table.entropy_bits.tolist() == [[8.0, 6.0], [8.0, 6.0]]
    # θ̂ are (3, 1, −2, 0) and (4, 2, −2, 0): Σ F (difference)² = 1·1 + 2·1
    assert table.grid_length.tolist() == [[3.0, 3.0], [0.0, 0.0]]
    # −2 leaves: 4·2²
    assert table.prune_length.tolist() == [[16.0, 0.0], [16.0, 0.0]]
    assert table.norm.tolist() == [[27.0, 11.0], [40.0, 24.0]]


def test_ties_of_importance_drop_the_lower_index_first():
    weight = torch.arange(1.0, 9.0).view(2, 4)
    table = ops.distortion_table(
        weight, None, torch.ones(2, 4), [], [1.0], [0.0, 0.25, 0.5]
    )
    assert table.norm.flatten().tolist() == [204.0, 199.0, 174.0]


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_many_ties(levels):
    weight, _, _ = example(13, 57)
    generator = torch.Generator().manual_seed(1)
    importance = torch.randint(levels, weight.shape, generator=generator).float()
    importance[importance == 0] = -0.0
    arguments = (weight, None, importance, [3], [0.1], [0.0, 0.2, 0.4, 0.6, 0.8])
    assert_tables_close(
        ops.distortion_table(*arguments), reference.distortion_table(*arguments)
    )


def test_importances_that_differ_in_the_last_bit():
    weight, _, _ = example(5, 100)
    bits = torch.full((500,), 0x3F800000, dtype=torch.int32)
    bits += torch.randperm(500, dtype=torch.int32) % 100
    importance = bits.view(torch.float32).view(5, 100)
    arguments = (weight, None, importance, [3], [], [0.1, 0.33, 0.5, 0.9])
    assert_tables_close(
        ops.distortion_table(*arguments), reference.distortion_table(*arguments)
    )


def test_rows_of_zeros():
    weight, fisher, importance = example(4, 6)
    weight[1] = 0
    arguments = (weight, fisher, importance, [2, 4], [0.5], [0.0, 0.5])
    table = ops.distortion_table(*arguments)
    assert_tables_close(table, reference.distortion_table(*arguments))
    zero = torch.zeros(3, 3)
    table = ops.distortion_table(zero, None, zero, [2, 4], [0.5], [0.0, 0.5])
    assert not any(cells.any() for cells in table)


def test_ties_of_rounding_go_to_even():
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    table = ops.distortion_table(weight, None, weight.abs(), [], [1.0], [0.0])
    assert table.nnz.item() == 4
    assert table.norm.item() == 4 * 2.0**2


def test_non_contiguous_tensors():
    weight, fisher, importance = example(6, 8)
    expected = ops.distortion_table(weight, fisher, importance, BITS, STEPS, SPARSITIES)
    strided = [x.t().contiguous().t() for x in (weight, fisher, importance)]
    actual = ops.distortion_table(*strided, BITS, STEPS, SPARSITIES)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_same_bits_for_any_number_of_threads():
    arguments = (*example(50, 777), BITS, STEPS, SPARSITIES)
    tables = []
    for count in (1, 2):
        with threads(count):
            tables.append(ops.distortion_table(*arguments))
    for one, two in zip(*tables, strict=True):
        assert torch.equal(one, two)


def test_weights_that_require_a_gradient_are_detached():
    weight, fisher, importance = example(3, 4)
    table = ops.distortion_table(
        weight.requires_grad_(), fisher, importance, [4], [], [0.0]
    )
    assert not table.distortion.requires_grad


@pytest.mark.parametrize("with_fisher", [True, False])
def test_opcheck(with_fisher):
    weight, fisher, importance = example(3, 4)
    torch.library.opcheck(
        torch.ops.fitcompress.distortion_table.default,
        (weight, fisher if with_fisher else None, importance, BITS, STEPS, SPARSITIES),
    )


def at(value, row, column):
    tensor = torch.ones(2, 3)
    tensor[row, column] = value
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3)}, r"\[rows, columns\], got \[3\]"),
        ({"weight": torch.ones(2, 3).double()}, "bfloat16 or float16, got float64"),
        ({"importance": torch.ones(3, 2)}, r"shape \[2, 3\], got \[3, 2\]"),
        ({"importance": torch.ones(2, 3).double()}, "float32, got float64"),
        ({"fisher": torch.ones(6)}, r"shape \[2, 3\], got \[6\]"),
        ({"bits": [4, 1]}, "bits must be between 2 and 16, got 1"),
        ({"bits": [17]}, "between 2 and 16, got 17"),
        ({"steps": [0.0]}, "positive float32 numbers, got 0"),
        ({"steps": [math.inf]}, "positive float32 numbers, got inf"),
        ({"steps": [1e-9]}, "codes up to 1e.09 for the largest weight, 1"),
        ({"sparsities": [0.5, 0.25]}, "got 0.25 after 0.5"),
        ({"sparsities": [1.0]}, r"ascend within \[0, 1\), got 1"),
        ({"sparsities": [math.nan]}, "got nan"),
        ({"weight": at(math.nan, 1, 2)}, "finite, got nan at row 1, column 2"),
        ({"weight": at(-math.inf, 0, 1)}, "finite, got -inf at row 0, column 1"),
        ({"importance": at(-1.0, 1, 0)}, "at least 0, got -1 at row 1, column 0"),
        ({"importance": at(math.nan, 1, 0)}, "at least 0, got nan at row 1"),
        ({"fisher": at(-2.0, 0, 2)}, "at least 0, got -2 at row 0, column 2"),
        ({"fisher": at(math.inf, 0, 2)}, "finite and at least 0, got inf"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "weight": torch.ones(2, 3),
        "fisher": None,
        "importance": torch.ones(2, 3),
        "bits": [4],
        "steps": [0.5],
        "sparsities": [0.0],
    }
    with pytest.raises(ValueError, match=f"distortion_table: .*{message}"):
        ops.distortion_table(**{**arguments, **change})


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 300), (300, 1), (20, 3333)])
def test_cuda_equals_cpu(shape, dtype):
    weight, fisher, importance = example(*shape, dtype)
    expected = ops.distortion_table(weight, fisher, importance, BITS, STEPS, SPARSITIES)
    actual = ops.distortion_table(
        weight.cuda(), fisher.cuda(), importance.cuda(), BITS, STEPS, SPARSITIES
    )
    assert_tables_close(ops.DistortionTable(*[x.cpu() for x in actual]), expected)


@pytest.mark.cuda
def test_cuda_finds_bad_values():
    ones = torch.ones(2, 3).cuda()
    with pytest.raises(ValueError, match="finite, got nan at row 1, column 2"):
        ops.distortion_table(at(math.nan, 1, 2).cuda(), None, ones, [4], [], [0.0])
    with pytest.raises(ValueError, match="at least 0"):
        ops.distortion_table(ones, None, at(-1.0, 1, 2).cuda(), [4], [], [0.0])
