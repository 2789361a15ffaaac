"""Bits and filters learnt by training, with numbers that share their leading bits."""

from fitcompress.methods.bit_sharing.method import BitSharing

__all__ = ["BitSharing"]
