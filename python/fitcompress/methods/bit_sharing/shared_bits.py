"""Numbers of several widths that share their leading part.

With z in [0, 1] and the step s_b = 1/(2^b − 1) of b bits,

    ẑ = z_2 + g_4 (ε_4 + g_8 ε_8),    D(z, s) = s · round(z / s),
    z_2 = D(z, s_2),  ε_4 = D(z − z_2, s_4),  ε_8 = D(z − z_prev, s_8),

z_prev being what the open gates have left so far. Every step is a whole multiple of the
next one, so with all gates open up to b bits the sum is D(z, s_b) itself. That holds
where the bits of each rung divide those of the next: 2^m − 1 divides 2^n − 1 if and
only if m divides n.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from fitcompress.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["Ladder", "Shared", "quantize_directly", "round_half_up", "share_bits"]


@dataclass(frozen=True)
class Ladder:
    """The bits that a layer can have.

    Attributes:
        bits: Rising, 2 … 16, each dividing the next: (2, 4, 8) for example.

    Raises:
        OptionError: They are something else.

    Example:
        >>> Ladder((2, 4, 8)).levels
        (3, 15, 255)
    """

    bits: tuple[int, ...]

    def __post_init__(self) -> None:
        given = self.bits
        whole = isinstance(given, tuple) and all(type(b) is int for b in given)
        if not whole or not given or not all(2 <= b <= 16 for b in given):
            raise OptionError(
                "a ladder has other bits", got=repr(given), wanted="a tuple of 2 … 16"
            )
        pairs = list(pairwise(given))
        if any(high <= low or high % low for low, high in pairs):
            raise OptionError(
                "the steps of this ladder are no multiples of each other",
                got=given,
                wanted="rising bits that divide the next: 2^m − 1 divides 2^n − 1 "
                "only if m divides n",
                fix="use (2, 4, 8)",
            )

    @property
    def levels(self) -> tuple[int, ...]:
        """1/s_b = 2^b − 1 of every rung."""
        return tuple(2**b - 1 for b in self.bits)


@dataclass(frozen=True)
class Shared:
    """What :func:`share_bits` returns.

    Attributes:
        values: ẑ, in the shape of z; gradients pass straight through to z, and reach
            the gates by what they let in.
        opened: Π of the gates up to every rung but the first, scalars.
        measures: mean |z − z_prev| before each of these rungs, scalars.
        bits: Bits of the open rungs, a scalar with the gradients of the gates.
    """

    values: torch.Tensor
    opened: list[torch.Tensor]
    measures: list[torch.Tensor]
    bits: torch.Tensor


def round_half_up(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest integer, halves up.

    Rounding halves to even, as ``torch.round`` does, does not commute with adding an
    odd integer, and the parts of a sum would differ from the whole where z is halfway.
    """
    floor = x.floor()
    return floor + (x - floor).ge(0.5).to(x.dtype)


def quantize_directly(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Return D(z, s_b), halves up; z in [0, 1]."""
    levels = 2**bits - 1
    quantized: torch.Tensor = round_half_up(z * levels) / levels
    return quantized


def share_bits(
    z: torch.Tensor,
    ladder: Ladder,
    gate: Callable[[int, torch.Tensor], torch.Tensor],
    kept: torch.Tensor | None = None,
) -> Shared:
    """Return ẑ with the rungs that the gates open.

    The parts are summed as integers, in steps of the finest rung, and divided once: the
    result is D(z, s_b) bit for bit. Measures carry no gradient: if they did, ranges
    could widen until nothing is left to round.

    Args:
        z: In [0, 1], float32.
        ladder: What rungs there are.
        gate: (number of the rung above the first, mean |z − z_prev|) → its gate, a
            scalar that is 0 or 1.
        kept: 1 where a value counts in the mean, 0 else, broadcast to z; None for all.
    """
    levels, finest = ladder.levels, ladder.levels[-1]
    exact = z.detach()
    code = round_half_up(exact * levels[0])
    total = code * (finest // levels[0])
    open_now, bits = z.new_ones(()), z.new_tensor(float(ladder.bits[0]))
    opened, measures = [], []
    for rung in range(1, len(levels)):
        coarse, fine = levels[rung - 1], levels[rung]
        measure = _mean((exact - code / coarse).abs(), kept)
        open_now = open_now * gate(rung - 1, measure)
        code = code * (fine // coarse)
        part = round_half_up(exact * fine - code)
        total = total + open_now * (part * (finest // fine))
        code = code + open_now.detach() * part
        bits = bits + open_now * (ladder.bits[rung] - ladder.bits[rung - 1])
        opened.append(open_now)
        measures.append(measure)
    return Shared(total / finest + (z - exact), opened, measures, bits)


def _mean(values: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    if kept is None:
        return values.mean()
    weight = kept.to(values.dtype).expand_as(values)
    return (values * weight).sum() / weight.sum().clamp_min(1)
