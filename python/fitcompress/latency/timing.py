"""``Timing``: how long one network took, beside the float one in the same turns."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Timing"]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, over turns that timed two networks.

    Attributes:
        ms: Median of the network.
        q1_ms: Its first quartile.
        q3_ms: Its third quartile.
        reference_ms: Median of the reference, the network with float inputs.
        ratio: Median over the turns of network / reference: what slows the machine down
            for a while slows both down and cancels.
        turns: Number of turns.
    """

    ms: float
    q1_ms: float
    q3_ms: float
    reference_ms: float
    ratio: float
    turns: int

    @classmethod
    def of(cls, turns: Sequence[tuple[float, float]]) -> Timing:
        """Return the statistics of (network, reference) milliseconds, turn by turn."""
        network = [ms for ms, _ in turns]
        quartiles = [network[0]] * 3
        if len(network) > 1:
            quartiles = statistics.quantiles(network, n=4, method="inclusive")
        return cls(
            ms=quartiles[1],
            q1_ms=quartiles[0],
            q3_ms=quartiles[2],
            reference_ms=statistics.median(ms for _, ms in turns),
            ratio=statistics.median(ms / reference for ms, reference in turns),
            turns=len(turns),
        )

    def __str__(self) -> str:
        return (
            f"{self.ms:.4g} ms ({self.q1_ms:.4g} … {self.q3_ms:.4g}), "
            f"{self.ratio:.3f} of the float network's {self.reference_ms:.4g} ms"
        )
