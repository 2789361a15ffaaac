"""The static codec of ``_core`` once more, in plain Python: the same bytes.

For tests and for reading; a thousand times slower. Codes become symbols, symbols
become sequences of a dictionary (``static_layout_reference``), and sequences become
bytes under an asymmetric numeral system, in blocks that do not depend on each other.
Section 4b of docs/format.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fitcompress.storage.static_layout_reference import (
    BITS,
    KINDS,
    LIMITS,
    ONE_STATE,
    Kind,
    Layout,
    choose_layout,
    decode_shares,
    encode_shares,
    error,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

CODEC = 2
LARGEST_CODE = 1 << 30
BLOCK = 1 << 18  # weights
MOST_STATES = 4
SMALLEST_STATE = 1 << 16


def _states_for(count: int) -> int:
    return 1 if count < ONE_STATE else MOST_STATES


def _sequences(layout: Layout, symbols: list[int]) -> list[int]:
    """Numbers of the sequences that the symbols are, the last one filled up."""
    numbers = {leaf.symbols: i for i, leaf in enumerate(layout.leaves)}
    found = []
    begun: tuple[int, ...] = ()
    for symbol in symbols:
        begun = (*begun, symbol)
        if begun in numbers:
            found.append(numbers[begun])
            begun = ()
    if begun:
        while begun not in numbers:
            begun = (*begun, layout.first_symbol)
        found.append(numbers[begun])
    return found


def _pack(numbers: list[int], layout: Layout, lanes: int) -> bytes:
    """The states, and the words that they shed."""
    states = [SMALLEST_STATE] * lanes
    words = []
    for i in reversed(range(len(numbers))):
        frequency = layout.frequencies[numbers[i]]
        x = states[i % lanes]
        if x >= frequency << (32 - layout.bits):
            words.append((x & 0xFFFF).to_bytes(2, "little"))
            x >>= 16
        x, slot = divmod(x, frequency)
        states[i % lanes] = (x << layout.bits) + slot + layout.firsts[numbers[i]]
    heads = [x.to_bytes(4, "little") for x in states]
    return b"".join([*heads, *reversed(words)])


def _pack_extra(codes: list[int], kind: Kind) -> bytes:
    """The extra bits of each code, the lowest first."""
    digits = []
    for code in codes:
        symbol = kind.symbol(code)
        if bits := kind.extra_bits(symbol):
            digits.append(f"{abs(code) - kind.first(symbol):0{bits}b}"[::-1])
    text = "".join(digits)
    return int(text[::-1] or "0", 2).to_bytes(-(-len(text) // 8), "little")


def _unpack(
    data: bytes, layout: Layout, lanes: int, count: int
) -> tuple[list[int], int]:
    """The symbols of a block, and where its words end."""
    position = 4 * lanes
    if len(data) < position:
        raise error("a block is truncated")
    states = [
        int.from_bytes(data[4 * lane : 4 * lane + 4], "little") for lane in range(lanes)
    ]
    if min(states) < SMALLEST_STATE:
        raise error("a block starts with an impossible state")
    slots = [i for i, f in enumerate(layout.frequencies) for _ in range(f)]
    symbols: list[int] = []
    lane = 0
    while len(symbols) < count:
        high, slot = divmod(states[lane], 1 << layout.bits)
        i = slots[slot]
        symbols += layout.leaves[i].symbols
        x = layout.frequencies[i] * high + slot - layout.firsts[i]
        if x < SMALLEST_STATE:
            if position + 2 > len(data):
                raise error("a block is truncated")
            x = x << 16 | int.from_bytes(data[position : position + 2], "little")
            position += 2
        states[lane] = x
        lane = (lane + 1) % lanes
    if any(symbol != layout.first_symbol for symbol in symbols[count:]):
        raise error("the last sequence of a block goes on wrongly")
    if any(x != SMALLEST_STATE for x in states):
        raise error("a block does not end where its encoder began")
    return symbols[:count], position


def _unpack_extra(data: bytes, symbols: list[int], kind: Kind) -> list[int]:
    """The codes that have these symbols and extra bits."""
    digits = "".join(f"{byte:08b}"[::-1] for byte in data)
    codes = []
    used = 0
    for symbol in symbols:
        bits = kind.extra_bits(symbol)
        extra = digits[used : used + bits]
        if len(extra) < bits:
            raise error("extra bits are missing")
        used += bits
        magnitude = kind.first(symbol) + int(extra[::-1] or "0", 2)
        codes.append(-magnitude if symbol < 0 else magnitude)
    if len(digits) - used >= 8 or "1" in digits[used:]:
        raise error("bits follow the last code")
    return codes


def length_bytes(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all bytes but the last have the eighth."""
    result = []
    while value >= 128:
        result.append(value & 127 | 128)
        value >>= 7
    return bytes([*result, value])


