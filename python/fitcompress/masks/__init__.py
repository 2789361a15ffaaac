"""Which weights masks drop first, for ``measure(…, masks=…)`` and ``apply(…)``."""

from fitcompress.compensate.output_error import OutputError
from fitcompress.sensitivity.mask_rules import Fisher, Magnitude, MaskRule, Smoothed

__all__ = ["Fisher", "Magnitude", "MaskRule", "OutputError", "Smoothed"]
