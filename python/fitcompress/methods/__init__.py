"""Ways to choose a plan: for ``fitcompress.search(…, method=…)``, or by training."""

from fitcompress.methods.bit_sharing import BitSharing
from fitcompress.search.lagrangian import Lagrangian
from fitcompress.search.optimal import Optimal
from fitcompress.search.path import PathSearch
from fitcompress.search.simple_methods import Greedy, Uniform

__all__ = ["BitSharing", "Greedy", "Lagrangian", "Optimal", "PathSearch", "Uniform"]
