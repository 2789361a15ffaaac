"""Second-order compensation: later weights absorb the errors of earlier ones."""

from fitcompress.compensate.application import apply

__all__ = ["apply"]
