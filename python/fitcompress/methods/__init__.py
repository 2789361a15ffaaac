"""Ways to choose a plan, for ``fitcompress.search(…, method=…)``."""

from fitcompress.search.lagrangian import Lagrangian
from fitcompress.search.optimal import Optimal
from fitcompress.search.path import PathSearch
from fitcompress.search.simple_methods import Greedy, Uniform

__all__ = ["Greedy", "Lagrangian", "Optimal", "PathSearch", "Uniform"]
