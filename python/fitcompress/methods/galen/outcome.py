"""``Outcome``: what one policy is worth."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fitcompress.methods.galen.reward import reward

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What came out of one policy.

    Attributes:
        reward: Of accuracy and share.
        accuracy: On the validation data, 0 … 1.
        share: Latency relative to the dense float network's, T/T_ref.
        latency_ms: Median latency of a call.
        reference_ms: Of the dense network in the same turns.
        failure: Why the network could not be judged; None if it was.
    """

    reward: float
    accuracy: float
    share: float
    latency_ms: float
    reference_ms: float
    failure: str | None = None

    @classmethod
    def failed(
        cls, why: str, target: float, *, beta: float, one_sided: bool
    ) -> Outcome:
        """Return that of a network which cannot be judged.

        As if it knew nothing, and were as slow as the dense one or, if that is slower,
        took twice what is asked for.

        Args:
            why: What was raised.
            target: The share that is asked for.
            beta: As for ``reward``.
            one_sided: As for ``reward``.
        """
        share = max(1.0, 2 * target)
        value = reward(0.0, share, target, beta=beta, one_sided=one_sided)
        return cls(value, 0.0, share, 0.0, 0.0, why)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)
