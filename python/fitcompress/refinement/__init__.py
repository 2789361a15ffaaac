"""Sensitivities corrected by the loss rises that single levels really cause."""

from fitcompress.refinement.measured import Refinement, refine

__all__ = ["Refinement", "refine"]
