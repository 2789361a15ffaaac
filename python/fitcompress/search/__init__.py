"""Choose one level for every layer under a budget; needs no model and no torch."""

from fitcompress.search.budget import Budget, BudgetError
from fitcompress.search.plan import Level, Plan
from fitcompress.search.rules import Rule
from fitcompress.search.selection import pareto, search

__all__ = ["Budget", "BudgetError", "Level", "Plan", "Rule", "pareto", "search"]
