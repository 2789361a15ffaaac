"""Whether corrections that were fitted to calibration data carry over to others."""

from __future__ import annotations

import logging
import statistics

__all__ = ["judge"]

logger = logging.getLogger("fitcompress.compensate")
TRUSTED = 0.5  # of what corrections gain on fitted data, to be gained on others


def judge(trusts: list[float], samples: int) -> None:
    """Warn if corrections do not carry over to data that they were not fitted to."""
    known = [t for t in trusts if t == t]
    if known and (median := statistics.median(known)) < TRUSTED:
        logger.warning(
            "the calibration set is too small: what is fitted to it gains only %.0f %% "
            "of that on calibration inputs held out (median over layers, %d samples); "
            "use more",
            100 * max(median, 0.0),
            samples,
        )
