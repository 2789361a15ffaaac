"""Weights on a grid: the parametrization that holds them there, leftovers, plans."""

from fitcompress.quantize.leftovers import fold_norms_, round_leftovers_
from fitcompress.quantize.plan_state import attach_plan, plan_of
from fitcompress.quantize.weights import (
    WeightGrid,
    attach_grid,
    grid_of,
    remove,
    row_scales,
)

__all__ = [
    "WeightGrid",
    "attach_grid",
    "attach_plan",
    "fold_norms_",
    "grid_of",
    "plan_of",
    "remove",
    "round_leftovers_",
    "row_scales",
]
