"""distortion_table: masks, memory, arguments."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fitcompress import ops, reference

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SPARSITIES = [0.0, 0.1, 0.5, 0.5, 0.9, 0.999]


def assert_masks(weight, sparsities=SPARSITIES, fisher=None, **options):
    """Thresholds and positions are the twin's, and masks follow from them."""
    table = ops.distortion_table(weight, fisher, [4], [], sparsities, **options)
    twin = reference.distortion_table(weight, fisher, [4], [], sparsities, **options)
    assert torch.equal(table.threshold, twin.threshold)
    assert torch.equal(table.position, twin.position)
    assert torch.equal(table.offset, twin.offset)
    assert torch.equal(table.nnz, twin.nnz)
    importance = options.get("importance")
    if importance is None:
        rule = weight.float().abs()
        if fisher is not None and table.offset < math.inf:
            rule = (fisher + table.offset) * weight.float().square()
    else:
        rule = importance
    order = rule.flatten().argsort(stable=True)
    for s, sparsity in enumerate(sparsities):
        mask = ops.level_mask(table, s, weight, fisher, importance)
        expected = torch.ones(weight.numel(), dtype=torch.bool)
        expected[order[: math.floor(sparsity * weight.numel())]] = False
        assert torch.equal(mask, expected.view_as(weight))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 333), (300, 600)])
def test_masks(shape, dtype):
    weight = random(*shape).to(dtype)
    fisher = random(*shape, seed=1).square()
    assert_masks(weight)
    assert_masks(weight, fisher=fisher, smoothing=0.3)
    assert_masks(weight, importance=random(*shape, seed=2).square())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_ties(dtype):
    generator = torch.Generator().manual_seed(3)
    weight = random(200, 600).to(dtype)
    assert_masks(torch.full_like(weight, 0.5))
    assert_masks(torch.where(weight > 0.3, 0.5, -0.25).to(dtype))
    sparse = weight * (torch.rand(weight.shape, generator=generator) > 0.8)
    assert_masks(sparse, [0.0, 0.3, 0.79, 0.8, 0.81, 0.9])
    assert_masks((weight * 3).round())


def test_ties_leave_in_order_of_index():
    weight = torch.arange(1.0, 9.0).view(2, 4)
    table = ops.distortion_table(
        weight, None, [], [1.0], [0.0, 0.25, 0.5], importance=torch.ones(2, 4)
    )
    assert table.norm.flatten().tolist() == [204.0, 199.0, 174.0]
    assert table.position.tolist() == [0, 2, 4]


def test_negative_zeros_are_zeros():
    importance = torch.tensor([[0.0, -0.0, 1.0, -0.0, 0.0]])
    assert_masks(random(1, 5), [0.0, 0.2, 0.4, 0.6, 0.8], importance=importance)


def test_importances_that_differ_in_the_last_bit():
    bits = torch.full((500,), 0x3F800000, dtype=torch.int32)
    bits += torch.randperm(500, dtype=torch.int32) % 100
    importance = bits.view(torch.float32).view(5, 100)
    assert_masks(random(5, 100), importance=importance)


def test_importances_of_every_size():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0x7F800001, (300, 500), generator=generator)
    importance = bits.to(torch.int32).view(torch.float32)
    importance[7, 7] = math.inf
    assert_masks(random(300, 500), importance=importance)
    tiny = (bits % 5000).to(torch.int32).view(torch.float32)  # subnormal
    tiny[0, 0] = 1.0
    assert_masks(random(300, 500), importance=tiny)


def test_many_sparsities():
    assert_masks(random(20, 300), [i / 1000 for i in range(1000)])
    assert_masks(random(20, 300).bfloat16(), [1 - 2 ** (-i / 4) for i in range(90)])


def test_a_huge_fisher_diagonal():
    weight = random(30, 40)
    weight[2] = 0
    fisher = random(30, 40, seed=1).square() * 1e35
    assert_masks(weight, [0.0, 0.5, 0.9], fisher=fisher, smoothing=0.1)
    with pytest.raises(ValueError, match="importances are beyond float32"):
        ops.distortion_table(weight, fisher, [4], smoothing=1e5)


