"""Yes/no questions as bytes, in plain Python: what both twins of the codecs share.

A range coder for answers of known probability, and a probability that is learnt from
answers. Section 4 of docs/format.md.
"""

from __future__ import annotations

from typing import Protocol

HALF = 1 << 15  # the probability ½
WINDOW = 1 << 32
LARGEST_COUNT = 255


class Coder(Protocol):
    """Writes or reads one bit."""

    def code(self, bit: bool, p: int) -> bool:
        """Code a bit that is 1 with probability p / 2^16; return it."""


def _shortest_tail(low: int, size: int) -> tuple[int, int]:
    """Bytes and value of the shortest zero-extended string in [low, low + size)."""
    for count in range(4):
        unit = 1 << (32 - 8 * count)
        value = -(-low // unit) * unit
        if value < low + size:
            return count, value
    return 4, low


class RangeEncoder:
    """Keeps the interval [low, low + size) that the bits so far select."""

    def __init__(self) -> None:
        self.low = 0  # all digits: Python's integers carry by themselves
        self.size = WINDOW - 1
        self.shifts = 0

    def code(self, bit: bool, p: int) -> bool:
        """Append a bit."""
        bound = self.size * p >> 16
        if bit:
            self.size = bound
        else:
            self.low += bound
            self.size -= bound
        while self.size < 1 << 24:
            self.low <<= 8
            self.size <<= 8
            self.shifts += 1
        return bit

    def finish(self) -> bytes:
        """All bytes of the stream."""
        window = self.low % WINDOW
        count, tail = _shortest_tail(window, self.size)
        value = self.low - window + tail
        return (value >> (32 - 8 * count)).to_bytes(self.shifts + count, "big")


class RangeDecoder:
    """Follows the encoder's interval, and where in it the stream lies."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.low = 0
        self.size = WINDOW - 1
        self.offset = 0
        for _ in range(4):
            self.offset = self.offset << 8 | self._next()
        if self.offset >= self.size:
            msg = "coded weights: no stream starts so"
            raise ValueError(msg)

    def _next(self) -> int:
        i = self.position
        self.position += 1
        if i >= len(self.data) + 4:
            msg = f"coded weights: truncated, got {len(self.data)} bytes, wanted more"
            raise ValueError(msg)
        return self.data[i] if i < len(self.data) else 0

    def code(self, bit: bool, p: int) -> bool:
        """Read a bit."""
        bound = self.size * p >> 16
        bit = self.offset < bound
        if bit:
            self.size = bound
        else:
            self.low += bound
            self.offset -= bound
            self.size -= bound
        while self.size < 1 << 24:
            self.offset = self.offset << 8 | self._next()
            self.low <<= 8
            self.size <<= 8
        return bit

    def finish(self) -> None:
        """Raise unless the stream ends as the encoder ends it."""
        low = self.low % WINDOW
        count, tail = _shortest_tail(low, self.size)
        wanted = self.position - 4 + count
        if len(self.data) != wanted or self.offset != tail - low:
            msg = f"coded weights: got {len(self.data)} bytes, wanted {wanted}"
            raise ValueError(msg)


class AdaptiveBit:
    """A probability of 1, p / 2^22, and from how many bits it was learnt."""

    def __init__(self, p16: int) -> None:
        self.p = p16 << 6
        self.count = 4

    def code(self, coder: Coder, bit: bool) -> bool:
        """Code a bit and learn from it, fast at first."""
        bit = coder.code(bit, min(max(self.p >> 6, 32), 65504))
        target = (1 << 22) - 1 if bit else 0
        self.p += (target - self.p) * (131072 // (2 * self.count + 3)) >> 16
        self.count = min(self.count + 1, LARGEST_COUNT)
        return bit
