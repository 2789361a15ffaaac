"""Second-order compensation: later weights absorb the rounding errors of earlier ones."""

from fitcompress.compensate.apply import apply

__all__ = ["apply"]
