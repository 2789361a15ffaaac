"""Weights and activations on grids: what holds them there, leftovers, plans."""

from fitcompress.quantize.activations import (
    ActivationQuantizer,
    activation_of,
    activations,
    attach_activation,
    channel_of,
    detach_activation,
)
from fitcompress.quantize.leftovers import (
    MOST_DIGITS,
    fold_norms_,
    is_folded,
    norm_digits,
    round_leftovers_,
    shorten,
    shorten_norms_,
    to_half,
)
from fitcompress.quantize.observers import (
    MinMaxObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
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
    "MOST_DIGITS",
    "ActivationQuantizer",
    "MSEObserver",
    "MinMaxObserver",
    "Observer",
    "PercentileObserver",
    "WeightGrid",
    "activation_of",
    "activations",
    "attach_activation",
    "attach_grid",
    "attach_plan",
    "channel_of",
    "detach_activation",
    "fold_norms_",
    "grid_of",
    "half_up",
    "is_folded",
    "norm_digits",
    "plan_of",
    "remove",
    "round_leftovers_",
    "row_scales",
    "shorten",
    "shorten_norms_",
    "to_half",
]
