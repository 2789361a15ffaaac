"""Compensation of decoders that do not fit in memory, one block at a time."""

from fitcompress.blockwise.shards import compensate_shards

__all__ = ["compensate_shards"]
