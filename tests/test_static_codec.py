"""The static codec of _core: lossless, the bytes of its twin, as small as promised."""

import re
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fitcompress import _core
from fitcompress.storage import range_coder_reference
from fitcompress.storage import static_coder_reference as reference
from fitcompress.storage import static_layout_reference as layouts

LARGEST = 1 << 30
BLOCK = reference.BLOCK
FORMAT = Path(__file__).parents[1] / "docs" / "format.md"

matrices = hnp.arrays(
    np.int32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=12),
    elements=st.one_of(
        st.integers(-2, 2),
        st.integers(-40, 40),
        st.integers(-129, 129),
        st.integers(-LARGEST, LARGEST),
    ),
)
mosts = st.sampled_from([1, 2, 9, 40, 127, 128, 1000, LARGEST])


def laplacian(scale: float, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).laplace(scale=scale, size=shape)
    return np.rint(values).astype(np.int32)


def quantized(bits: int, sparsity: float, shape: tuple[int, int]) -> np.ndarray:
    """Gaussian weights on a fixed-point grid, the smallest ones pruned."""
    weights = np.random.default_rng(bits).normal(size=shape)
    size = np.abs(weights)
    weights[size < np.quantile(size, sparsity)] = 0
    most = 2 ** (bits - 1) - 1
    step = 0.8 * size.max() / most
    return np.clip(np.rint(weights / step), -most, most).astype(np.int32)


def order0_bytes(codes: np.ndarray) -> float:
    counts = np.unique(codes, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) * codes.size / 8


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def encode(codes: np.ndarray, threads: int = 1) -> bytes:
    return _core.encode(codes, coding="static", threads=threads)


def check(codes: np.ndarray) -> None:
    """Both codecs write the same bytes, and each reads them."""
    data = encode(codes)
    assert data[0] == 2
    assert data == reference.encode(codes)
    assert same(_core.decode(data, *codes.shape), codes)
    assert same(reference.decode(data, *codes.shape), codes)


@settings(max_examples=300, deadline=None)
@given(matrices)
def test_bytes_of_the_python_twin(codes: np.ndarray) -> None:
    assume(codes.any())
    check(codes)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300), mosts, st.floats(0, 1), st.integers(0))
def test_round_trip(rows: int, cols: int, most: int, zeros: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-most, most + 1, (rows, cols)).astype(np.int32)
    codes[rng.random(codes.shape) < zeros] = 0
    for coding in ("static", "smallest"):
        data = _core.encode(codes, coding=coding)
        assert same(_core.decode(data, *codes.shape), codes)


@pytest.mark.parametrize(
    "codes",
    [
        *([[c]] for c in (1, -1, 127, -127, 128, -128, LARGEST, -LARGEST, LARGEST - 1)),
        [[-3] * 30],
        [[5] * 7],
        [[5] * 8],
        [[5] * 9],
        [[1, -1] * 50],
        [[127, -127] * 50],
        [[128, -128] * 50],
        [[LARGEST, -LARGEST] * 20],
        [[-1], [-2], [-3], [-100]],
        [list(range(-127, 128))],
        [list(range(-140, 140))],
        [[1 << i for i in range(31)], [-(1 << i) for i in range(31)]],
        [[(1 << i) - 1 for i in range(31)], [1 - (1 << i) for i in range(31)]],
    ],
    ids=str,
)
def test_peculiar_codes(codes: list[list[int]]) -> None:
    check(np.array(codes, np.int32))


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (16, 27), (181, 181), (182, 182)])
@pytest.mark.parametrize("scale", [0.2, 1.5, 60.0, 1e6])
def test_layers(shape: tuple[int, int], scale: float) -> None:
    # 181² < 2^15 < 182²: from there on there are four states.
    codes = laplacian(scale, shape)
    codes[0, 0] = 1
    check(codes)


@pytest.mark.parametrize("spread", [2, 400])
def test_blocks(spread: int) -> None:
    # Three blocks, the last one short. Blocks know nothing of each other.
    codes = laplacian(spread, (2, BLOCK + 5))
    codes[1] //= 2
    data = encode(codes)
    assert data == reference.encode(codes)
    assert same(_core.decode(data, *codes.shape), codes)
    assert same(reference.decode(data, *codes.shape), codes)


LAYOUTS = [
    layouts.Layout(layouts.Kind(number, symmetric), limit, bits, {})
    for number in range(10)
    for symmetric in (False, True)
    for limit in layouts.LIMITS
    for bits in layouts.BITS
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: f"{each.flags:02x}")
@pytest.mark.parametrize("most", [3, 30, LARGEST])
def test_every_layout_is_read(layout: layouts.Layout, most: int) -> None:
    # Also those that our encoder would not choose.
    codes = np.random.default_rng(most).integers(-most, most + 1, (3, 70), np.int32)
    codes = np.where(codes % 3 == 0, codes, np.sign(codes)).astype(np.int32)
    kind, limit, bits = layout.kind, layout.limit, layout.bits
    layout = layouts.layout_for(codes, kind, limit, bits)
    if len(layout.shares) > limit or (kind.number == 0 and most > 127):
        return
    data = reference.encoded_with(codes, layout)
    assert same(_core.decode(data, *codes.shape), codes)
    assert reference.layout_of(data) == layout


FIXED = [
    ([[1, 0, -1, 2]], "020002fce0b0040001"),
    ([[300, 0, -5]], "023504d0f4117b482b51002c"),
    ([[0, 1, -1], [2, 0, 0], [-20, 0, 3]], "020d04d7dd2346550b2801bfc1"),
    ([[7]], "025802f5110000000101"),
    ([[-LARGEST]], "02480383001d0008000100000000"),
    ([[LARGEST, -1, 0, 200]], "024d0583eb1e9a9e89565e090000000001"),
    (
        [[5, -5, 0, 0, 1, 0] * 20],
        "020507f5c7c78e30ca284d06260b622082b88d1a53c9399792c899b053c40c3851c659b48748"
        "eab7",
    ),
]


