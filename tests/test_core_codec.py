"""The entropy coder of _core: lossless, as small as promised, safe on any bytes."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitcompress import _core
from fitcompress.storage import range_coder_reference as reference

LARGEST = 1 << 30
matrices = hnp.arrays(
    np.int32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=12),
    elements=st.one_of(
        st.integers(-2, 2), st.integers(-40, 40), st.integers(-LARGEST, LARGEST)
    ),
)


def laplacian(scale: float, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).laplace(scale=scale, size=shape)
    return np.rint(values).astype(np.int32)


def smooth_kernels(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """3x3 kernels whose nine weights share half of their variance."""
    rng = np.random.default_rng(seed)
    rows, channels, _ = shape
    weights = rng.laplace(size=shape) + rng.laplace(size=(rows, channels, 1))
    return np.rint(weights).astype(np.int32).reshape(rows, channels * 9)


def order0_bytes(codes: np.ndarray) -> float:
    counts = np.unique(codes, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) * codes.size / 8


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())


@settings(max_examples=300, deadline=None)
@given(matrices)
def test_round_trip(codes: np.ndarray) -> None:
    assert same(
        _core.decode(_core.encode(codes, coding="adaptive"), *codes.shape), codes
    )


@settings(max_examples=60, deadline=None)
@given(matrices)
def test_bytes_of_the_python_twin(codes: np.ndarray) -> None:
    data = _core.encode(codes, coding="adaptive")
    assert data == reference.encode(codes)
    assert same(reference.decode(data, *codes.shape), codes)


@pytest.mark.parametrize("shape", [(16, 27), (8, 72), (4, 100), (3, 147), (30, 17)])
@pytest.mark.parametrize("scale", [0.2, 1.5, 30.0])
def test_bytes_of_the_python_twin_on_layers(
    shape: tuple[int, int], scale: float
) -> None:
    codes = laplacian(scale, shape)
    data = _core.encode(codes, coding="adaptive")
    assert data == reference.encode(codes)
    assert same(reference.decode(data, *shape), codes)


def test_stream_is_fixed() -> None:
    # Files outlive versions: these bytes must decode to these codes for ever.
    codes = np.array([[0, 1, -1], [2, 0, 0], [-20, 0, 3]], np.int32)
    data = bytes.fromhex("012701f68e17691bb5")
    assert _core.encode(codes, coding="adaptive") == data
    assert same(_core.decode(data, 3, 3), codes)


@pytest.mark.parametrize(
    ("codes", "size"),
    [
        (np.zeros((0, 7), np.int32), 2),
        (np.zeros((7, 0), np.int32), 2),
        (np.zeros((1000, 1000), np.int32), 2),
        (np.ones((1, 1), np.int32), 4),
        (np.full((100, 100), 3, np.int32), 50),
    ],
)
def test_trivial_matrices_take_few_bytes(codes: np.ndarray, size: int) -> None:
    data = _core.encode(codes, coding="adaptive")
    assert len(data) <= size
    assert same(_core.decode(data, *codes.shape), codes)


@pytest.mark.parametrize(
    ("scale", "shape", "bound"),
    [
        # Independent codes: order-0 is the limit, what is above it is the price of
        # learning. 400 weights cost 9 bytes more than 118, 4 million 0.3 %.
        (1.0, (20, 20), 1.10),
        (1.0, (32, 144), 1.02),
        (0.3, (64, 576), 1.02),
        (1.0, (64, 576), 1.01),
        (3.0, (64, 576), 1.015),
        (1.0, (2000, 2000), 1.003),
    ],
)
def test_size_of_independent_codes(
    scale: float, shape: tuple[int, int], bound: float
) -> None:
    codes = laplacian(scale, shape)
    assert len(_core.encode(codes, coding="adaptive")) < bound * order0_bytes(codes)


def test_size_below_order0_where_rows_and_columns_differ() -> None:
    # Scales spread over a factor of 4 both ways, as channels of real layers do.
    rng = np.random.default_rng(0)
    scales = 2 ** rng.uniform(-1, 1, (64, 1)) * 2 ** rng.uniform(-1, 1, (1, 512))
    codes = np.rint(rng.laplace(size=(64, 512)) * scales).astype(np.int32)
    assert len(_core.encode(codes, coding="adaptive")) < 0.97 * order0_bytes(codes)


def test_size_below_order0_where_kernels_are_smooth() -> None:
    codes = smooth_kernels((64, 64, 9))
    assert len(_core.encode(codes, coding="adaptive")) < 0.94 * order0_bytes(codes)


def test_a_matrix_that_is_not_contiguous() -> None:
    codes = laplacian(1.0, (40, 60))[::2, ::-3]
    assert same(
        _core.decode(_core.encode(codes, coding="adaptive"), *codes.shape), codes
    )


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.uint32])
def test_other_dtypes_are_refused(dtype: type) -> None:
    with pytest.raises(TypeError, match="int32"):
        _core.encode(np.ones((2, 2), dtype))


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2), ()])
def test_other_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"got {len(shape)} dimensions, wanted 2"):
        _core.encode(np.ones(shape, np.int32))


@pytest.mark.parametrize("code", [LARGEST + 1, -LARGEST - 1, -(1 << 31)])
def test_codes_out_of_range_are_refused(code: int) -> None:
    codes = np.array([[0, 0, code]], np.int32)
    with pytest.raises(ValueError, match=f"got {code} at flat index 2"):
        _core.encode(codes, coding="adaptive")


@pytest.mark.parametrize(
    ("data", "rows", "cols", "message"),
    [
        (b"", 1, 1, "got 0 bytes, wanted at least 2"),
        (b"\x01", 1, 1, "got 1 bytes, wanted at least 2"),
        (b"\x03\x00", 1, 1, "got codec 3, wanted 1 or 2"),
        (b"\x01\x00\x00", 1, 1, "got 3 bytes of zeros, wanted 2"),
        (b"\x01\x05", 1, 1, "got 2 bytes, wanted at least 3"),
        (b"\x01\x05\x01", 0, 9, "got scale 5 for 0 weights"),
        (b"\x01\x62\x01", 1, 1, "got scale 98 for 1 weights, wanted at most 97"),
        (b"\x01\x05\x00", 1, 1, "got kernels of 0 weights"),
        (b"\x01\x05\x09", 1, 10, "got kernels of 9 weights, wanted a divisor of 10"),
        (b"\x01\x05\x41", 1, 65, "got kernels of 65 weights"),
        (b"\x01\x05\x01\xff\xff\xff\xff", 1, 1, "no stream starts so"),
        (b"\x01\x00", -1, 1, r"got \(-1, 1\)"),
        (b"\x01\x00", 1 << 40, 1 << 40, "wanted at most 2\\^32 weights"),
        (b"\x01\x00", 1 << 40, 0, "wanted at most 2\\^32 weights"),
    ],
)
def test_impossible_streams_are_refused(
    data: bytes, rows: int, cols: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _core.decode(data, rows, cols)


def test_a_short_stream_reserves_no_memory() -> None:
    # 16 GiB of codes cannot come out of 20 bytes: refused before they are reserved.
    with pytest.raises(ValueError, match="truncated, got 20 bytes for 4294967296"):
        _core.decode(b"\x01\x05\x01" + bytes(17), 1 << 16, 1 << 16)


def decoded_or_refused(data: bytes, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        codes = _core.decode(data, *shape)
    except ValueError:
        return None
    assert codes.shape == shape
    assert codes.dtype == np.int32
    return codes


def test_truncation_at_every_length() -> None:
    # There is no checksum here (the container has one), but little slips through.
    codes = laplacian(1.0, (16, 27))
    data = _core.encode(codes, coding="adaptive")
    cut = [decoded_or_refused(data[:n], codes.shape) for n in range(len(data))]
    assert all(c is None for c in cut[:-2])


def test_trailing_bytes_are_refused() -> None:
    codes = laplacian(1.0, (16, 27))
    data = _core.encode(codes, coding="adaptive")
    for extra in (b"\0", b"\1", bytes(8), b"\xff" * 100):
        with pytest.raises(ValueError, match="wanted"):
            _core.decode(data + extra, *codes.shape)


def test_flipped_bits() -> None:
    # Nine of ten are noticed because the stream should have ended elsewhere.
    codes = laplacian(1.0, (16, 27))
    data = _core.encode(codes, coding="adaptive")
    silent = 0
    for i in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[i // 8] ^= 1 << i % 8
        result = decoded_or_refused(bytes(damaged), codes.shape)
        assert result is None or not same(result, codes)
        silent += result is not None
    assert silent < 0.2 * 8 * len(data)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200),
    st.integers(0, 97),
    st.sampled_from([1, 3, 9]),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_any_bytes(
    tail: bytes, scale: int, period: int, rows: int, kernels: int
) -> None:
    shape = rows, kernels * period
    decoded_or_refused(tail, shape)
    data = bytes([1, scale, period]) + tail
    codes = decoded_or_refused(data, shape)
    if codes is not None and scale > 0:
        # What is accepted is a stream of its own codes: no two streams say the same.
        expected = reference.encoded_with(codes, period, scale)
        assert data == expected
