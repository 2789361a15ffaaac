"""Ways to choose a plan, for ``search(…, method=…)``, and to train a compressed model.

``Greedy``, ``Lagrangian``, ``Optimal``, ``PathSearch`` and ``Uniform`` choose levels.
``BitSharing``, ``Galen`` and ``PruningTernary`` train: see their ``run``.
"""

from fitcompress.methods.bit_sharing import BitSharing
from fitcompress.methods.galen import Galen, prune_channels
from fitcompress.methods.pruning_ternary import PruningTernary
from fitcompress.search.lagrangian import Lagrangian
from fitcompress.search.optimal import Optimal
from fitcompress.search.path import PathSearch
from fitcompress.search.simple_methods import Greedy, Uniform

__all__ = [
    "BitSharing",
    "Galen",
    "Greedy",
    "Lagrangian",
    "Optimal",
    "PathSearch",
    "PruningTernary",
    "Uniform",
    "prune_channels",
]
