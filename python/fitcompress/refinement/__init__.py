"""Sensitivities corrected by the loss rises that levels and plans really cause."""

from fitcompress.refinement.calibration import calibrate
from fitcompress.refinement.refinement import Refinement, refine

__all__ = ["Refinement", "calibrate", "refine"]
