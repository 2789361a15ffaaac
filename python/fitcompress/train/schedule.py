"""The learning rate over a training: a short warm-up, then a cosine to zero."""

from __future__ import annotations

import math

__all__ = ["warm_cosine"]

WARM_UP = 0.02  # share of all steps


def warm_cosine(peak: float, step: int, total: int) -> float:
    """Return the learning rate of a step.

        peak · min(1, (t + 1) / max(1, .02 T)) · (1 + cos(π t/T)) / 2

    Args:
        peak: The largest one.
        step: t, from 0 on.
        total: T.
    """
    warm = min(1.0, (step + 1) / max(1.0, WARM_UP * total))
    return peak * warm * 0.5 * (1 + math.cos(math.pi * (step / total)))
