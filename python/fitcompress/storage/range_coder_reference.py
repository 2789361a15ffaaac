"""The adaptive codec of ``_core`` once more, in plain Python: the same bytes.

For tests and for reading; a hundred times slower. A code x is a few yes/no questions
(is it 0? its sign? larger than 1? than 2? …), each coded with an adaptive probability
that is looked up by the magnitude to expect and by a linear prediction of x. Integers
only, fixed point: 256 is 1 unless said otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fitcompress.storage.binary_coder_reference import (
    HALF,
    AdaptiveBit,
    Coder,
    RangeDecoder,
    RangeEncoder,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

CODEC = 1
LARGEST_CODE = 1 << 30
LARGEST_PERIOD = 64
LARGEST_SCALE = 97
PERIODS = (9, 1, 25, 49, 3, 5, 7, 4, 16, 27)
SAMPLE = 1 << 16
MOST_WEIGHTS_PER_BYTE = 12000

TAPS, SCALES, GUESSES, UNARY = 8, 32, 16, 14


def scale_value(scale: int) -> int:
    """Mean magnitude that a scale byte stands for: four steps an octave."""
    return ((4 + (scale - 1) % 4) << ((scale - 1) // 4)) >> 2


def bucket_of(value: int, largest: int) -> int:
    """0 below 1/16, then two buckets an octave."""
    octave = max(value.bit_length() - 5, 0)
    value >>= octave
    return min(2 * octave + (value >= 16) + (value >= 24), largest)


class WeightModel:
    """Turns codes into bits with probabilities, learning from the codes before."""

    def __init__(
        self, coder: Coder, codes: NDArray[np.int32], period: int, scale: int
    ) -> None:
        self.coder = coder
        self.codes = codes
        self.period = period
        mean = self.mean = scale_value(scale)
        self.limit = min((mean >> 5) + 1, 1 << 15)
        self.step = (1 << 26) // (mean * mean // 128 + mean // 2 + 1)
        self.channel_sum = [12 * mean] * (codes.shape[1] // period)
        self.tap_weights = [self._first_taps(i) for i in range(period)]
        self.magnitude = [
            [self._first_questions(s) for _ in range(2 * GUESSES)]
            for s in range(SCALES)
        ]
        self.sign = [AdaptiveBit(22000 if g else HALF) for g in range(GUESSES)]
        self.exponent = [AdaptiveBit(HALF) for _ in range(30)]

    @staticmethod
    def _first_questions(s: int) -> list[AdaptiveBit]:
        e = 10 if s == 0 else (20 if s % 2 else 30) << ((s - 1) // 2)
        larger = [AdaptiveBit((e << 16) // (e + 600)) for _ in range(UNARY - 1)]
        return [AdaptiveBit((e << 16) // (e + 128)), *larger]

    def _first_taps(self, i: int) -> list[int]:
        """A quarter of the weight to the left, a quarter of the one above; Q20."""
        width = next(w for w in range(1, 65) if w * w >= self.period)
        if width * width != self.period:
            width = self.period
        taps = [0] * TAPS
        if i % width > 0:
            taps[0] = 1 << 18
        if i >= width and width <= TAPS:
            taps[width - 1] = 1 << 18
        return taps

    def _neighbours(self, r: int, c: int) -> list[int]:
        if self.period > 1:
            known = min(c % self.period, TAPS)
            found = {t: (r, c - 1 - t) for t in range(known)}
        else:
            half = TAPS // 2
            found = {t: (r, c - 1 - t) for t in range(min(c, half))}
            found |= {half + t: (r - 1 - t, c) for t in range(min(r, half))}
        return [self._clip(int(self.codes[found[t]])) if t in found else 0
                for t in range(TAPS)]  # fmt: skip

    def _clip(self, x: int) -> int:
        return min(max(x, -self.limit), self.limit)

    def code_all(self) -> None:
        """Code the matrix row by row; a reading coder fills it."""
        rows, cols = self.codes.shape
        for r in range(rows):
            row_sum = 8 * self.mean
            for c in range(cols):
                channel, position = divmod(c, self.period)
                seen = r * self.period + position + 12
                by_row = row_sum // (c + 8)
                by_channel = self.channel_sum[channel] // seen
                scale = bucket_of(by_row * by_channel // self.mean, SCALES - 1)
                taps = self._neighbours(r, c)
                weights = self.tap_weights[position]
                guess = sum(w * t for w, t in zip(weights, taps, strict=True)) >> 12

                x = self._code(int(self.codes[r, c]), scale, guess)
                self.codes[r, c] = x

                x = self._clip(x)
                error = 256 * x - guess
                for t in range(TAPS):
                    weight = weights[t] + (error * taps[t] * self.step >> 16)
                    weights[t] = min(max(weight, -1 << 22), 1 << 22)
                row_sum += 256 * abs(x)
                self.channel_sum[channel] += 256 * abs(x)

    def _code(self, x: int, scale: int, guess: int) -> int:
        size = abs(x)
        negative = guess < 0
        near = bucket_of(abs(guess), GUESSES - 1)
        if not self.magnitude[scale][near][0].code(self.coder, size > 0):
            return 0
        against = self.sign[near].code(self.coder, (x < 0) != negative)
        beyond = GUESSES - 1 if against and near > 0 else 0
        larger = self.magnitude[scale][beyond + near]
        m = 1
        while m < UNARY and larger[m].code(self.coder, size > m):
            m += 1
        if m == UNARY:
            m += self._escape(size - UNARY)
        return -m if against != negative else m

    def _escape(self, rest: int) -> int:
        """Exp-Golomb: the digits of rest + 1 counted, then those after the first."""
        wanted = max(rest, 0) + 1
        digits = 0
        while digits < 30 and self.exponent[digits].code(
            self.coder, wanted >> (digits + 1) != 0
        ):
            digits += 1
        value = 1
        for i in reversed(range(digits)):
            value = value << 1 | self.coder.code(bool(wanted >> i & 1), HALF)
        if value - 1 + UNARY > LARGEST_CODE:
            msg = f"coded weights: got a code of ±{value - 1 + UNARY}, wanted ±2^30"
            raise ValueError(msg)
        return value - 1


def _scale_of(codes: NDArray[np.int32]) -> int:
    total = int(np.abs(codes.astype(np.int64)).sum())
    if total == 0:
        return 0
    mean = total * 256 // codes.size
    return max(s for s in range(1, LARGEST_SCALE + 1) if scale_value(s) <= max(mean, 1))


def encoded_with(codes: NDArray[np.int32], period: int, scale: int) -> bytes:
    """The stream for a given number of weights per kernel and scale byte."""
    coder = RangeEncoder()
    WeightModel(coder, codes.copy(), period, scale).code_all()
    return bytes([CODEC, scale, period]) + coder.finish()


def encode(codes: NDArray[np.int32]) -> bytes:
    """Integer codes [rows, cols] as bytes."""
    scale = _scale_of(codes)
    if scale == 0:
        return bytes([CODEC, 0])
    some = codes[: max(SAMPLE // codes.shape[1], 1)]
    periods = [p for p in PERIODS if codes.shape[1] % p == 0]
    period = min(periods, key=lambda p: len(encoded_with(some, p, scale)))
    return encoded_with(codes, period, scale)


def decode(data: bytes, rows: int, cols: int) -> NDArray[np.int32]:
    """The codes that ``encode`` turned into these bytes.

    Raises:
        ValueError: the bytes are not what ``encode`` returns for such a matrix.
    """
    count = rows * cols
    codes = np.zeros((rows, cols), np.int32)
    if data == bytes([CODEC, 0]):
        return codes
    period = data[2] if len(data) > 2 else 0
    if (
        period == 0
        or data[0] != CODEC
        or not 1 <= data[1] <= LARGEST_SCALE
        or period > LARGEST_PERIOD
        or cols % period != 0
        or not 0 < count <= (len(data) + 8) * MOST_WEIGHTS_PER_BYTE
    ):
        msg = f"coded weights: no header of [{rows}, {cols}] codes: {data[:3]!r}"
        raise ValueError(msg)
    coder = RangeDecoder(data[3:])
    WeightModel(coder, codes, period, data[1]).code_all()
    coder.finish()
    return codes
