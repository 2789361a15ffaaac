"""Pruning Ternary: weights −1, 0, 1 with a scale per filter, by training."""

from fitcompress.methods.pruning_ternary.method import PruningTernary
from fitcompress.methods.pruning_ternary.result import two_bit_bytes

__all__ = ["PruningTernary", "two_bit_bytes"]
