"""From actions in [0, 1] to a policy: channels of groups, bits of layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fitcompress.errors import FormatError, OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ActionMap", "AgentKind", "Integers", "Policy"]

AgentKind = Literal["joint", "pruning", "quantization"]
Integers = Literal["int8", "mixed"]

SIZES: dict[AgentKind, int] = {"pruning": 1, "quantization": 2, "joint": 3}
MIXED, INT8 = 0.5, 0.2  # above which an action asks for so many bits
FEWEST = 2  # bits, of a grid with a zero and both signs


@dataclass(frozen=True)
class Policy:
    """What an episode made of the network. Equal policies are equal networks.

    Attributes:
        channels: Channels that every group keeps.
        bits: (layer, weight bits, activation bits) where they are integers, in the
            order in which the layers run.
    """

    channels: tuple[int, ...]
    bits: tuple[tuple[str, int, int], ...]

    def to_list(self) -> list[Any]:
        """Return what JSON can hold."""
        return [list(self.channels), [list(each) for each in self.bits]]

    @classmethod
    def from_list(cls, values: Any) -> Policy:
        """Return the policy of :meth:`to_list`.

        Raises:
            FormatError: The values are none.
        """
        try:
            channels, bits = values
            return cls(
                tuple(int(n) for n in channels),
                tuple((str(name), int(w), int(a)) for name, w, a in bits),
            )
        except (TypeError, ValueError) as error:
            raise FormatError("this is no policy", got=str(error)[:100]) from error


@dataclass(frozen=True)
class ActionMap:
    """What actions mean.

    Attributes:
        agent: ``"pruning"`` has one action, ``"quantization"`` two, ``"joint"`` three:
            (pruning, activation, weight).
        integers: ``"int8"``: layers are 8×8 or float, for runtimes where only 8 bits
            are faster. ``"mixed"``: other widths too, for targets that run them.
        round_to: Channels are kept in multiples of this.
        most_bits: R, of mixed widths; of the weights of ``"int8"`` layers, if that is
            less than 8.
    """

    agent: AgentKind = "joint"
    integers: Integers = "int8"
    round_to: int = 8
    most_bits: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.agent, str) or self.agent not in SIZES:
            raise OptionError("agent", got=repr(self.agent), wanted=" or ".join(SIZES))
        if self.integers not in ("int8", "mixed"):
            raise OptionError(
                "integers", got=repr(self.integers), wanted='"int8" or "mixed"'
            )
        for name, least, most in (("round_to", 1, 4096), ("most_bits", FEWEST, 16)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise OptionError(
                    name, got=repr(value), wanted=f"a whole number, {least} to {most}"
                )

    @property
    def size(self) -> int:
        """Number of actions at every step."""
        return SIZES[self.agent]

    @property
    def prunes(self) -> bool:
        """Whether the first action is that of pruning."""
        return self.agent != "quantization"

    @property
    def quantizes(self) -> bool:
        """Whether the last two actions are bits."""
        return self.agent != "pruning"

    def channels(self, action: Sequence[float], width: int) -> int:
        """Return how many of ``width`` channels stay.

            min(C, r · max(1, ⌈(1 − a) C / r⌉))

        a the pruning action, r = ``round_to``: rounded up, so never none.
        """
        if not self.prunes:
            return width
        steps = math.ceil((1 - _unit(action[0])) * width / self.round_to - 1e-9)
        return min(width, self.round_to * max(1, steps))

    def bits(self, action: Sequence[float]) -> tuple[int, int] | None:
        """Return (weight bits, activation bits) of a layer, or None for float.

        With a the actions of activation and weight: if either is above .5, mixed widths

            clip(⌊(1 − a′) R⌋ + 1, 2, R),    a′ = max(0, (a − .5) / .5)

        for each; else 8×8 if either is above .2; else float. The paper's lower end is 1
        bit, which grids with a zero do not have. With ``integers="int8"`` mixed widths
        are 8×8 too, and weights use R of their 8 bits, if R is less.
        """
        if not self.quantizes:
            return None
        of_input, of_weight = (_unit(a) for a in action[-2:])
        largest = max(of_input, of_weight)
        if largest <= INT8:
            return None
        if self.integers == "int8":
            return min(self.most_bits, 8), 8
        if largest <= MIXED:
            return 8, 8
        return self._mixed(of_weight), self._mixed(of_input)

    def _mixed(self, a: float) -> int:
        inner = max(0.0, (a - MIXED) / (1 - MIXED))
        bits = math.floor((1 - inner) * self.most_bits) + 1
        return min(max(bits, FEWEST), self.most_bits)


def _unit(a: float) -> float:
    a = float(a)
    if not 0 <= a <= 1:
        raise OptionError("an action lies between 0 and 1", got=a)
    return a
