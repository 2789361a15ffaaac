"""Plain-torch twins of the native tensor ops: short, slow, and the oracle of the tests.

Every function has the name, arguments and results of its twin in `fitcompress.ops`,
where formulas, shapes and units are documented. None of them checks its arguments.
"""

from fitcompress.reference.compensate import error_feedback_sweep, input_moments_
from fitcompress.reference.distortion import distortion_table, magnitude_histogram
from fitcompress.reference.fisher import (
    ghost_norms_,
    square_accumulate_,
    winograd_norms_,
)
from fitcompress.reference.quantize import (
    fake_quantize_prune,
    fake_quantize_prune_backward,
)

__all__ = [
    "distortion_table",
    "error_feedback_sweep",
    "fake_quantize_prune",
    "fake_quantize_prune_backward",
    "ghost_norms_",
    "input_moments_",
    "magnitude_histogram",
    "square_accumulate_",
    "winograd_norms_",
]
