"""Ways to choose a plan, for ``search(…, method=…)``, and to train a compressed model.

``Greedy``, ``Lagrangian``, ``Optimal``, ``PathSearch`` and ``Uniform`` choose levels.
``PruningTernary`` trains: its ``run(model, loader)`` returns a compressed model.
"""

from fitcompress.methods.pruning_ternary import PruningTernary
from fitcompress.search.lagrangian import Lagrangian
from fitcompress.search.optimal import Optimal
from fitcompress.search.path import PathSearch
from fitcompress.search.simple_methods import Greedy, Uniform

__all__ = [
    "Greedy",
    "Lagrangian",
    "Optimal",
    "PathSearch",
    "PruningTernary",
    "Uniform",
]
