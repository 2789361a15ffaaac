"""How much the loss rises for every level of every layer, measured once."""

from fitcompress.sensitivity.fisher import FisherEstimator

__all__ = ["FisherEstimator"]
