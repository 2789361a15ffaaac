"""Which weights masks drop first, for ``measure(…, masks=…)`` and ``apply(…)``."""

from fitcompress.compensate.output_error import OutputError
from fitcompress.sensitivity.kept_filters import KeptFilters
from fitcompress.sensitivity.mask_rules import Fisher, Magnitude, MaskRule, Smoothed

__all__ = ["Fisher", "KeptFilters", "Magnitude", "MaskRule", "OutputError", "Smoothed"]
