"""Weights on a grid: the parametrization that holds them there, leftovers, plans."""

from fitcompress.quantize.leftovers import (
    fold_norms_,
    is_folded,
    round_leftovers_,
    to_half,
)
from fitcompress.quantize.plan_state import attach_plan, plan_of
from fitcompress.quantize.weights import (
    WeightGrid,
    attach_grid,
    grid_of,
    half_up,
    remove,
    row_scales,
)

__all__ = [
    "WeightGrid",
    "attach_grid",
    "attach_plan",
    "fold_norms_",
    "grid_of",
    "half_up",
    "is_folded",
    "plan_of",
    "remove",
    "round_leftovers_",
    "row_scales",
    "to_half",
]