def _take_length(data: bytes, position: int) -> tuple[int, int]:
    """A length of bytes that come later, and where it ends."""
    length = 0
    for i, byte in enumerate(data[position : position + 6]):
        length |= (byte & 127) << (7 * i)
        if byte < 128:
            position += i + 1
            if (byte == 0 and i > 0) or length > len(data) - position:
                break
            return length, position
    raise error("a length is impossible")


def encoded_with(codes: NDArray[np.int32], layout: Layout) -> bytes:
    """The stream of a given layout, which has a symbol for every code."""
    flat: list[int] = codes.ravel().tolist()
    lanes = _states_for(len(flat))
    blocks = []
    for start in range(0, len(flat), BLOCK):
        part = flat[start : start + BLOCK]
        symbols = [layout.kind.symbol(code) for code in part]
        words = _pack(_sequences(layout, symbols), layout, lanes)
        blocks.append(words + _pack_extra(part, layout.kind))
    shares = encode_shares(layout.shares, layout.kind.symmetric)
    lengths = [length_bytes(len(block)) for block in blocks[:-1]]
    head = bytes([CODEC, layout.flags]) + length_bytes(len(shares)) + shares
    return b"".join([head, *lengths, *blocks])


def encode(codes: NDArray[np.int32]) -> bytes:
    """Integer codes [rows, cols], not all zero, as bytes."""
    return encoded_with(codes, choose_layout(codes))


def _take_layout(data: bytes) -> tuple[Layout, int]:
    flags = data[1]
    kind = Kind(flags >> 4, bool(flags & 8))
    if (flags >> 1 & 3) >= len(LIMITS) or kind.number >= len(KINDS):
        raise error(f"got flags {flags}, which mean nothing")
    limit = LIMITS[flags >> 1 & 3]
    size, position = _take_length(data, 2)
    shares = decode_shares(data[position : position + size], kind.symmetric)
    if len(shares) > limit:
        raise error(f"got {len(shares)} symbols, wanted at most {limit}")
    return Layout(kind, limit, BITS[flags & 1], shares), position + size


def layout_of(data: bytes) -> Layout:
    """The layout of a stream."""
    return _take_layout(data)[0]


def decode(
    data: bytes, rows: int, cols: int, largest: int = LARGEST_CODE
) -> NDArray[np.int32]:
    """The codes that ``encode`` turned into these bytes.

    Raises:
        ValueError: the bytes are not what ``encoded_with`` returns for such a matrix,
            or have codes beyond ±largest.
    """
    count = rows * cols
    lanes = _states_for(count)
    block_count = -(-count // BLOCK)
    if count < 1 or len(data) < 2 + block_count * (4 * lanes + 1) or data[0] != CODEC:
        raise error(f"no header of [{rows}, {cols}] codes: {data[:2]!r}")
    layout, position = _take_layout(data)
    kind = layout.kind
    widest = max(map(abs, layout.shares))
    if widest > (kind.class_of(LARGEST_CODE) if kind.number > 0 else largest):
        raise error(f"got a symbol of ±{widest}")
    lengths = []
    for _ in range(block_count - 1):
        length, position = _take_length(data, position)
        lengths.append(length)
    codes: list[int] = []
    for b in range(block_count):
        end = position + lengths[b] if b < len(lengths) else len(data)
        if end > len(data):
            raise error("a block ends outside")
        block = data[position:end]
        symbols, words = _unpack(block, layout, lanes, min(BLOCK, count - len(codes)))
        codes += _unpack_extra(block[words:], symbols, kind)
        position = end
    if (most := max(map(abs, codes))) > largest:
        raise error(f"got a code of ±{most}, wanted at most ±{largest}")
    return np.array(codes, np.int32).reshape(rows, cols)
