"""The static codec of _core on bytes that its encoder did not write: safe, strict."""

from contextlib import suppress
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitcompress import _core
from fitcompress.storage import static_coder_reference as reference
from fitcompress.storage import static_layout_reference as layouts
from fitcompress.storage.binary_coder_reference import RangeEncoder

BLOCK = reference.BLOCK


def encode(codes: np.ndarray) -> bytes:
    return _core.encode(codes, coding="static")


def of_list(codes: list[int]) -> np.ndarray:
    return np.array([codes], np.int32)


def sparse(shape: tuple[int, int], code: int) -> np.ndarray:
    """Almost only zeros, so that many weights take few bytes."""
    codes = np.zeros(shape, np.int32)
    codes[0, :3] = code
    codes[-1, -1] = -code
    return codes


SMALL = {
    "codes": of_list([0, 1, -1, 0, 0, 2, -3, 0, 1, 0, 0, 0]),
    "one symbol": of_list([5] * 20),
    "classes": of_list([300, -5, 70, 1000, 0, 0, 0, -300, 2]),
    "few classes": of_list([1 << 30, -(1 << 29)]),
    "four states": sparse((4, 1 << 13), 2),
    "four states, classes": sparse((4, 1 << 13), 1 << 20),
}


def decoded_or_refused(data: bytes, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        codes = _core.decode(data, *shape)
    except ValueError:
        return None
    assert codes.shape == shape
    assert codes.dtype == np.int32
    return codes


def check_accepted(data: bytes, codes: np.ndarray) -> None:
    """Under its layout, the stream is the only one of these codes."""
    assert data[0] == 2
    assert reference.encoded_with(codes, reference.layout_of(data)) == data


@pytest.mark.parametrize("name", SMALL)
def test_every_changed_byte(name: str) -> None:
    codes = SMALL[name]
    data = encode(codes)
    accepted = 0
    for place, change in product(range(len(data)), range(1, 256)):
        damaged = bytearray(data)
        damaged[place] ^= change
        result = decoded_or_refused(bytes(damaged), codes.shape)
        if result is None or damaged[0] != 2:
            continue
        accepted += 1
        if codes.size < 1000 or accepted < 5:
            check_accepted(bytes(damaged), result)
    assert accepted < 0.4 * 255 * len(data)  # extra bits can say anything


@pytest.mark.parametrize("name", SMALL)
def test_truncation_and_trailing_bytes(name: str) -> None:
    codes = SMALL[name]
    data = encode(codes)
    for n in range(len(data)):
        assert decoded_or_refused(data[:n], codes.shape) is None
    for extra in (b"\0", b"\1", b"\0\0", bytes(8), b"\xff" * 100):
        assert decoded_or_refused(data + extra, codes.shape) is None


@pytest.mark.parametrize("name", SMALL)
def test_other_shapes(name: str) -> None:
    codes = SMALL[name]
    data, (rows, cols) = encode(codes), codes.shape
    for shape in [(rows, cols + 20), (rows + 1, cols), (1, 1), (rows, 1 << 16)]:
        if shape != codes.shape and name != "one symbol":
            assert decoded_or_refused(data, shape) is None
    assert np.array_equal(_core.decode(data, cols, rows).ravel(), codes.ravel())


def same_verdict(data: bytes, shape: tuple[int, int]) -> None:
    codes = decoded_or_refused(data, shape)
    try:
        expected = reference.decode(data, *shape)
    except ValueError:
        expected = None
    assert (codes is None) == (expected is None)
    if codes is not None and expected is not None:
        assert np.array_equal(codes, expected)
        check_accepted(data, codes)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([name for name in SMALL if "four" not in name]),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 255)), max_size=3),
    st.integers(-2, 2),
)
def test_the_twin_refuses_the_same(
    name: str, changes: list[tuple[int, int]], longer: int
) -> None:
    data = bytearray(encode(SMALL[name]))
    data = data[: len(data) + longer] + bytes(max(longer, 0))
    for place, byte in changes:
        if 0 < place < len(data):
            data[place] = byte
    same_verdict(bytes(data), SMALL[name].shape)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 255), st.integers(1, 40))
