"""Ways to choose a plan, for ``fitcompress.search(…, method=…)``."""

from fitcompress.search.lagrangian import Lagrangian
from fitcompress.search.path import PathSearch

__all__ = ["Lagrangian", "PathSearch"]
