"""The plan that a compressed model carries with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fitcompress.errors import PlanMismatchError
from fitcompress.search.plan import Plan

if TYPE_CHECKING:
    from torch import nn

__all__ = ["attach_plan", "plan_of"]

_ATTRIBUTE = "_fitcompress_plan"


def attach_plan(model: nn.Module, plan: Plan) -> None:
    """Let ``model`` carry ``plan``; copies of the model carry it too."""
    object.__setattr__(model, _ATTRIBUTE, plan)


def plan_of(model: nn.Module) -> Plan:
    """Return the plan that ``model`` was compressed by.

    Raises:
        PlanMismatchError: The model was not compressed.
    """
    plan = getattr(model, _ATTRIBUTE, None)
    if not isinstance(plan, Plan):
        raise PlanMismatchError(
            "this model is not compressed",
            got=type(model).__name__,
            wanted="what apply, compress or load(…, trainable=True) returned",
            fix="call fitcompress.apply(model, plan) first",
        )
    return plan