def test_any_bytes(tail: bytes, flags: int, count: int) -> None:
    decoded_or_refused(tail, (1, count))
    same_verdict(bytes([2, flags]) + tail, (1, count))


@pytest.mark.parametrize("flags", range(256))
def test_flags(flags: int) -> None:
    data = bytearray(encode(SMALL["codes"]))
    data[1] = flags
    if (flags >> 1 & 3) == 3 or flags >> 4 > 9:
        with pytest.raises(ValueError, match=f"got flags {flags}, which mean nothing"):
            _core.decode(bytes(data), 1, 12)
    else:
        same_verdict(bytes(data), (1, 12))


def with_shares(roots: list[int], flags: int) -> bytes:
    """A stream with shares that the encoder does not write, and a state."""
    coder = RangeEncoder()
    with suppress(ValueError):
        layouts.code_roots(coder, roots, bool(flags & 8))
    shares = coder.finish()
    return bytes([2, flags, len(shares)]) + shares + (1 << 16).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("roots", "flags", "message"),
    [
        ([1 << 16], 0, None),
        ([(1 << 16) + 1], 0, "an impossible share"),
        ([1 << 17], 0, "an impossible share"),
        ([3, -1], 0, "an impossible share"),
        ([3, 0], 0, "the last share is impossible"),
        ([0], 0, "the last share is impossible"),
        ([3, 1], 8, "the last share is impossible"),
        ([3, 1, 1], 8, None),
        ([1] * 256, 0, "too many symbols"),
        ([1] * 255, 0, None),
        ([1] * 255, 2, "got 255 symbols, wanted at most 64"),
        ([1] * 17, 4, "got 17 symbols, wanted at most 16"),
        ([0] * 224 + [1], 1 << 4, None),
        ([0] * 226 + [1], 1 << 4, "got a symbol of ±113, wanted at most ±112"),
    ],
)
def test_shares(roots: list[int], flags: int, message: str | None) -> None:
    data = with_shares(roots, flags)
    same_verdict(data, (1, 100))
    if message is None:
        assert reference.layout_of(data).shares
    else:
        with pytest.raises(ValueError, match=message):
            _core.decode(data, 1, 100)


@pytest.mark.parametrize(
    "length",
    [
        "00",
        "01",
        "02",
        "04",
        "09",
        "7f",
        "8200",
        "828000",
        "ff7f",
        "ffffffffff7f",
        "ff" * 9,
    ],
)
def test_lengths_of_shares_that_lie(length: str) -> None:
    data = encode(SMALL["codes"])
    size = data[2]
    assert len(bytes.fromhex(length)) > 1 or int(length, 16) != size
    same_verdict(data[:2] + bytes.fromhex(length) + data[3:], (1, 12))
    with pytest.raises(ValueError, match="coded weights"):
        _core.decode(data[:2] + bytes.fromhex(length) + data[3:], 1, 12)


