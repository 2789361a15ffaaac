"""Channels and bits chosen by reinforcement learning against a measured latency."""

from fitcompress.methods.galen.method import Galen
from fitcompress.methods.galen.surgery import prune_channels

__all__ = ["Galen", "prune_channels"]
