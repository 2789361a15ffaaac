"""Second-order compensation: later weights absorb the rounding errors of earlier ones."""

from fitcompress.compensate.compressor import apply

__all__ = ["apply"]
