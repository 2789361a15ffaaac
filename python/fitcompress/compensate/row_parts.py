"""Layers of many rows, compensated some rows at a time: no row depends on another."""

from __future__ import annotations

import torch

from fitcompress.compensate.sweep import Quantized

__all__ = ["ROWS", "joined"]

ROWS = 12_288  # of a layer that are compensated at a time: float64 copies are large


def joined(parts: list[Quantized]) -> Quantized:
    """Return what was made of the rows of a layer, part by part."""
    first = parts[0]
    if len(parts) == 1:
        return first
    known = [part.trust for part in parts if part.trust == part.trust]
    return Quantized(
        torch.cat([part.codes for part in parts]),
        first.scale
        if len(first.scale) == 1
        else torch.cat([part.scale for part in parts]),
        None if first.mask is None else torch.cat([_mask(part) for part in parts]),
        None if first.shift is None else torch.cat([_shift(part) for part in parts]),
        None,
        sum(part.drift for part in parts) / len(parts),
        sum(known) / len(known) if known else float("nan"),
    )


def _mask(part: Quantized) -> torch.Tensor:
    assert part.mask is not None
    return part.mask


def _shift(part: Quantized) -> torch.Tensor:
    assert part.shift is not None
    return part.shift