@pytest.mark.parametrize(("codes", "data"), FIXED, ids=lambda x: str(x)[:30])
def test_streams_are_fixed(codes: list[list[int]], data: str) -> None:
    # Files outlive versions: these bytes must decode to these codes for ever.
    matrix = np.array(codes, np.int32)
    stream = bytes.fromhex(data)
    assert same(_core.decode(stream, *matrix.shape), matrix)
    assert encode(matrix) == stream


def test_examples_of_the_specification() -> None:
    text = FORMAT.read_text(encoding="utf-8").replace("−", "-")
    found = re.findall(r"`(\[\[[-0-9, \[\]]+\]\])` is\s+`([0-9a-f ]+)`", text)
    assert [data[:2] for _, data in found] == ["01"] * 3 + ["02"] * 2
    for codes, data in found:
        rows = [
            re.findall(r"-?\d+", row) for row in re.findall(r"\[([^\[\]]+)\]", codes)
        ]
        matrix = np.array(rows, np.int64).astype(np.int32)
        stream = bytes.fromhex(data)
        twin = range_coder_reference if stream[0] == 1 else reference
        coding = "adaptive" if stream[0] == 1 else "static"
        assert _core.encode(matrix, coding=coding) == stream
        assert twin.encode(matrix) == stream
        assert same(_core.decode(stream, *matrix.shape), matrix)


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("bits", range(2, 9))
def test_size_of_independent_codes(bits: int, sparsity: float) -> None:
    codes = quantized(bits, sparsity, (250, 400))
    assert len(encode(codes)) < 1.01 * order0_bytes(codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_size_of_many_independent_codes(bits: int) -> None:
    codes = quantized(bits, 0.5, (1000, 1000))
    assert len(encode(codes)) < 1.006 * order0_bytes(codes)


@settings(max_examples=100, deadline=None)
@given(matrices)
def test_smallest_is_the_smaller_one(codes: np.ndarray) -> None:
    smallest = _core.encode(codes)
    both = [_core.encode(codes, coding=name) for name in ("static", "adaptive")]
    assert smallest == min(both, key=len)  # of equals the static one


def test_smallest_takes_either() -> None:
    independent = quantized(5, 0.5, (250, 400))
    by_row = np.vstack([laplacian(4.0**i, (16, 256), i) for i in range(4)])
    assert _core.encode(independent)[0] == 2
    assert _core.encode(by_row)[0] == 1


@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (3, 5)])
def test_zeros_are_left_to_the_adaptive_codec(shape: tuple[int, int]) -> None:
    assert encode(np.zeros(shape, np.int32)) == b"\1\0"


def test_unknown_codings_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'fast', wanted smallest, adaptive or"):
        _core.encode(np.ones((1, 1), np.int32), coding="fast")


@pytest.mark.parametrize("code", [LARGEST + 1, -LARGEST - 1, -(1 << 31)])
def test_codes_out_of_range_are_refused(code: int) -> None:
    codes = np.array([[0, 0, code]], np.int32)
    with pytest.raises(ValueError, match=f"got {code} at flat index 2"):
        encode(codes)


def test_a_matrix_that_is_not_contiguous() -> None:
    codes = laplacian(1.0, (40, 60))[::2, ::-3]
    assert same(_core.decode(encode(codes), *codes.shape), codes)


@pytest.fixture(scope="module", params=[2, 400], ids=["bytes", "classes"])
def blocks(request: pytest.FixtureRequest) -> np.ndarray:
    """Rows that end inside of blocks, four of them."""
    return laplacian(request.param, (11, 3 * BLOCK // 11 + 997))


@pytest.mark.parametrize("threads", [-1, 0, 2, 5, 1000])
def test_threads_change_nothing(blocks: np.ndarray, threads: int) -> None:
    data = encode(blocks)
    assert encode(blocks, threads) == data
    assert same(_core.decode(data, *blocks.shape, threads=threads), blocks)


def scales_for(rows: int, count: int) -> np.ndarray:
    values = np.random.default_rng(rows).normal(size=count) * 0.01
    return values.astype(np.float32)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("per_row", [False, True])
def test_values_of_blocks(blocks: np.ndarray, threads: int, per_row: bool) -> None:
    rows = blocks.shape[0]
    scales = scales_for(rows, rows if per_row else 1)
    values = _core.dequantize(encode(blocks), *blocks.shape, scales, threads=threads)
    assert same(values, blocks.astype(np.float32) * scales[:, None])


@settings(max_examples=200, deadline=None)
@given(matrices, st.booleans(), st.sampled_from(["static", "adaptive"]))
def test_values(codes: np.ndarray, per_row: bool, coding: str) -> None:
    # Scales of either sign: zeros have signs too.
    rows = codes.shape[0]
    scales = scales_for(rows, rows if per_row else 1)
    values = _core.dequantize(_core.encode(codes, coding=coding), *codes.shape, scales)
    assert same(values, codes.astype(np.float32) * scales[:, None])


def test_wrong_scales_are_refused() -> None:
    data = encode(np.ones((3, 4), np.int32))
    for shape in ((2,), (4,), (3, 1), (), (0,)):
        with pytest.raises(ValueError, match="scales: got"):
            _core.dequantize(data, 3, 4, np.ones(shape, np.float32))
    with pytest.raises(TypeError, match="wanted float32"):
        _core.dequantize(data, 3, 4, np.ones(1))
