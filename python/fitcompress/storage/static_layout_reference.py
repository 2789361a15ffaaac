"""What all blocks of a static stream have in common, in plain Python.

The symbols that codes become, how often each occurs, and the dictionary of sequences
that follows from it. Section 4b of docs/format.md.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from fitcompress.storage.binary_coder_reference import (
    HALF,
    AdaptiveBit,
    Coder,
    RangeDecoder,
    RangeEncoder,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

ONE_STATE = 1 << 15  # weights below which one must do
LIMITS = (256, 64, 16)  # of sequences
BITS = (12, 15)  # of frequencies
LONGEST_SEQUENCE = 8
ONE = 1 << 31  # the probability 1
SYMBOLS = 255
LARGEST_ROOT = 1 << 16
# What symbols may be: codes, or classes with so many plain and split bits.
KINDS = ((0, 0), (6, 1), (5, 1), (4, 1), (3, 1), (2, 1), (1, 1), (4, 2), (3, 2), (2, 2))


def error(what: str) -> ValueError:
    """What every fault of a stream is raised as."""
    return ValueError(f"coded weights: {what}")


class Kind(NamedTuple):
    """What a symbol is: a code, or a class of codes with extra bits."""

    number: int
    symmetric: bool  # a symbol and its negative have the same share

    def class_of(self, magnitude: int) -> int:
        """The symbol of codes of that magnitude, without its sign."""
        plain, split = KINDS[self.number]
        if self.number == 0 or magnitude < 1 << plain:
            return magnitude
        octave = magnitude.bit_length() - 1
        h = magnitude >> (octave - split) & ((1 << split) - 1)
        return (1 << plain) + (octave - plain << split) + h

    def symbol(self, code: int) -> int:
        """The symbol of a code."""
        return self.class_of(code) if code >= 0 else -self.class_of(-code)

    def extra_bits(self, symbol: int) -> int:
        """How many bits tell the codes of a symbol apart."""
        plain, split = KINDS[self.number]
        beyond = abs(symbol) - (1 << plain)
        if self.number == 0 or beyond < 0:
            return 0
        return plain - split + (beyond >> split)

    def first(self, symbol: int) -> int:
        """The smallest magnitude of a symbol."""
        plain, split = KINDS[self.number]
        beyond = abs(symbol) - (1 << plain)
        if self.number == 0 or beyond < 0:
            return abs(symbol)
        h = beyond & ((1 << split) - 1)
        return ((1 << split) + h) << self.extra_bits(symbol)


def symbol_at(place: int) -> int:
    """The symbol at a place in the order 0, 1, -1, 2, -2 and so on."""
    return (place + 1) // 2 if place % 2 else -(place // 2)


def place_of(symbol: int) -> int:
    """The place of a symbol."""
    return 2 * symbol - 1 if symbol > 0 else -2 * symbol


def _rounded_root(n: int) -> int:
    root = math.isqrt(n)
    return root + (n > root * (root + 1))


def shares_of(counts: Mapping[int, int], symmetric: bool) -> dict[int, int]:
    """Symbols that occur, in order, and the rounded root of how often they do."""
    shares = {}
    for symbol in map(symbol_at, range(SYMBOLS)):
        count = counts.get(symbol, 0)
        if symmetric and symbol != 0:
            count = (count + counts.get(-symbol, 0) + 1) // 2
        if count > 0:
            shares[symbol] = _rounded_root(count)
    return shares


class _Numbers:
    """The questions about one kind of number."""

    def __init__(self) -> None:
        self.zero = AdaptiveBit(HALF)
        self.negative = AdaptiveBit(HALF)
        self.digit = [AdaptiveBit(HALF) for _ in range(17)]

    def code(self, coder: Coder, value: int) -> int:
        """Is it 0? Is it negative? How many digits has it, and which?"""
        if self.zero.code(coder, value == 0):
            return 0
        negative = self.negative.code(coder, value < 0)
        digits = 0
        while digits < 17 and self.digit[digits].code(
            coder, abs(value) >> (digits + 1) != 0
        ):
            digits += 1
        magnitude = 1
        for i in reversed(range(digits)):
            magnitude = magnitude << 1 | coder.code(bool(abs(value) >> i & 1), HALF)
        return -magnitude if negative else magnitude


def code_roots(coder: Coder, roots: list[int], symmetric: bool) -> list[int]:
    """Code the roots of all symbols up to the last that occurs."""
    last = 0
    for i in reversed(range(8)):
        last = last << 1 | coder.code(bool(len(roots) - 1 >> i & 1), HALF)
    if last >= SYMBOLS:
        raise error("too many symbols")
    roots = [*roots, *[0] * last][: last + 1]
    numbers = [_Numbers() for _ in range(7)]
    for i in range(last + 1):
        if i < 2 or i % 2 == 0:
            expected = roots[i - 1] if i > 0 else 0
        else:
            expected = (roots[i - 1] + roots[i - 2]) // 2
        if symmetric and i > 0 and i % 2 == 0:
            roots[i] = expected
            continue
        known = 0 if expected == 0 else 1 if expected < 4 else 2
        about = numbers[0 if i == 0 else 1 + 3 * (i % 2) + known]
        roots[i] = expected + about.code(coder, roots[i] - expected)
        if not 0 <= roots[i] <= LARGEST_ROOT:
            raise error("an impossible share")
    if roots[last] == 0 or (symmetric and last % 2 == 1):
        raise error("the last share is impossible")
    return roots


def encode_shares(shares: Mapping[int, int], symmetric: bool) -> bytes:
    """The shares as bytes."""
    last = max(place_of(symbol) for symbol in shares)
    roots = [shares.get(symbol_at(place), 0) for place in range(last + 1)]
    coder = RangeEncoder()
    code_roots(coder, roots, symmetric)
    return coder.finish()


def decode_shares(data: bytes, symmetric: bool) -> dict[int, int]:
    """The shares that ``encode_shares`` turned into these bytes."""
    coder = RangeDecoder(data)
    roots = code_roots(coder, [0], symmetric)
    coder.finish()
    return {symbol_at(i): root for i, root in enumerate(roots) if root > 0}


class Leaf(NamedTuple):
    """A sequence of symbols, and its probability of 2^31."""

    symbols: tuple[int, ...]
    probability: int


def _leaves(shares: Mapping[int, int], limit: int) -> list[Leaf]:
    """Sequences that are about equally likely, in the order in which they were made."""
    total = sum(root * root for root in shares.values())
    shift = max(total.bit_length() - 31, 0)
    p = {
        symbol: max(((root * root >> shift) << 31) // (total >> shift), 1)
        for symbol, root in shares.items()
    }
    nodes = [Leaf((), ONE)]
    inner = set()
    likeliest = [(-ONE, 0)]
    leaves = 1
    while likeliest and leaves + len(p) - 1 <= limit:
        _, parent = heapq.heappop(likeliest)
        inner.add(parent)
        leaves += len(p) - 1
        for symbol in p:
            child = Leaf(
                (*nodes[parent].symbols, symbol),
                nodes[parent].probability * p[symbol] >> 31,
            )
            if len(child.symbols) < LONGEST_SEQUENCE:
                heapq.heappush(likeliest, (-child.probability, len(nodes)))
            nodes.append(child)
    return [node for i, node in enumerate(nodes) if i not in inner]


def _frequencies(leaves: Sequence[Leaf], bits: int) -> list[int]:
    """Probabilities, rounded so that they are at least 1 and add up to 2^bits."""
    half = 1 << (30 - bits)
    result = [max(leaf.probability + half >> (31 - bits), 1) for leaf in leaves]
    missing = (1 << bits) - sum(result)
    order = sorted(range(len(result)), key=lambda i: -result[i])
    while missing != 0:
        for i in order:
            if missing > 0:
                result[i] += 1
                missing -= 1
            elif missing < 0 and result[i] > 1:
                result[i] -= 1
                missing += 1
    return result


@dataclass(frozen=True)
class Layout:
    """What all blocks have in common."""

    kind: Kind
    limit: int
    bits: int
    shares: dict[int, int]

    @property
    def flags(self) -> int:
        """The second byte of the stream."""
        choices = BITS.index(self.bits) | LIMITS.index(self.limit) << 1
        return choices | self.kind.symmetric << 3 | self.kind.number << 4

    @cached_property
    def leaves(self) -> list[Leaf]:
        """The sequences."""
        return _leaves(self.shares, self.limit)

    @cached_property
    def frequencies(self) -> list[int]:
        """How many of 2^bits slots each sequence has."""
        return _frequencies(self.leaves, self.bits)

    @cached_property
    def firsts(self) -> list[int]:
        """The first slot of each sequence."""
        return [0, *accumulate(self.frequencies)][:-1]

    @cached_property
    def first_symbol(self) -> int:
        """What follows the last code until a sequence ends."""
        return next(iter(self.shares))

    def expected_bits(self) -> float:
        """Bits a symbol that the dictionary needs for independent symbols."""
        cost = length = 0.0
        for leaf, frequency in zip(self.leaves, self.frequencies, strict=True):
            cost += leaf.probability * (self.bits - math.log2(frequency))
            length += leaf.probability * len(leaf.symbols)
        return cost / length


def layout_for(codes: NDArray[np.int32], kind: Kind, limit: int, bits: int) -> Layout:
    """A layout with the shares of these codes."""
    counts = Counter(kind.symbol(code) for code in codes.ravel().tolist())
    return Layout(kind, limit, bits, shares_of(counts, kind.symmetric))


def _cost(kind: Kind, counts: Mapping[int, int], shares: Mapping[int, int]) -> float:
    """Bits of the shares, and of the symbols were they coded by them."""
    total = float(sum(root * root for root in shares.values()))
    bits = 8.0 * len(encode_shares(shares, kind.symmetric))
    for symbol, root in shares.items():
        per_symbol = math.log2(total / (root * root)) + kind.extra_bits(symbol)
        bits += counts.get(symbol, 0) * per_symbol
    return bits


def choose_layout(codes: NDArray[np.int32]) -> Layout:
    """The layout that ``encode`` takes: small, and of about equals the fastest."""
    counts = Counter(codes.ravel().tolist())
    wide = max(map(abs, counts)) > 127
    saving = 1.0 if codes.size < ONE_STATE else 0.995  # that slower decoding must bring
    best, best_cost = Layout(Kind(0, False), LIMITS[0], BITS[0], {}), math.inf
    for number in range(1 if wide else 0, len(KINDS)):
        if wide and KINDS[number][1] > 1:
            continue
        for symmetric in (False, True):
            kind = Kind(number, symmetric)
            merged: Counter[int] = Counter()
            for code, count in counts.items():
                merged[kind.symbol(code)] += count
            shares = shares_of(merged, symmetric)
            cost = _cost(kind, merged, shares)
            slower = number > 0 and best.kind.number == 0
            if cost < (saving if slower else 1.0) * best_cost:
                best, best_cost = Layout(kind, LIMITS[0], BITS[0], shares), cost
    kind, shares, best_cost = best.kind, best.shares, math.inf
    for bits in BITS:
        for limit in LIMITS:
            if limit < len(shares):
                continue
            layout = Layout(kind, limit, bits, shares)
            cost = layout.expected_bits()
            if cost < saving * best_cost:
                best, best_cost = layout, cost
    return best
