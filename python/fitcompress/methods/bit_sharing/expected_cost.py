"""Bit operations of a network whose bits are decided by gates.

    BOPs = Σ_l MACs_l · (share of kept filters)_l · b_w,l · b_a,l

With gates that are 0 or 1 this is the number that ``model.costs.bops`` gives for the
same bits; through the gates it has gradients. A removed filter saves its own products;
those that the next layer spends on its output are not credited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fitcompress.model.costs import bops

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fitcompress.methods.bit_sharing.layers import SharedLayer

__all__ = ["expected_bops", "real_bops"]


def expected_bops(layers: Iterable[SharedLayer]) -> torch.Tensor:
    """Return the bit operations of the last forward pass, float64, differentiable.

    Args:
        layers: All layers of the network, after a forward pass.
    """
    total = torch.zeros((), dtype=torch.float64)
    for layer in layers:
        if layer.inputs is None:  # looked up, not multiplied
            continue
        of_weight, of_input = layer.weight.found, layer.inputs.found
        assert of_weight is not None
        assert of_input is not None
        cost = layer.macs * of_weight.bits.double() * of_input.bits.double()
        if layer.weight.kept is not None:
            cost = cost * layer.weight.kept.double().mean()
        total = total.to(cost.device) + cost
    return total


def real_bops(
    macs: int, rows: int, kept: int, weight_bits: int, input_bits: int
) -> int:
    """Return the bit operations of a layer that keeps ``kept`` of its ``rows``."""
    return bops(macs * kept // max(rows, 1), weight_bits, input_bits)