MEMORY = """
import sys
import torch
from harness.memory import peak_rise
from fitcompress import ops

kind = sys.argv[1]
weight = torch.randn(2048, 2048).to(getattr(torch, sys.argv[2]))
if kind == "ties":
    weight = (weight * 2).round()
if kind == "zeros":
    weight = weight * (torch.rand(2048, 2048) > 0.8)
fisher = torch.rand(2048, 2048) if kind == "fisher" else None
bits = [2, 3, 4, 5, 6, 8] + ([16] if kind == "fine" else [])
steps = [2 ** (i / 8) / 16 for i in range(49)] if kind == "steps" else []
clips = (1.0, 0.5) if kind == "clips" else (1.0,)

def tabulate(weight, fisher):
    sparsities = [i / 16 for i in range(16)]
    ops.distortion_table(
        weight, fisher, bits, steps, sparsities, smoothing=1.0, clips=clips
    )

tabulate(weight[:100], None if fisher is None else fisher[:100])
rise = peak_rise(lambda: tabulate(weight, fisher))
print(rise / weight.nbytes)
"""


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("normal", "float32"),
        ("normal", "bfloat16"),
        ("fisher", "float32"),
        ("ties", "float32"),
        ("zeros", "bfloat16"),
        ("fine", "float32"),
        ("steps", "bfloat16"),
        ("clips", "float32"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads the mark of the process")
def test_memory(kind, dtype):
    """At most a tenth of the weight, on top of code that runs for the first time."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, kind, dtype],
        env={
            "PYTHONPATH": ":".join([str(BENCHMARKS), *sys.path]),
            # freed memory goes back, so that all that is in use is counted
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) <= 0.1


@pytest.mark.parametrize("kind", ["none", "fisher", "importance"])
def test_opcheck(kind):
    weight, other = random(3, 4), random(3, 4, seed=1).square()
    fisher = other if kind == "fisher" else None
    importance = other if kind == "importance" else None
    for group, clips in [(0, [1.0]), (-1, [0.5, 1.0]), (3, [1.0])]:
        torch.library.opcheck(
            torch.ops.fitcompress.distortion_table.default,
            (
                *(weight, fisher, importance, [2, 4], [0.25], [0.0, 0.5]),
                *(clips, 1.0, group, 0.5),
            ),
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
        ({"fisher": torch.ones(2, 3).half()}, "float32, got float16"),
        ({"fisher": -1.0}, "finite and ≥ 0, got -1"),
        ({"fisher": math.inf}, "finite and ≥ 0, got inf"),
        ({"bits": [4, 1]}, "bits must be between 2 and 16, got 1"),
        ({"bits": [17]}, "between 2 and 16, got 17"),
        ({"steps": [0.0]}, "positive float32 numbers, got 0"),
        ({"steps": [math.inf]}, "positive float32 numbers, got inf"),
        ({"steps": [1e-9]}, "codes up to 1e.09 for the largest weight, 1"),
        ({"sparsities": [0.5, 0.25]}, "got 0.25 after 0.5"),
        ({"sparsities": [1.0]}, r"ascend within \[0, 1\), got 1"),
        ({"sparsities": [math.nan]}, "got nan"),
        ({"sparsities": [0.0] * 32768}, "at most 32767 sparsities, got 32768"),
        ({"clips": []}, "at least one"),
        ({"clips": [1.5]}, r"clips must be in \[1e-30, 1\], got 1.5"),
        ({"clips": [1e-40]}, r"clips must be in \[1e-30, 1\], got 1"),
        ({"clips": [1.0, 0.0]}, r"clips must be in \[1e-30, 1\], got 0"),
        ({"clips": [math.nan]}, "got nan"),
        ({"smoothing": -1.0}, "smoothing must be at least 0, got -1"),
        ({"smoothing": math.nan}, "smoothing must be at least 0, got nan"),
        ({"granularity": "row"}, "'tensor' or a number of columns, got 'row'"),
        ({"granularity": 0}, "or a number of columns, got 0"),
        ({"granularity": True}, "or a number of columns, got True"),
        ({"granularity": 2.0}, "or a number of columns, got 2.0"),
        ({"weight": torch.ones(2, 3, device="meta")}, "one device, got cpu, meta"),
        ({"importance": torch.ones(2, 3, device="meta")}, "one device, got cpu, meta"),
        ({"dead_zone": 0.25}, "dead_zone must be at least 0.5 and finite, got 0.25"),
        ({"dead_zone": math.inf}, "at least 0.5 and finite, got inf"),
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


def test_the_mask_of_a_transposed_weight():
    weight, fisher = random(6, 9).T, random(6, 9, seed=1).square().T
    assert not weight.is_contiguous()
    assert_masks(weight)
    assert_masks(weight, fisher=fisher, smoothing=0.5)
    assert_masks(weight, importance=fisher)


def test_importances_beyond_float32_are_an_error():
    weight = torch.tensor([[1e20, 1.0], [-1e25, 2.0]])
    fisher = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="importances are beyond float32 for weights"):
        ops.distortion_table(weight, fisher, [4], smoothing=0.0)
    # magnitudes and given importances do not mind
    table = ops.distortion_table(weight, fisher, [4], [], [0.5])
    assert ops.level_mask(table, 0, weight).tolist() == [[True, False], [True, False]]
    table = ops.distortion_table(
        weight, fisher, [4], [], [0.5], importance=fisher, smoothing=0.0
    )
    mask = ops.level_mask(table, 0, weight, importance=fisher)
    assert mask.tolist() == [[False, True], [False, True]]