@pytest.fixture(scope="module")
def two_blocks() -> tuple[np.ndarray, bytes, int]:
    """Codes, their stream, and where the length of the first block stands."""
    codes = sparse((2, BLOCK // 2 + 50), 3)
    codes[0, ::300] = 1
    data = encode(codes)
    return codes, data, 3 + data[2]


def test_lengths_of_blocks_that_lie(
    two_blocks: tuple[np.ndarray, bytes, int],
) -> None:
    codes, data, place = two_blocks
    size = data[place] & 127 | data[place + 1] << 7
    head, tail = data[:place], data[place + 2 :]
    assert 128 <= size < len(tail)
    assert head + reference.length_bytes(size) + tail == data
    for other in (0, 1, 16, size - 2, size - 1, size + 1, size + 2, len(tail), 1 << 40):
        damaged = head + reference.length_bytes(other) + tail
        assert decoded_or_refused(damaged, codes.shape) is None
    with pytest.raises(ValueError, match="a length is impossible"):
        _core.decode(head + bytes([data[place], data[place + 1] | 128, 0]) + tail,
                     *codes.shape)  # fmt: skip


def test_lengths_of_blocks_that_end_outside_together() -> None:
    codes = sparse((3, BLOCK - 9), 3)
    data = encode(codes)
    place = 3 + data[2]
    assert max(data[place], data[place + 1]) < 128
    left = len(data) - place - 2
    damaged = data[:place] + bytes([left - 1, 20]) + data[place + 2 :]
    with pytest.raises(ValueError, match="a block ends outside"):
        _core.decode(damaged, *codes.shape)


@pytest.mark.parametrize("threads", [1, 3])
def test_damage_in_blocks(
    two_blocks: tuple[np.ndarray, bytes, int], threads: int
) -> None:
    # A block that fails on another thread fails here.
    codes, data, place = two_blocks
    refused = 0
    for i in range(8 * place, 8 * len(data), 37):
        damaged = bytearray(data)
        damaged[i // 8] ^= 1 << i % 8
        try:
            result = _core.decode(bytes(damaged), *codes.shape, threads=threads)
            assert not np.array_equal(result, codes)
        except ValueError:
            refused += 1
    assert refused > 0.9 * 8 * (len(data) - place) / 37


@pytest.mark.parametrize("most", [1, 100, 127, 128, 300, 1 << 30])
def test_largest(most: int) -> None:
    for code in (most, -most):
        codes = of_list([0, 1, code, 0])
        data = encode(codes)
        scale = np.ones(1, np.float32)
        assert np.array_equal(_core.decode(data, 1, 4, largest=most), codes)
        for least in (most - 1, 0, -5):
            with pytest.raises(ValueError, match=f"wanted at most ±{max(least, 0)}"):
                _core.decode(data, 1, 4, largest=least)
            with pytest.raises(ValueError, match=f"wanted at most ±{max(least, 0)}"):
                _core.dequantize(data, 1, 4, scale, largest=least)


def test_no_code_is_beyond_the_largest_of_all() -> None:
    # The class of 2^30 could hold more, with other extra bits.
    data = bytearray(encode(of_list([1 << 30, 1])))
    assert data[-4:] == bytes(4)
    data[-4] = 1
    with pytest.raises(ValueError, match="got a code of ±1073741825"):
        _core.decode(bytes(data), 1, 2, largest=1 << 40)


@pytest.mark.parametrize(
    ("data", "rows", "cols", "message"),
    [
        (b"\x02", 1, 1, "got 1 bytes, wanted at least 2"),
        (b"\x02\x00", 1, 1, "truncated, got 2 bytes for 1 weights"),
        (b"\x02\x00" + bytes(9), 0, 5, "got a stream of nothing, wanted codec 1"),
        (b"\x02\x00" + bytes(9), -1, 5, r"shape: got \(-1, 5\)"),
        (b"\x02\x00" + bytes(9), 1 << 40, 1 << 40, "wanted at most 2\\^32 weights"),
        (b"\x02\x00" + bytes(9), 1 << 63, 1, None),
        (b"\x02\x06" + bytes(9), 1, 1, "got flags 6, which mean nothing"),
        # 16 GiB of codes need 17 bytes for each of 2^14 blocks: refused before there
        # is memory for them.
        (b"\x02\x00" + bytes(9), 1 << 16, 1 << 16, "truncated, got 11 bytes"),
        (b"\x02\x00" + bytes((17 << 14) - 1), 1 << 16, 1 << 16, "truncated, got 278"),
    ],
)
def test_impossible_streams_are_refused(
    data: bytes, rows: int, cols: int, message: str | None
) -> None:
    with pytest.raises(ValueError if message else TypeError, match=message):
        _core.decode(data, rows, cols)
    scale = np.ones(1, np.float32)
    with pytest.raises(ValueError if message else TypeError, match=message):
        _core.dequantize(data, rows, cols, scale)


def test_a_block_that_goes_on_or_starts_wrongly() -> None:
    data = encode(of_list([1, 0, -1, 2]))
    with pytest.raises(ValueError, match="goes on wrongly"):
        _core.decode(data, 1, 3)
    with pytest.raises(ValueError, match="starts with an impossible state"):
        _core.decode(data[:-4] + b"\xff\xff\0\0", 1, 4)
    with pytest.raises(ValueError, match="does not end where"):
        _core.decode(data[:-1] + b"\2", 1, 4)
    with pytest.raises(ValueError, match="follow the end"):
        _core.decode(data + b"\0", 1, 4)
